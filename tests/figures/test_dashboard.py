from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fluxlib import records
from fluxlib.figures import dashboard, profiling
from fluxlib.moe.compact import LayerPlan

DEFAULTS, ZEROS = {"string": "x", "int64": 1, "float64": 0.5}, {"string": "", "int64": 0, "float64": 0.0}
PLAN = LayerPlan(tuned=(2, 5), groups=((0, 1, 7), (3,), (4, 6)))


def run(metrics: list[float], step_s: float) -> pd.DataFrame:
    rows = pd.DataFrame({c.name: [DEFAULTS[c.dtype]] * len(metrics) for c in records.TABLES["rounds"]})
    index = np.arange(len(metrics))
    return rows.assign(round=index, metric=metrics, device_s=step_s * index, wall_s=index, metric_name="accuracy")


def test_a_box_is_a_slot_and_every_expert_has_its_number():
    ax = dashboard.slots([PLAN]).axes[0]
    assert [patch.get_width() for patch in ax.patches] == [1, 1, 3, 1, 2]
    assert [text.get_text() for text in ax.texts] == ["2", "5", "0", "1", "7", "3", "4", "6"]
    assert ax.get_title(loc="left") == "8 experts in 5 slots: a box is a slot"
    dropped = dashboard.slots([LayerPlan(tuned=(0,), dropped=(1, 2))]).axes[0]
    assert "dropped" in [text.get_text() for text in dropped.get_legend().get_texts()]


@pytest.mark.parametrize(("limit_gib", "lines"), [(1.5, 1), (48.0, 0)])
def test_a_device_is_drawn_only_where_it_is_of_the_plans_size(limit_gib, lines):
    memory = {"flux": {"activations": 0.5, "other weights": 0.25}, "fmd": {"activations": 1.0}}
    seconds = {"flux": {"train": 1.0}, "fmd": {"train": 2.0, "upload": 1.0}}
    figure = dashboard.overview(
        np.full((1, 8), 0.125), [PLAN], np.zeros((1, 8)), memory, limit_gib, seconds, ["a note"]
    )
    space = next(ax for ax in figure.axes if "GiB" in ax.get_title(loc="left"))
    assert len(space.lines) == lines
    assert [text.get_text() for text in space.texts] == ["0.75", "1"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_curves_have_a_line_per_run_and_one_for_the_target():
    figure = dashboard.curves({"a": run([0.0, 1.0], 1.0), "b": run([0.0, 0.5], 2.0)}, 0.9)
    assert [len(ax.lines) for ax in figure.axes] == [3, 3]


def test_pictures_of_a_model_and_a_partition() -> None:
    frequency = np.full((3, 4), 0.25)
    assert "0.250" in profiling.activation(frequency).get_supxlabel()
    bars = profiling.activation_by_label({"a": frequency, "b": frequency}, layer=1)
    assert [text.get_text() for text in bars.axes[0].get_legend().get_texts()] == ["a", "b"]
    assert len(bars.axes[0].patches) == 8
    stacks = dashboard.partition([{"a": 2, "b": 1}, {"b": 3}])
    assert [patch.get_height() for patch in stacks.axes[0].patches] == [2, 0, 1, 3]


def test_the_phases_of_a_round_are_those_of_its_slowest_participant() -> None:
    rows = pd.DataFrame({c.name: [ZEROS[c.dtype]] * 3 for c in records.TABLES["participants"]})
    rows = rows.assign(
        round=1, participant=[0, 1, 2], rejected=["", "", "late"], train_device_s=[1.0, 2.0, 9.0], upload_device_s=0.5
    )
    figure = dashboard.phases(rows)
    assert [patch.get_height() for patch in figure.axes[0].patches] == [2.0, 0.5]
