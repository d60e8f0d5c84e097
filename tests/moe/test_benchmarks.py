"""The benchmarks run, in tiny, and write what they promise."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import scores
import torch

from fluxlib.moe.quantized import QuantizedExperts

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(QuantizedExperts, "at_once", 1)  # more is half a megabyte at most: much for this model
    main = runpy.run_path(str(FOLDER / "experts.py"))["main"]
    main(["--quick", "--repeats", "2", "--backends", "grouped_mm", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "experts.json").read_text())
    assert result["machine"]["host"]
    assert [row["what"] for row in result["step"]] == [
        "compact",
        "full, grouped_mm",
        "full, grouped_mm, linears too",
    ]
    share = next(row for row in result["verdict"] if "memory" in row["number"])
    assert share["measured"] == 2 / 8
    compared = {row["what"]: row["ratio"] for row in result["memory"] if "ratio" in row}
    assert list(compared) == ["flux", "4-bit profile of flux", "fmes", "fmq"]
    assert all(0.85 < ratio < 1.15 for ratio in compared.values()), compared  # of a few hundred kB
    assert "## Numbers to reach" in (tmp_path / "experts.md").read_text()


def test_every_method_at_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    main = runpy.run_path(str(FOLDER / "gpu.py"))["main"]
    main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--optimizer", "sgd", "--checkpointing"])
    result = json.loads((tmp_path / "gpu.json").read_text())
    for model in result["models"].values():
        rows = {row["method"]: row for row in model["steps"]}
        assert len(rows) == 7 and all(row["result"] == "measured" for row in rows.values())
        assert rows["fmd"]["to_device_bytes_per_step"] > rows["fmd"]["to_host_bytes_per_step"] > 0
        assert rows["flux"]["to_device_bytes_per_step"] == 0
        assert 4 < model["profile"]["bits_per_value"] < 4.5
    adapters = ["--rank", "4", "--models", "tiny-llama-moe"]
    result = main(["--quick", "--device", "cpu", "--out", str(tmp_path), *adapters])
    rows = {row["method"]: row for row in result["models"]["tiny-llama-moe"]["steps"]}
    assert len(rows) == 6 and all(row["result"] == "measured" for row in rows.values())
    assert rows["fmd"]["to_device_bytes_per_step"] > 0 == rows["fmd"]["to_host_bytes_per_step"]
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--rank", "4", "--methods", "full", "fmd"])
    assert (
        "full have no adapters; allowed are flux, flux_plus, fmd, fmd_on_demand, fmq, fmes" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--models", "gpt-5"])
    assert "expected among ['llama-moe-3.5b', 'deepseek-moe-16b'], got ['gpt-5']" in capsys.readouterr().err


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    main = runpy.run_path(str(FOLDER / "loading.py"))["main"]
    main(["--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "loading.json").read_text())["loading"]
    assert [row["files"] for row in rows] == ["safetensors", "bin"]
    assert rows[0]["model_bytes"] == rows[1]["model_bytes"] > 0
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    privacy = runpy.run_path(str(FOLDER / "privacy.py"))
    truth = torch.tensor([True, False, True, False])
    assert privacy["auc"](torch.tensor([3.0, 1.0, 2.0, 2.0]), truth) == (1 + 1 + 1 + 0.5) / 4
    labels = torch.eye(3)[:, [0, 1, 2, 2]] + 0.1
    mixed = 0.7 * labels[0] + 0.3 * labels[2]
    assert privacy["shares"](labels, mixed).tolist() == pytest.approx([0.7, 0.0, 0.3], abs=1e-6)
    rows = [{"setting": "s", "method": "m", "question": "row", "seen": "x", "value": v} for v in (0.5, 1)]
    assert privacy["wide"](rows, "row") == [{"setting": "s", "method": "m", "x": "0.75 [0.50, 1.00] 2"}]


def test_the_page_on_security_shows_what_was_measured() -> None:
    page = (FOLDER.parent / "docs" / "security.md").read_text()
    measured = (FOLDER / "results" / "privacy.md").read_text()
    assert [line for line in measured.splitlines() if line.startswith("|") and line not in page] == []


def test_samples_that_ask_the_same_are_one_draw() -> None:
    apart, same = (scores.errors(prompts, [1.0, 1.0, 0.0, 0.0]) for prompts in ("abcd", "aabb"))
    assert apart == pytest.approx(((0.25 / 4) ** 0.5, 0.0)) and same == pytest.approx(((0.25 / 2) ** 0.5, 0.0))
    _, of_options = scores.errors("aaaab", [1.0, 1.0, 0.0, 0.0, 0.0])
    assert of_options == pytest.approx((4 / 3) ** 0.5 / 5), "two of four right have a variance of 1/3"
