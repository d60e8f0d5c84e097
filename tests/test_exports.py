"""What leaves a run: the tuned model, a participant's compact one, and finding runs again."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from fluxlib import models, records
from fluxlib.analysis import store, text_profile
from fluxlib.app import exports
from fluxlib.config import make_config
from fluxlib.federation import RunResult
from fluxlib.io import ConfigError
from fluxlib.models.deepseek_moe import DeepseekMoeConfig
from fluxlib.models.llama_moe import LlamaMoeConfig
from fluxlib.moe import find
from fluxlib.moe.compact import LayerPlan, customize

DEFAULTS = {"string": "x", "int64": 1, "float64": 0.5}
PLAN = LayerPlan(tuned=(0, 3), groups=((1, 2), (4, 5, 6), (7,)), weights=((0.2, 0.8), (1.0, 1.0, 2.0), (0.0,)))


def tiny(kind: str):
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        config = LlamaMoeConfig(**common, intermediate_size=64, num_experts=8, num_selects=2)
        model = models.LlamaMoeForCausalLM(config)
    else:
        config = DeepseekMoeConfig(
            **common, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, intermediate_size=32
        )
        model = models.DeepseekMoeForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_a_compact_model_comes_back_as_it_was(kind, tmp_path):
    model = tiny(kind)
    _, tokenizer = models.load("mini-llama-moe")
    customize(model, [PLAN] * len(find.layers(model)))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        models.save_compact(model, tmp_path / "a", tokenizer)
        loaded, _ = models.load_compact(tmp_path / "a")
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match=r"holds compact\.safetensors already"):
        models.save_compact(model, tmp_path / "a")


def test_what_is_no_compact_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="is not customised"):
        models.save_compact(tiny("llama"), tmp_path / "a")
    with pytest.raises(OSError, match=r"has no compact\.safetensors"):
        models.load_compact(tmp_path)


def rounds(run_id: str = "flux-m-t-seed0", metrics: tuple[float, ...] = (0.25, 0.5)) -> pd.DataFrame:
    table = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.ROUNDS})
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


def test_a_participants_model_is_smaller_and_measured_beside_the_full_one(tuned, tmp_path):
    folder, _ = tuned
    report = exports.save_participant(folder, tmp_path / "compact", participant=1)
    # An eighth of 96 experts alone, a quarter merged.
    assert (report.num_slots, report.num_experts) == (36, 96)
    ratios = report.table["ratio"]
    assert ratios["parameters (M)"] < 0.6 and ratios["stored, 16 bit (MB)"] < 0.6
    assert ratios["held in memory, 32 bit (MB)"] < 0.6
    held, parameters = (report.table["full"][name] for name in ("held in memory, 32 bit (MB)", "parameters (M)"))
    assert held >= 4 * parameters and (report.table.filter(like="(ms)", axis="index") > 0).all(axis=None)
    assert json.loads((tmp_path / "compact" / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    card = (tmp_path / "compact" / "README.md").read_text()
    assert "96 experts in 36 slots" in card
    for name, row in report.table.iterrows():
        assert f"| {name} | {row['full']:.3f} | {row['compact']:.3f} | {row['ratio']:.2f} |" in card
    loaded, _ = models.load_compact(tmp_path / "compact")
    assert [(len(layer.experts.plan.tuned), layer.experts.num_merged) for layer in find.layers(loaded)]


def test_an_export_merges_by_the_rules_of_its_run(tuned, tmp_path, monkeypatch):
    (folder, config), seen, plan = tuned, [], exports.merging.plan
    monkeypatch.setattr(exports.merging, "plan", lambda *given: seen.append(given[4:]) or plan(*given))
    exports.save_participant(folder, tmp_path / "compact", 0)
    assert seen == [(config.merging, 3)]


def test_an_impossible_export_is_refused(tuned, tmp_path):
    folder, _ = tuned
    with pytest.raises(ConfigError, match=r"participant is 2, allowed is 0 to 1"):
        exports.save_participant(folder, tmp_path / "b", participant=2)
    with pytest.raises(ConfigError, match=r"tune_frac is 0\.01"):
        exports.save_participant(folder, tmp_path / "b", tune_frac=0.01)
    with pytest.raises(ConfigError, match=r"has no run\.json"):
        exports.save_participant(tmp_path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


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
        exports.save_participant(tmp_path, tmp_path / "b")


def test_settings_without_a_model_are_no_traceback(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": make_config({}).model_dump(mode="json")}))
    with pytest.raises(ConfigError, match="holds no model that can be loaded"):
        exports.save_participant(tmp_path, tmp_path / "b")


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


def test_a_text_becomes_samples_of_one_length():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    batches = text_profile.batches("abcdefgh", tokenizer, num_tokens=3, max_samples=9)
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert text_profile.unknown_frac(batches, SimpleNamespace(unk_token_id=98)) == pytest.approx(1 / 6)
    assert text_profile.unknown_frac(batches, SimpleNamespace()) == 0.0
    assert text_profile.batches("ab", tokenizer, num_tokens=3, max_samples=9)[0]["input_ids"].shape == (1, 2)
    with pytest.raises(ValueError, match="holds no token"):
        text_profile.batches("", tokenizer, num_tokens=3, max_samples=9)


def test_a_profile_of_a_text_is_a_table_by_layer_and_one_by_expert():
    model = tiny("llama")
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    found = text_profile.profile(model, [batch])
    assert found.num_tokens == 12 and len(found.by_layer) == 2 and len(found.by_expert) == 16
    shares = found.by_expert.groupby("layer")["share"].sum()
    assert shares.tolist() == pytest.approx([1.0, 1.0])
    first = found.by_layer.iloc[0]
    assert first["its_share"] == pytest.approx(found.frequency[0].max().item())
    assert 1 <= first["experts_for_80%"] <= 8
