"""The picture of what ran when: every phase is there, lanes are people, empty choices are refused."""

from __future__ import annotations

import pandas as pd
import pytest

from fluxlib.figures import timeline


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        (2, 0, "device", "train", 0.0, 2.0), (2, 0, "device", "upload", 2.0, 4.0),
        (2, 0, "device", "profile", 2.0, 5.0),
        (2, 1, "device", "train", 0.0, 1.0), (2, -1, "device", "aggregate", 4.0, 4.5),
        (3, 0, "device", "train", 5.0, 7.0), (3, -1, "wall", "evaluate", 1.0, 2.0),
    ]  # fmt: skip
    names = ["round", "participant", "clock", "phase", "start_s", "end_s"]
    return pd.DataFrame(rows, columns=names).assign(run_id="flux-x-seed0")


def test_every_row_of_the_rounds_and_clock_is_a_bar(table: pd.DataFrame) -> None:
    (ax,) = timeline(table, 2, 3).axes
    assert sum(len(bars) for bars in ax.containers) == 6
    assert [label.get_text() for label in ax.get_yticklabels()] == ["server", "0", "1"]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"train", "upload", "profile", "aggregate"}
    assert max(bar.get_x() + bar.get_width() for bars in ax.containers for bar in bars) == 7.0


def test_a_profile_and_an_upload_at_the_same_time_do_not_cover_each_other(table: pd.DataFrame) -> None:
    (ax,) = timeline(table, 2, 2).axes
    boxes = {bars.get_label(): bars[0] for bars in ax.containers}
    assert boxes["upload"].get_y() + boxes["upload"].get_height() <= boxes["profile"].get_y()


def test_nothing_to_draw_is_said(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="no 'device' rows of rounds 8 to 9"):
        timeline(table, 8, 9)
