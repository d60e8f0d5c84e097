"""Whole runs on the in-process engine, with a method that changes experts without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fluxlib import federation, records
from fluxlib.config import ConfigError, RunConfig

CLOCKS = ("wall_s", "round_wall_s", "evaluate_wall_s", "peak_memory_bytes")

Make = Callable[..., RunConfig]


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Equal but for what a clock on the wall or the operating system says."""
    drop = [name for name in first.columns if name in CLOCKS or name.endswith("_wall_s")]
    pd.testing.assert_frame_equal(first.drop(columns=drop), second.drop(columns=drop), check_exact=True)


def test_a_run_gives_one_row_per_round_and_writes_both_tables(make_config: Make, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = federation.run(make_config(), on_round=rows.append, out=tmp_path)
    assert result.rounds["round"].tolist() == [0, 1, 2, 3]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert result.participants.groupby("round").size().tolist() == [3, 3, 3]
    for name, path in result.files.items():
        pd.testing.assert_frame_equal(records.read(name, path), getattr(result, name), check_dtype=False)
    assert not (tmp_path / "checkpoints").exists()
