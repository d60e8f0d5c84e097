"""The real methods through the whole federation, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation.client import node_state
from fluxlib.federation.engines.grid import LocalGrid

SMALL = {
    "training.local_steps": 2,
    "training.batch_size": 2,
    "federation.rounds": 2,
    "budget.tune_frac": 0.5,
    "budget.merge_frac": 0.25,
}


@pytest.mark.parametrize(
    ("method", "tuned", "explored"),
    [
        ("flux", [1, 1, 1, 3, 3, 3], [3, 3, 3, 1, 1, 1]),
        ("fmd", [8] * 6, [0] * 6),
        ("fmq", [8] * 6, [0] * 6),
        ("fmes", [4] * 6, [4] * 6),
    ],
)
def test_every_method_runs_and_nothing_is_refused(
    make_config: Callable[..., RunConfig], method: str, tuned: list[int], explored: list[int]
) -> None:
    config = make_config({"method": method} | SMALL)
    first, again = federation.run(config), federation.run(config)
    assert (first.participants["rejected"] == "").all()
    assert first.participants["num_tuned"].tolist() == tuned  # epsilon 0.3, then 0.8, of a budget of 4
    assert first.participants["num_explored"].tolist() == explored
    assert (first.rounds["round_device_s"].iloc[1:] > 0).all()
    assert first.rounds["epsilon"].iloc[1:].isna().all() == (method != "flux")
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_flux_keeps_a_profile_that_is_one_round_old(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[LocalGrid] = []
    made = LocalGrid.__init__

    def remember(self: LocalGrid, *args: object, **named: object) -> None:
        made(self, *args, **named)  # type: ignore[arg-type]
        grids.append(self)

    monkeypatch.setattr(LocalGrid, "__init__", remember)
    federation.run(make_config({"method": "flux"} | SMALL))
    for node in grids[0].get_node_ids():
        kept = node_state.load_state(grids[0].context(node).state)
        assert kept.profile is not None and kept.profile_round == 2
