"""One claim computed anew: from stored tables, and from new ones (the pipeline that makes them is a stand-in)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fluxlib.analysis.claims.judge import EVERY
from fluxlib.app import cli, pipeline, verify
from fluxlib.config import REPO_ROOT

KNOWN = {claim.slug: claim for claim in EVERY}
STORED = REPO_ROOT / "data" / "results" / "full" / "measurements"


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fluxlib", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def copy_tables(folder: Path) -> None:
    (folder / "measurements").mkdir(parents=True)
    for file in STORED.glob("01_profiling-*.parquet"):
        shutil.copy(file, folder / "measurements")


def test_a_claim_is_reproduced_where_the_verdict_agrees_and_the_exit_code_says_so(call, tmp_path):
    copy_tables(tmp_path)
    code, out, _ = call("four_bit", "--out", tmp_path)
    assert code == 0 and "paper        11.01 %" in out and "verdict      agrees\n" in out
    assert out.splitlines()[-1].startswith("reproduced, in ") and out.endswith(f", from {tmp_path}\n")
    code, out, _ = call("stale_error", "--out", tmp_path, "--json")
    answer = json.loads(out)
    assert code == 1 and not answer["reproduced"] and answer["verdict"] == "does not" and answer["seconds"] > 0
    code, out, _ = call("weights", "--out", tmp_path)
    assert code == 1 and "not attempted" in out and out.splitlines()[-1].startswith("not reproduced, in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: claim is 'nothing', allowed are speed_up, ahead_of_fmd, "),
        (["four_bit", "--rerun", "--out", "."], "error: --out is a folder of stored tables; --rerun makes its own"),
        (["four_bit", "--profile", "nope"], "error: there are no results in "),
        (["four_bit", "--profile", "nope", "--rerun"], "error: no profile 'nope' in "),
        (
            ["participants", "--rerun"],
            "error: profile 'full' has no runs for participants; run FLUX and FMD with 10, 20",
        ),
    ],
)
def test_what_cannot_be_computed_is_one_message(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith(message)


def test_a_rerun_begins_anew_once_the_last_one_is_done(call, monkeypatch, tmp_path):
    shutil.copytree(REPO_ROOT / "config", tmp_path / "config")
    monkeypatch.setattr(verify, "REPO_ROOT", tmp_path)
    there = []

    def make(profile: str, files: list[str], folder: Path, jobs: int) -> None:
        there.append(folder.is_dir())
        assert files == [
            f"data/results/full/measurements/01_profiling-mini-{name}-moe.parquet" for name in ("llama", "deepseek")
        ]
        copy_tables(folder / "data" / "results" / "full")

    monkeypatch.setattr(verify, "make", make)
    for _ in range(2):
        code, out, _ = call("four_bit", "--rerun")
        assert code == 0 and "stored       agrees\n" in out
        assert out.endswith(f", from {tmp_path / 'build/verify/full-four_bit/data/results/full'}\n")
    assert there == [False, False]

    def fail(*_: object) -> None:
        raise RuntimeError("not all of it could be made")

    monkeypatch.setattr(verify, "make", fail)
    assert call("four_bit", "--rerun") == (1, "", "error: not all of it could be made\n")


def test_a_claim_on_runs_needs_those_of_its_methods_only():
    full = pipeline.load(REPO_ROOT / "config" / "full.yaml")

    def methods(slug: str) -> set[str]:
        files = verify.tables_needed(KNOWN[slug], full)
        assert all(Path(file).stem in full.runs and not full.runs[Path(file).stem].variant for file in files)
        return {full.runs[Path(file).stem].method for file in files}

    assert methods("ahead_of_fmes") == {"flux", "fmd", "fmes"} and methods("fmq_oscillates") == {"flux", "fmd", "fmq"}
    assert methods("quality") == {"flux", "fmd"}
    assert methods("quality_dolly") == methods("absolute_targets") == methods("participants") == set()
