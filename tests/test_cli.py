from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fluxlib import records
from fluxlib.analysis import store
from fluxlib.app import cli, doctor
from fluxlib.config import make_config
from fluxlib.io import ConfigError

DEFAULTS = {"string": "x", "int64": 1, "float64": 0.5}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line; gives exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fluxlib", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def rounds() -> pd.DataFrame:
    rows = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * 2 for c in records.TABLES["rounds"]})
    return rows.assign(run_id="flux-m-t-seed0", round=[0, 1], metric=[float("nan"), 0.25], metric_name="accuracy")


@pytest.fixture
def engine(monkeypatch, rounds):
    """Stands for the engine; remembers the configuration it was given."""
    from fluxlib import federation

    seen = SimpleNamespace(config=None, error=None)

    def run(config, on_round=None, out=None, superlink=None):
        seen.config, seen.out = config, out
        if seen.error:
            raise seen.error
        for row in rounds.to_dict("records") if on_round else []:
            on_round(row)
        return SimpleNamespace(run_id=config.run_id, rounds=rounds, participants=None, path=out)

    monkeypatch.setattr(federation, "run", run)
    return seen


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, fluxlib.app.cli; print([m for m in ('torch', 'pandas', 'matplotlib', 'flwr') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_run_prints_a_line_per_round(call, engine, tmp_path):
    code, out, err = call(
        "run", "--rounds", 3, "--seed", 7, "--out", tmp_path, "--set", "data.alpha=0.1", "--set", "wire={uplink: int8}"
    )
    assert (code, err) == (0, "")
    changed = {"federation.rounds": 3, "seed": 7, "data.alpha": 0.1, "wire.uplink": "int8"}
    assert engine.config.settings(changed_only=True) == changed
    first, second, last = out.splitlines()
    assert "round   0  not scored" in first
    assert "round   1  accuracy 0.250  loss 0.500" in second and "1 rejected" in second
    assert last == f"flux-mini-llama-moe-mini-gsm8k-seed7: tables in {tmp_path}"


def test_run_can_answer_a_machine(call, engine, tmp_path):
    code, out, _ = call("run", "--out", tmp_path, "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["path"], answer["last"]["metric"]) == (str(tmp_path), 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "error: federation.rounds: Input should be greater than or equal to 1, got 0"),
        (["--seed", "9" * 30], "error: seed: Input should be less than 9223372036854775808, got 999"),
        (["--set", "data.task_size=10000000000"], "error: data.task_size: Input should be less than or equal to 10"),
        (["--engine", "moon"], "error: engine: Input should be 'local'"),
        (["--set", "epsilom=1"], "error: unknown parameter 'epsilom'; did you mean roles.epsilon?"),
        (["--set", "alpha"], "error: --set takes NAME=VALUE, got 'alpha'"),
        (["--set", "alpha=1", "--set", "alpha=2"], "error: --set alpha is given twice"),
        (["--set", "federation.rounds=3"], "error: federation.rounds is an option of its own: --rounds VALUE"),
        (["--set", "data={path: x}"], "error: data.path is an option of its own: --data VALUE"),
        (["--set", "training.learning_rate=fast"], "error: training.learning_rate: Input should be a valid number"),
        (["--set", "learning_rate=1"], "error: unknown parameter 'learning_rate'; did you mean training.learn"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(call, engine, tmp_path, arguments, message):
    code, out, err = call("run", "--out", tmp_path / "new", *arguments)
    assert code == 2 and out == ""
    assert err.startswith(message)
    assert "Traceback" not in err
    assert engine.config is None, "refused before any work"


def test_names_are_refused_by_those_who_know_them(call, tmp_path):
    code, _, err = call("run", "--out", tmp_path, "--method", "fluxx")
    assert code == 2
    assert "'fluxx'" in err and "flux" in err and "fmd" in err
    code, _, err = call("run", "--out", tmp_path, "--task", "gsm9k")
    assert code == 2
    assert "task is 'gsm9k', allowed are mini-dolly, mini-gsm8k" in err
    for name in ("fleet", "link", "model"):
        assert call("run", "--out", tmp_path, "--set", f"clock.{name}=nope")[2].startswith(f"error: clock.{name}")


def test_a_folder_that_cannot_be_written_is_refused_first(call, engine, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("run", "--out", tmp_path / "file" / "runs")
    assert code == 2 and engine.config is None
    assert err == f"error: cannot write to the output folder {tmp_path / 'file' / 'runs'}: Not a directory\n"


def written(folder, config, rounds, status="complete"):
    about = {"parameters": config.model_dump(mode="json"), "status": status}
    return records.write("rounds", rounds, folder / "rounds" / f"{config.run_id}.parquet", about)


def test_a_run_that_is_there_is_replaced_only_when_told_to(call, engine, tmp_path, rounds):
    path = written(tmp_path, make_config({}), rounds)
    for arguments, differing in (((), "the same settings"), (("--rounds", 3), "federation.rounds=10")):
        code, out, err = call("run", "--out", tmp_path, *arguments)
        assert (code, out, engine.config) == (2, "", None)
        assert err == (
            f"error: {path} holds 1 rounds of flux-mini-llama-moe-mini-gsm8k-seed0 with {differing}; "
            "--overwrite replaces them, another --out or --set variant=NAME keeps both\n"
        )
    assert call("run", "--out", tmp_path, "--rounds", 3, "--overwrite")[0] == 0 and engine.config is not None
    assert call("run", "--out", tmp_path, "--set", "variant=short")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 0), (("--set", "federation.round_timeout_s=9"), 0), (("--rounds", 3), 2)]
)
@pytest.mark.parametrize("kind", ["stopped", "checkpoint"])
def test_a_run_that_was_interrupted_goes_on_with_the_same_settings_alone(
    call, engine, tmp_path, rounds, kind, arguments, code
):
    config = make_config({})
    if kind == "stopped":
        written(tmp_path, config, rounds, "stopped")
    else:
        written(tmp_path, make_config({"seed": 0, "data.alpha": 9.0}), rounds)  # an older run, given up for this one
        about = {
            "config": config.model_dump(mode="json"),
            "rows": {"rounds": json.loads(rounds.to_json(orient="records"))},
        }
        (tmp_path / "checkpoints").mkdir()
        path = tmp_path / "checkpoints" / f"{config.run_id}.safetensors"
        save_file({"x": torch.ones(1)}, path, {"about": json.dumps(about)})
    assert call("run", "--out", tmp_path, *arguments)[0] == code
    if not arguments:  # on another engine it would begin anew
        assert call("run", "--out", tmp_path, "--engine", "deployment")[0] == 2


def test_a_failing_run_is_one_message_and_exit_code_1(call, engine, tmp_path):
    engine.error = OSError("model.safetensors is corrupted")
    assert call("run", "--out", tmp_path) == (1, "", "error: model.safetensors is corrupted\n")


def test_values_are_read_as_yaml_where_they_can_be():
    assert cli.parse_settings(["a=1", "b=1.5e-3", "c=null", "d=dynamic", "e=[1, 2]", "f=a=b", "g="]) == {
        "a": 1, "b": 1.5e-3, "c": None, "d": "dynamic", "e": [1, 2], "f": "a=b", "g": None,
    }  # fmt: skip
    assert cli.parse_settings(["b=1e-3"]) == {"b": 1e-3}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        cli.parse_settings(["=1"])


def test_plan_says_what_fits_on_a_device(call):
    code, out, _ = call("plan", "--model", "llama-moe-3.5b", "--device", "l20", "--batch", 2, "--tokens", 128)
    assert code == 0
    assert "B_tune" in out and "peak of a step" in out
    answer = json.loads(call("plan", "--memory", "48GiB", "--batch", 2, "--tokens", 128, "--json")[1])
    assert answer["fits"] and 0 < answer["num_tuned"] < answer["num_experts"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1GiB", "--device", "l20"], "error: --memory and --device say the same thing"),
        (
            ["--device", "l21"],
            "error: --device is 'l21', allowed are l20, rtx-4090, rtx-4080, rtx-3060, jetson-agx-orin",
        ),
        (["--device", "paper"], "error: --device is 'paper', allowed are l20"),
        (["--batch", "9999999999"], "error: batch: expected 1 to 16384, got 9999999999"),
        (
            ["--tokens", "1048576"],
            "error: tokens: expected 1 to 262144, got 1048576",
        ),
        (["--memory", "lots"], "error: memory: expected a size such as 24GiB"),
        (["--memory", "1GiB"], "error: memory: "),
        (["--method", "fluxx"], "error: method: expected one of flux"),
    ],
)
def test_an_impossible_plan_is_one_message_and_exit_code_2(call, arguments, message):
    code, out, err = call("plan", "--batch", 1, "--tokens", 16, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_list_shows_the_last_round_of_every_run(call, rounds, tmp_path):
    records.write("rounds", rounds, tmp_path / "rounds" / "flux-m-t-seed0.parquet", {})
    code, out, _ = call("list", "--out", tmp_path)
    assert code == 0
    assert "flux-m-t-seed0  round   1  accuracy 0.250" in out and str(tmp_path) in out
    assert json.loads(call("list", "--out", tmp_path, "--json")[1])[0]["run_id"] == "flux-m-t-seed0"
    (tmp_path / "empty").mkdir()
    assert "no runs in" in call("list", "--out", tmp_path / "empty")[1]
    code, _, err = call("list", "--out", tmp_path / "none")
    assert code == 2 and f"'--out': Directory '{tmp_path / 'none'}' does not exist" in err


def test_list_shows_what_can_be_read_and_names_the_rest(call, rounds, tmp_path):
    good = records.write("rounds", rounds, tmp_path / "rounds" / "flux-m-t-seed0.parquet", {})
    records.write("rounds", rounds[:0], good.with_name("flux-m-t-seed1.parquet"), {})
    good.with_name("flux-m-t-seed2.parquet").write_bytes(good.read_bytes()[:200])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run.safetensors").write_text("cut off")
    save_file({}, tmp_path / "checkpoints" / "run2.safetensors", {"about": "[1]"})
    code, out, err = call("list", "--out", tmp_path, "--json")
    assert (code, [row["run_id"] for row in json.loads(out)]) == (1, ["flux-m-t-seed0"])
    lines = err.strip().splitlines()
    assert all(line.startswith("cannot be read: ") for line in lines)
    assert ["seed1" in lines[0], "no round in it" in lines[0], "seed2" in lines[1]] == [True] * 3
    assert all(f"{name}.safetensors: its checkpoint cannot be read" in err for name in ("run", "run2"))
    for text in ("[]", '{"parameters": 3}', '{"par'):
        good.with_suffix(".json").write_text(text)
        assert store.parameters(good) == {}


def test_an_unknown_notebook_lists_those_beside_it(call, tmp_path):
    (tmp_path / "a.ipynb").write_text("{}")
    code, _, err = call("notebook", tmp_path / "b.ipynb", tmp_path / "out.ipynb")
    assert code == 2
    assert err == f"error: no notebook {tmp_path / 'b.ipynb'}; in its folder: a.ipynb\n"


@pytest.mark.parametrize("name", ["profile", "method", "task", "task_name", "model", "model_name"])
def test_a_name_that_does_not_exist_starts_no_notebook(call, tmp_path, name):
    cell = {"cell_type": "code", "source": [f"{name} = ''"], "metadata": {"tags": ["parameters"]}}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    code, _, err = call("notebook", tmp_path / "a.ipynb", tmp_path / "out.ipynb", "--set", f"{name}=nonsense")
    said = "'nonsense' is no folder, no known name" if "model" in name else "allowed are"
    assert code == 2 and err.startswith(f"error: {name}") and said in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


def test_doctor_says_what_is_wrong_and_what_to_do(call, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("disk", "problem", "0 GiB", "free some")])
    code, out, _ = call("doctor")
    assert code == 1
    assert out.splitlines() == ["problem   disk: 0 GiB", "          -> free some"]
    assert json.loads(call("doctor", "--json")[1]) == [
        {"name": "disk", "status": "problem", "found": "0 GiB", "advice": "free some"}
    ]
    found = [doctor.Check("a", "ok", ""), doctor.Check("b", "warning", "", "do")]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert call("doctor")[0] == 0


def test_every_finding_of_the_doctor_that_is_not_ok_comes_with_advice(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXLIB_DATA", str(tmp_path / "file" / "data"))
    (tmp_path / "file").write_text("")
    found = {check.name: check for check in doctor.examine()}
    assert found["mini-llama-moe"].status == "problem"
    assert found["folder"].status in ("ok", "problem")
    assert all(check.advice for check in found.values() if check.status != "ok")
    assert found["torch"].status == "ok"


def test_the_doctor_compares_with_the_pins(monkeypatch, tmp_path):
    (tmp_path / "constraints.txt").write_text("# a comment\nTorch==0.1  # old\nnumpy>=2\n")
    assert doctor.pins(tmp_path / "constraints.txt") == {"torch": "0.1"}
    assert doctor.pins(tmp_path / "none.txt") == {}
    monkeypatch.setattr(doctor, "pins", lambda: {"torch": "0.1"})
    found = {check.name: check for check in doctor.examine()}
    assert found["torch"].status == "warning"
    assert "tested with 0.1" in found["torch"].found


def test_a_missing_package_is_a_problem_in_the_core_and_a_warning_elsewhere(monkeypatch):
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    found = {check.name: check.status for check in doctor._packages()}
    assert (found["torch"], found["flwr"]) == ("problem", "warning")


def stored(tmp_path, run_id: str, metrics: list[float], step_s: float) -> None:
    table = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.TABLES["rounds"]})
    index = range(len(metrics))
    seconds = [step_s * number for number in index]
    table = table.assign(run_id=run_id, round=index, metric=metrics, metric_name="accuracy", device_s=seconds)
    records.write("rounds", table.assign(wall_s=seconds), tmp_path / "rounds" / f"{run_id}.parquet", {})


def test_compare_gives_curves_and_times_to_the_best_runs_target(call, tmp_path):
    stored(tmp_path, "flux-m-t-seed0", [0.0, 0.5, 1.0], 1.0)
    stored(tmp_path, "fmd-m-t-seed0", [0.0, 0.4, 0.8], 10.0)
    arguments = ["compare", "flux", "fmd", "--out", tmp_path, "--target", 0.75, "--picture", tmp_path / "p" / "both"]
    code, out, _ = call(*arguments)
    assert code == 0
    assert "target 0.750: 75% of the last score of flux-m-t-seed0" in out
    assert (tmp_path / "p" / "both.pdf").is_file() and len(pd.read_csv(tmp_path / "p" / "both.csv")) == 6
    answer = json.loads(call(*arguments, "--json")[1])
    assert [row["device_s_to_target"] for row in answer["runs"]] == pytest.approx([1.5, 18.75])
    answer = json.loads(call(*arguments, "--reference", "fmd", "--json")[1])
    assert answer["target"] == pytest.approx(0.6) and answer["reference"] == "fmd-m-t-seed0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nothing"], "error: 'nothing' is no run; give a run id, a unique part of one, or a path"),
        (["compare", "x" * 5000], f"error: '{'x' * 58}… is no run; give a run id"),
        (["compare", "flux", "--target", "2"], "error: --target is 2.0, allowed is above 0 and at most 1"),
        (["compare", "flux", "--picture", "a b"], "error: --picture a b: slug is 'a b', allowed are letters"),
        (["compare", ""], "error: an argument is empty: give a value"),
        (["compare", "flux", "--reference="], "error: an argument is empty: give a value"),
        (["export", "nowhere", "new", "--peft"], "error: nowhere has no run.json"),
        (["export", "nowhere", "new"], "error: give --peft, the format to write"),
        (["trials", "--out", "README.md"], "Error: Invalid value for '--out': Directory 'README.md' is a file."),
        (["trials", "--out", "."], "error: no search in .: "),
        (["claims", "--profile", "nope"], "error: there are no results in"),
        (["notebook", "README.md", "x.ipynb"], "error: README.md is not a notebook: Expecting value"),
        (["notebook", "a.ipynb", "x.ipynb"], "error: a.ipynb is not a notebook: it lacks 'cells'"),
        (["notebook", "b.ipynb", "b.ipynb"], "error: b.ipynb is the notebook itself: give its executed copy another"),
        (
            ["notebook", "b.ipynb", "x.ipynb", "--set", "a=nan"],
            "error: a is 'nan', allowed is a number (as it stands: 1)",
        ),
        (["notebook", "b.ipynb", "x.ipynb", "--set", "b=1"], "error: b.ipynb has no parameter 'b'; allowed are a"),
        (["run", "--model", "dense"], "error: model: GPT2LMHeadModel has no MoE layer"),
        (["notebook", "b.ipynb", "."], "error: the executed copy is to be ., allowed is a file that ends in .ipynb"),
    ],
)
def test_wrong_input_of_the_other_commands_is_one_message_too(call, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "README.md").write_text("some words to read " * 5)
    (tmp_path / "a.ipynb").write_text("{}")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "gpt2"}')
    cell = {"cell_type": "code", "source": ["a = 1"], "metadata": {"tags": ["parameters"]}}
    (tmp_path / "b.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.chdir(tmp_path)
    stored(tmp_path, "flux-m-t-seed0", [0.0, 1.0], 1.0)
    code, out, err = call(*arguments, *(["--out", tmp_path] if arguments[0] == "compare" else []))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(message) or err.startswith(message)


def test_a_run_is_saved_only_into_a_new_folder(call, engine, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    code, _, err = call("run", "--out", tmp_path, "--save", tmp_path / "full")
    assert code == 2 and engine.config is None
    assert err == f"error: {tmp_path / 'full'} is not empty: a model is written to a new folder\n"


@pytest.mark.parametrize("name", ["run", "compare", "export", "plan", "list", "doctor", "notebook", "trials", "verify"])
def test_every_command_explains_itself_with_an_example(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"fluxlib {name}" in out.split("Example")[1]
    assert "\\[" not in out


def test_help_says_what_an_argument_is(call):
    assert "RUNS...  run ids, unique parts of one, or paths of tables  [required]" in call("compare", "--help")[1]


def test_what_is_no_search_says_what_is(call, tmp_path):
    for name, count in (("flux", 2), ("fmd", 1)):
        for number in range(count):
            stored(tmp_path, run_id := f"{name}-v{number}-m-t-seed0", [0.0, 1.0], 1.0)
            table = tmp_path / "rounds" / f"{run_id}.parquet"
            changed = pd.read_parquet(table).assign(method=name, variant=f"v{number}")
            records.write(
                "rounds", changed, table, {"parameters": {"training": {"learning_rate": 1e-3, "local_steps": 4}}}
            )
    code, _, err = call("trials", "--out", tmp_path)
    assert code == 2 and err.startswith(f"error: no search in {tmp_path}: methods must have equally many trials")
    assert "there are: flux 2, fmd 1\nallowed is a folder of trials, such as `make reproduce PROFILE=tune`" in err


def test_a_run_that_is_not_there_is_compared_with_those_that_are(call, tmp_path):
    for run_id in ("aaa-m-t-seed0", "flux-m-t-seed1", "flux-m-t-seed2"):
        stored(tmp_path, run_id, [0.0, 1.0], 1.0)
    first, nearest, *_ = call("compare", "flux-m-seed1", "--out", tmp_path)[2].splitlines()
    assert first.endswith("Nearest to it:") and nearest.endswith("flux-m-t-seed1.parquet")
    assert "error: 'flux' means 2 runs; give a run id" in call("compare", "flux", "--out", tmp_path)[2]
