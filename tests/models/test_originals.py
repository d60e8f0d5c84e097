"""The two ports beside the models' own code: logits, loss and gradients that it computed (originals.md says how)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fluxlib import models
from fluxlib.models.checkpoints import original_tensors

STORED = Path(__file__).parent / "originals.safetensors"
with safe_open(STORED, framework="pt") as opened:
    CASES = {name: json.loads(config) for name, config in opened.metadata().items()}
    TENSORS = {key: opened.get_tensor(key) for key in list(opened.keys())}

OF_FLOAT32 = 1e-5
"""Both compute norms, rotary angles and softmax in float32, whose last bit differs between processors: all numbers
agree to 1e-12 on the one that made the file, to 2e-6 on another. Logits are about 1."""


def of(case: str, kind: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{case}/{kind}/"): t for key, t in TENSORS.items() if key.startswith(f"{case}/{kind}/")}


@pytest.mark.parametrize("case", sorted(CASES))
def test_computes_what_the_original_code_computed(tmp_path: Path, write: Callable[..., Path], case: str) -> None:
    model, _ = models.load(write(tmp_path, CASES[case], of(case, "weights")), dtype=torch.float64)
    model.set_attn_implementation("eager")  # the original's softmax over attention is in float32
    batch = {name: TENSORS[f"{case}/{name}"] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**batch)
    loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(output.logits[seen], TENSORS[f"{case}/logits"][seen], rtol=0, atol=OF_FLOAT32)
    torch.testing.assert_close(loss, TENSORS[f"{case}/loss"], rtol=0, atol=OF_FLOAT32)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)  # transformers casts to float32 before
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    found, expected = dict(original_tensors(model)), of(case, "gradients")
    assert set(found) - set(expected) == {name for name in found if "weight_noise" in name}
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name].float(), gradient, rtol=1e-4, atol=OF_FLOAT32, msg=lambda m, n=name: f"{n}: {m}"
        )
