"""On a GPU as on the CPU: every path that a run takes there. The CPU's own cases hold the tests themselves."""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

from fluxlib import federation, models
from fluxlib.config import REPO_ROOT, make_config
from fluxlib.federation import RunResult
from fluxlib.moe import find
from fluxlib.moe.quantized import QuantizedExperts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = {
    "task": "mini-mmlu", "federation.rounds": 1, "federation.participants": 2, "data.task_size": 64,
    "training.local_steps": 1, "training.batch_size": 4, "evaluation.samples": 16,
}  # fmt: skip
RUNS: dict[str, dict[str, object]] = {
    "flux": {"method": "flux"},
    "flux_plus": {"method": "flux_plus"},
    "fmd": {"method": "fmd"},
    "fmq": {"method": "fmq"},
    "fmes": {"method": "fmes"},
    "lora": {"method": "flux_plus", "adapter.kind": "lora"},
    "16 bits": {"method": "flux", "torch_dtype": "bfloat16", "roles.explore_by": "backward"},
    "micro-batches": {"method": "fmd", "training.micro_batch": 2, "training.checkpointing": True},
}


@cache
def run(name: str, device: str) -> RunResult:
    return federation.run(make_config({**SMALL, **RUNS[name], "torch_device": device}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_the_same(name: str, device: str) -> None:
    found, expected = run(name, device).rounds, run(name, "cpu").rounds
    close = {"rel": 0.05} if name in ("16 bits", "fmq") else {"rel": 1e-3}
    assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), **close)
    assert found["uplink_bytes"].tolist() == pytest.approx(expected["uplink_bytes"].tolist(), rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_four_bits_read_back_the_same(device: str) -> None:
    experts = find.layers(models.load("mini-llama-moe")[0])[0].experts
    here = QuantizedExperts(experts, bits=4)
    there = QuantizedExperts(experts.to(device), bits=4)
    for name, tensor in here.expert_tensors(3).items():
        torch.testing.assert_close(there.expert_tensors(3)[name].cpu(), tensor, rtol=0, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("rank", ["0", "4"])
def test_the_benchmark_measures_every_method(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO_ROOT / "benchmarks"))
    main = runpy.run_path(str(REPO_ROOT / "benchmarks" / "gpu.py"))["main"]
    main(["--quick", "--rank", rank, "--out", str(tmp_path)])
    for model in json.loads((tmp_path / "gpu.json").read_text())["models"].values():
        assert {row["result"] for row in model["steps"]} == {"measured"}
