"""Adapters through the federation: B's travel, are kept and refused as experts are, and both sides form one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from flwr.app import RecordDict

from fluxlib import federation, models
from fluxlib.config import RunConfig
from fluxlib.federation import LocalGrid, RunFailed
from fluxlib.federation.client import client_app
from fluxlib.federation.client.local_copy import LocalCopy, Workspace
from fluxlib.federation.engines.deployment import engine
from fluxlib.federation.protocol import wire
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.results import Output
from fluxlib.federation.server.rounds import serve
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter

Make = Callable[..., RunConfig]

RANK = 2
ADAPTER = Adapter(RANK, 4.0, 0)
LORA = {"adapter.kind": "lora", "adapter.rank": RANK, "adapter.alpha": 4.0}
SMALL = {"training.local_steps": 2, "training.batch_size": 2, "federation.rounds": 2}
FULL_BYTES, LOW_BYTES = 4 * (8 * 8 + 8 * 4), 4 * RANK * (8 + 8)  # gate_up_proj [8, 8] and down_proj [8, 4]


def changes(store: ExpertStore, *keys: tuple[int, int], seed: int = 0) -> dict[Any, dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    return {key: {n: torch.randn(s, generator=chance) for n, s in store.shapes[key].items()} for key in keys}


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", get_args(wire.Form))
def test_deltas_of_bs_lead_to_the_servers_model(tiny: Any, kind: wire.Form) -> None:
    store = ExpertStore(tiny.build_model(), kind, ADAPTER)
    space = Workspace(tiny.build_model(), None, kind, ADAPTER)
    held = LocalCopy.load(RecordDict(), space.base_digest)
    total: dict[Any, dict[str, torch.Tensor]] = {}
    for seed, keys in enumerate([[(0, 0), (1, 1)], [(0, 0)]]):
        given = changes(store, *keys, seed=seed)
        for key, tensors in given.items():
            total[key] = {name: total[key][name] + t if key in total else t for name, t in tensors.items()}
        store.apply(given)
        delta = store.delta(held.version)
        assert delta.num_experts == len(keys)
        held = held.updated(delta, space.base)
    space.load(held)
    assert held.version.digest == store.digest
    anew = store.delta()  # of a participant of whom nothing is known: what differs from the base
    assert anew.num_experts == 2 and held.updated(anew, space.base).version == held.version
    if kind == "float32":
        assert same(space.model, store.model) and anew.num_bytes == 2 * LOW_BYTES
        base, layer = find.expert_tensors(find.layers(tiny.build_model())[0].experts, 0), find.Layout(("down_proj",))
        fixed = ADAPTER.fixed((0, 0), base, layer)
        for name, tensor in store.tensors((0, 0)).items():
            assert torch.equal(tensor, base[name] + total[0, 0][name] @ fixed[name])
    space.load(LocalCopy.load(RecordDict(), space.base_digest))
    assert same(space.model, tiny.build_model())


def test_a_saved_state_of_bs_is_put_back(tiny: Any) -> None:
    store = ExpertStore(tiny.build_model(), "float32", ADAPTER)
    for seed in range(2):
        store.apply(changes(store, (0, 1), seed=seed))
    again = ExpertStore(tiny.build_model(), "float32", ADAPTER)
    again.set({(0, 1): store.learned((0, 1))}, {(0, 1): store.history[0, 1]}, store.digest_of_version)
    assert same(again.model, store.model) and again.digest == store.digest
    with pytest.raises(wire.WireError, match="damaged"):
        ExpertStore(tiny.build_model(), "float32", Adapter(RANK, 4.0, 0)).set(
            {(0, 1): {name: 2 * t for name, t in store.learned((0, 1)).items()}}, {}, store.digest_of_version
        )


@pytest.mark.parametrize("method", ["flux", "flux_plus", "fmd", "fmq", "fmes"])
def test_every_method_runs_with_adapters_and_sends_less(make_config: Make, method: str) -> None:
    config = make_config({"method": method} | SMALL | LORA)
    first, again, full = (federation.run(c) for c in (config, config, make_config({"method": method} | SMALL)))
    assert (first.participants["rejected"] == "").all()
    assert same(first.model, again.model) and not same(first.model, full.model)
    assert (first.participants["uplink_bytes"] % LOW_BYTES == 0).all()
    if method == "fmd":  # the same experts get tokens in the first round
        of_first = [run.participants.query("round == 1")["uplink_bytes"].sum() for run in (first, full)]
        assert of_first[0] * FULL_BYTES == of_first[1] * LOW_BYTES > 0


def test_a_killed_run_ends_as_an_uninterrupted_one(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"method": "flux_plus", "federation.rounds": 3} | LORA)

    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        federation.run(config, on_round=kill, out=tmp_path)
    resumed, whole = federation.run(config, out=tmp_path), federation.run(config)
    kept = [name for name in whole.rounds if not name.endswith("wall_s") and name != "peak_memory_bytes"]
    pd.testing.assert_frame_equal(resumed.rounds[kept], whole.rounds[kept], check_exact=True)
    assert same(resumed.model, whole.model)


def test_a_reply_with_whole_experts_is_refused(make_config: Make) -> None:
    with pytest.raises(RunFailed, match=r"refused: 3 wrong_shape.*must be \(8, 2\), got \(8, [48]\)"):
        federation.run(make_config(LORA))


def test_what_is_kept_and_what_is_exported_is_the_tuned_model(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"method": "fmd"} | SMALL | LORA)
    grid = LocalGrid(client_app.app, config.federation.participants)
    result = serve(grid, config, Output(tmp_path / "out", keep_experts=True))
    assert same(engine._read(config, tmp_path / "out", keep=True).model, result.model)
    models.export(result.model, tmp_path / "model", models.load(config.model)[1])
    assert same(models.load(str(tmp_path / "model"))[0], result.model)
