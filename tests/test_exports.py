"""What leaves a run: the tuned model, what adapters learned, and finding runs again."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from fluxlib import models, records
from fluxlib.analysis import store
from fluxlib.app import exports
from fluxlib.config import make_config
from fluxlib.federation import RunResult
from fluxlib.io import ConfigError
from fluxlib.moe import find

DEFAULTS = {"string": "x", "int64": 1, "float64": 0.5}


def rounds(run_id: str = "flux-m-t-seed0", metrics: tuple[float, ...] = (0.25, 0.5)) -> pd.DataFrame:
    table = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.TABLES["rounds"]})
    index = list(range(len(metrics)))
    return table.assign(run_id=run_id, round=index, metric=metrics, metric_name="accuracy", device_s=index)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base model as if it had been tuned: what a run leaves, without the run."""
    config = make_config(
        {
            "task": "mini-mmlu",
            "federation.participants": 2,
            "data.task_size": 200,
            "budget.tune_frac": 0.125,
            "merging.budgets": "joint",
            "seed": 3,
        }
    )
    folder = tmp_path_factory.mktemp("exports") / "tuned"
    model, _ = models.load(config.model)
    table = rounds()
    return exports.save_tuned(RunResult(config.run_id, table, table, None, model), config, folder), config


def test_the_tuned_model_is_one_that_can_be_loaded_and_its_card_tells_where_it_is_from(tuned):
    folder, config = tuned
    loaded, _ = models.load(folder)
    base, _ = models.load(config.model)
    for (name, found), (_, expected) in zip(loaded.state_dict().items(), base.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    card = (folder / "README.md").read_text()
    assert "| accuracy, test split | 0.250 | 0.500 |" in card and "| `budget.tune_frac` | `0.125` |" in card
    assert json.loads((folder / "run.json").read_text())["config"] == config.model_dump(mode="json")
    table = rounds()
    with pytest.raises(ConfigError, match="holds model weights already"):
        exports.save_tuned(RunResult(config.run_id, table, table, None, base), config, folder)


def test_an_adapter_that_is_none_is_refused(tuned, tmp_path, monkeypatch):
    folder, config = tuned
    with pytest.raises(ConfigError, match=r"adapter\.kind 'none', allowed is 'lora'"):
        exports.save_adapter(folder, tmp_path / "a")
    model, tokenizer = models.load(folder)
    find.layers(model)[1].experts.down_proj.data[3].mul_(1.01)
    models.export(model, tmp_path / "whole", tokenizer)
    lora = config.updated({"adapter.kind": "lora", "adapter.rank": 2})
    (tmp_path / "whole" / exports.RUN).write_text(json.dumps({"config": lora.model_dump(mode="json")}))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.down_proj is not that of mini-llama-moe with a"):
        exports.save_adapter(tmp_path / "whole", tmp_path / "a")
    layout = find.read_layout(find.layers(model)[0].experts)
    monkeypatch.setattr(exports.find, "read_layout", lambda _: replace(layout, is_transposed=True))
    with pytest.raises(ConfigError, match=r"Experts does not say that its stacks are \[in, out\]"):
        exports.save_adapter(tmp_path / "whole", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}'])
def test_broken_settings_are_no_traceback(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="does not hold the settings of a run"):
        exports.save_adapter(tmp_path, tmp_path / "b")


def test_settings_without_a_model_are_no_traceback(tmp_path):
    lora = make_config({"adapter.kind": "lora"})
    (tmp_path / "run.json").write_text(json.dumps({"config": lora.model_dump(mode="json")}))
    with pytest.raises(ConfigError, match="holds no model that can be loaded"):
        exports.save_adapter(tmp_path, tmp_path / "b")


def test_a_run_is_found_by_what_a_person_would_type(tmp_path):
    for place, run_id in (("a", "flux-m-t-seed0"), ("a", "fmd-m-t-seed0"), ("b", "flux-m-t-seed0")):
        records.write("rounds", rounds(run_id), tmp_path / place / "rounds" / f"{run_id}.parquet", {})
    places = [tmp_path / "a", tmp_path / "b"]
    assert store.find("fmd", places).stem == "fmd-m-t-seed0"
    assert store.find(str(tmp_path / "b"), places).parent.parent.name == "b"
    assert store.find("seed0  (b)", places).parent.parent.name == "b"
    file = tmp_path / "b" / "rounds" / "flux-m-t-seed0.parquet"
    assert list(store.load(["flux-m-t-seed0  (a)", str(file)], places)) == ["flux-m-t-seed0 (a)", "flux-m-t-seed0 (b)"]
    with pytest.raises(ConfigError, match="'flux' means 2 runs"):
        store.find("flux", places)
    with pytest.raises(ConfigError, match="'fmq' is no run; .*Nearest to it:"):
        store.find("fmq", places)
    with pytest.raises(ConfigError, match="is named twice"):
        store.load(["fmd", "fmd"], places)
