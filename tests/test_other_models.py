"""Mixtures that others published, in tiny: a round by the command line, exported, read by plain transformers.

The table of docs/add-a-model.md says which.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_bases import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from fluxlib import models
from fluxlib.app import cli, exports
from fluxlib.config import REPO_ROOT, make_config
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.moe.adapter import Adapter

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}
OWN = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}
MOE = OWN | {"moe_intermediate_size": 16, "intermediate_size": 48}
ROUTED = MOE | {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_hidden_layers": 3}
LATENT = ROUTED | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "gpt_oss": LOCAL | {"head_dim": 8, "sliding_window": 8},
    "minimax": LOCAL | {"head_dim": 8, "layer_types": ["full_attention", "linear_attention"]},
    "olmoe": OWN,
    "flex_olmo": OWN,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE | {"head_dim": 8},
    "qwen3_next": MOE | {
        "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    },
    "ernie4_5_moe": MOE | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "glm4_moe": ROUTED | {"head_dim": 8},
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
}  # fmt: skip
NO_ATTENTION = {
    "minimax": "MiniMaxLightningAttention returns no attention weights",
    "qwen3_next": "found no attention module named one of",
}
"""With layers of linear attention, where no token receives any: FLUX and FLUX+ cannot profile them, FMD need not."""
REFUSED = {
    "llama": "LlamaForCausalLM has no MoE layer .* a dense model cannot be used",
    "jetmoe": "JetMoeMoA holds no stacks",
    "longcat_flash": "LongcatFlashExperts holds stacks .* but does not declare their layout",
}
RUN = {
    "data.task_size": 200, "profiling.batches": 1, "evaluation.samples": 8, "training.local_steps": 1,
    "training.batch_size": 4, "training.max_tokens": 64,
}  # fmt: skip


def write_config(folder: Path, model_type: str, fields: dict[str, Any]) -> Any:
    """Tokenizer and configuration of a tiny model of that family."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    known = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: value for name, value in (SIZES | fields).items() if name in known}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes)
    config.save_pretrained(folder)
    return config


def write_base(folder: Path, model_type: str) -> Any:
    """A tiny model of that family with random weights."""
    base = AutoModelForCausalLM.from_config(write_config(folder, model_type, FAMILIES[model_type])).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.1, generator=generator)
    base.save_pretrained(folder)
    return base


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, method: str = "flux") -> int:
    command = [
        "fluxlib",
        "run",
        "--method",
        method,
        "--model",
        folder,
        "--task",
        "mini-mmlu",
        "--rounds",
        1,
        "--participants",
        2,
    ]
    command += ["--out", out / "runs", "--save", out / "tuned"]
    command += [part for name, value in RUN.items() for part in ("--set", f"{name}={value}")]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_round_and_back_to_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    base = write_base(tmp_path / "base", model_type)
    tuned: list[Any] = []
    save = exports.save_tuned
    monkeypatch.setattr(exports, "save_tuned", lambda result, *rest: tuned.append(result.model) or save(result, *rest))
    ours = ("flux", "flux_plus")
    if model_type in NO_ATTENTION:
        for method in ours:
            assert run(monkeypatch, tmp_path / "base", tmp_path, method) == 1
            assert NO_ATTENTION[model_type] in capsys.readouterr().err
    for method in ("fmd",) if model_type in NO_ATTENTION else ours:
        assert run(monkeypatch, tmp_path / "base", tmp_path / method, method) == 0
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / method / "tuned", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = torch.arange(3, 23).view(2, 10)
        with torch.no_grad():
            expected, found, before = (model(ids).logits for model in (tuned.pop(), loaded.eval(), base))
        assert torch.equal(found, expected)
        assert not torch.equal(found, before), "nothing was tuned"


@pytest.mark.parametrize("name", [*FAMILIES, "mini-llama-moe", "mini-deepseek-moe"])
def test_what_adapters_learned_is_an_adapter_that_peft_loads(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    folder = name if name not in FAMILIES else str(tmp_path / "base")
    base = models.load(name)[0] if name not in FAMILIES else write_base(tmp_path / "base", name)
    config = make_config({"model": folder, "adapter.kind": "lora", "adapter.rank": 3, "adapter.alpha": 5.0, "seed": 7})
    model, tokenizer = models.load(folder)
    store = ExpertStore(model, "float32", Adapter.of(config))
    chance = torch.Generator().manual_seed(1)
    store.apply({
        key: {part: 0.1 * torch.randn(shape, generator=chance) for part, shape in store.shapes[key].items()}
        for key in store.keys if key[1] % 2
    })  # fmt: skip
    models.export(model, tmp_path / "tuned", tokenizer)
    (tmp_path / "tuned" / exports.RUN).write_text(json.dumps({"config": config.model_dump(mode="json")}))

    exports.save_adapter(tmp_path / "tuned", tmp_path / "adapter")
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        before = base(ids).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        expected = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3), "nothing was tuned"


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_refused_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    write_config(tmp_path / "base", model_type, {})
    assert run(monkeypatch, tmp_path / "base", tmp_path) == 2
    assert re.search(REFUSED[model_type], capsys.readouterr().err)


def test_the_documents_table_is_what_was_tried() -> None:
    text = (REPO_ROOT / "docs" / "add-a-model.md").read_text()
    for model_type in (*FAMILIES, *REFUSED):
        assert f"`{model_type}`" in text, model_type
