"""Experts merged by the server: the same update as one's own merging, what is stale, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message

from fluxlib import federation, methods, profiling, seeding
from fluxlib.config import ConfigError, RunConfig
from fluxlib.config import make_config as checked_config
from fluxlib.federation import LocalGrid
from fluxlib.federation.client.held import Held, ResyncNeeded, Workspace
from fluxlib.federation.protocol import premerged
from fluxlib.federation.protocol.messages import Instruction, ProfileReport
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.protocol.wire import WireError, make_record
from fluxlib.methods.base import Budget, LocalData, ParticipantState, Roles, Work

Make = Callable[..., RunConfig]
FLUX = methods.get("flux")
EXPLOIT = torch.tensor([[True, False, False, False], [False, False, True, False]])
EXPLORE = torch.tensor([[False, False, False, False], [False, False, False, True]])


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def data() -> LocalData:
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return LocalData([batch, batch], [batch])


@pytest.fixture
def changed(tiny: Any) -> ExpertStore:
    store = ExpertStore(tiny.build_model(), withholds=True)
    store.apply({key: {n: 0.1 * t for n, t in store.tensors(key).items()} for key in store.keys if key != (0, 3)})
    return store


def train(model: Any, known: profiling.Profile, roles: Roles, data: LocalData, config: RunConfig) -> Any:
    chance = seeding.generator(0, "train")
    return FLUX.train(model, ParticipantState(known, 1), roles, Budget(2, 3), data, config, 2, chance)[0]


@pytest.mark.parametrize("align", [False, True])
def test_the_same_update_as_from_merging_oneself(
    tiny: Any, changed: ExpertStore, data: LocalData, make_config: Make, align: bool
) -> None:
    config = make_config({"method": "flux", "wire.merged": "server", "merging.align_neurons": align})
    full, compact = tiny.build_model(), Workspace(tiny.build_model(), None)
    full.load_state_dict(changed.model.state_dict())
    known = profiling.profile(tiny.build_model(), data.profile)
    report = ProfileReport(0, 2, 0, "", known.frequency, Work(8), importance=premerged.importance(known, config))
    seen = premerged.profile_of(ProfileReport.from_records(report.to_records()), changed.model)
    roles, base = Roles(EXPLOIT, EXPLORE), Held(0, compact.base_digest)
    plans = FLUX.plan(changed.model, seen, roles, Budget(2, 3), config)
    delta = changed.delta(0, base.digest, merged=frozenset(changed.keys) - {(0, 0), (1, 2), (1, 3)})
    assert delta.num_experts == 3 and delta.stale == {(0, 1), (0, 2), (1, 0), (1, 1)}
    sent = Instruction(
        config.model_dump_json(), 2, 0, "float32", delta, roles, Budget(2, 3), None,
        premerged.merge_stale(changed, plans, delta.stale),
    )  # fmt: skip
    got = Instruction.from_records(sent.to_records())
    held = base.updated(got.delta, compact.base)
    compact.load(held)
    assert not same_weights(compact.model, full) and held.approximate() == delta.stale
    merged = got.merged.decode(compact.model, "float32", held.stale)
    assert [plan.groups for plan in merged.plans] == [plan.groups for plan in plans]
    one, other = (
        train(full, known, roles, data, config),
        train(compact.model, known, replace(roles, merged=merged), data, config),
    )
    assert one.loss == other.loss and one.deltas.keys() == other.deltas.keys()
    for key, tensors in one.deltas.items():
        assert all(torch.equal(tensor, other.deltas[key][name]) for name, tensor in tensors.items())
    assert torch.equal(one.utilities.nan_to_num(-1), other.utilities.nan_to_num(-1))
    assert (one.work.num_server_merged, other.work.num_merge_sources) == (0, 0) and one.work.num_merge_sources > 0
    pairs = list(zip(plans, merged.slots, strict=True))
    assert other.work.num_server_merged == sum(len(p.groups[s]) + 1 for p, m in pairs for s in m)


def test_a_slot_that_is_missing_is_noticed(changed: ExpertStore, data: LocalData, make_config: Make) -> None:
    known = profiling.profile(changed.model, data.profile)
    plans = FLUX.plan(changed.model, known, Roles(EXPLOIT, EXPLORE), Budget(2, 2), make_config({"method": "flux"}))
    sent = premerged.merge_stale(changed, plans, frozenset({(0, 1), (0, 2)}))
    assert sent.num_slots == 1 and sent.num_bytes == 4 * 3 * 8 * 4
    with pytest.raises(WireError, match="layer 0: merged slot 0 did not come"):
        replace(sent, arrays=make_record({})).decode(changed.model, "float32", frozenset({(0, 1)}))
    assert premerged.alone_stale(plans, frozenset({(0, 1), (0, 2), (1, 0)})) == {(1, 0)}


def test_an_old_copy_stays_until_the_expert_is_needed(tiny: Any, changed: ExpertStore) -> None:
    space, every = Workspace(tiny.build_model(), None), frozenset(changed.keys)
    first = changed.delta(0, space.base_digest, merged=every)
    held = Held(0, space.base_digest).updated(first, space.base)
    assert (first.num_experts, first.num_bytes) == (0, 0) and held.stale == every - {(0, 3)}
    space.load(held)
    assert same_weights(space.model, tiny.build_model())
    some = changed.delta(held.version, held.digest, held.approximate(), every - {(1, 1)})
    held = held.updated(some, space.base)
    assert some.num_experts == 1 and held.stale == every - {(0, 3), (1, 1)}
    old = ExpertStore(tiny.build_model(), withholds=True)
    with pytest.raises(ResyncNeeded):  # one that never got (1, 1)
        Held(1, first.digest, stale=first.stale).updated(replace(some, arrays=make_record({})), space.base)
    last = changed.delta(held.version, held.digest, held.approximate())
    held = held.updated(last, space.base)
    space.load(held)
    assert not held.stale and held.digest == changed.digest != old.digest and same_weights(space.model, changed.model)


def test_two_rounds_give_the_same_model_and_later_ones_fewer_bytes(make_config: Make) -> None:
    few = {"method": "flux", "budget.tune_frac": 0.25, "roles.epsilon": 1.0, "federation.participants": 4}
    one, other = (
        federation.run(make_config({"federation.rounds": 2, "wire.merged": kind} | few)) for kind in ("exact", "server")
    )
    assert same_weights(one.model, other.model)  # the second round's profile is of the base model in both
    assert other.rounds["downlink_bytes"].sum() < one.rounds["downlink_bytes"].sum()
    assert (other.participants["rejected"] == "").all()
    assert other.rounds["uplink_bytes"].iloc[1] == one.rounds["uplink_bytes"].iloc[1] + 4 * 2 * 4 * 4
    assert other.participants["merge_device_s"].sum() < one.participants["merge_device_s"].sum()
    assert other.rounds["server_device_s"].iloc[2] > one.rounds["server_device_s"].iloc[2]


def test_who_sends_no_good_profile_gets_all_experts(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(known: profiling.Profile, config: RunConfig) -> dict[str, torch.Tensor]:
        return {"attention": -known.attention}

    monkeypatch.setattr(premerged, "importance", broken)
    result = federation.run(make_config({"method": "flux", "wire.merged": "server"}))
    assert (result.participants["rejected"] == "").all() and (result.participants["merge_device_s"] > 0).all()
    assert result.rounds["downlink_bytes"].sum() > 0


def test_only_the_tables_that_a_plan_needs_leave_and_by_default_none(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Message, Message]] = []
    deliver = LocalGrid._deliver

    def watch(grid: LocalGrid, message: Message, timeout: float | None) -> Message | None:
        reply = deliver(grid, message, timeout)
        sent.append((message, reply))
        return reply

    monkeypatch.setattr(LocalGrid, "_deliver", watch)
    for kind, asked in (("exact", 3), ("server", 9)):
        sent.clear()
        federation.run(make_config({"method": "flux", "wire.merged": kind}))
        profiles = [reply.content for _, reply in sent if "frequency" in reply.content["config"]]
        assert len(profiles) == asked
        for content in profiles:
            assert set(content.get("arrays", {})) == ({"attention"} if kind == "server" else set())
        for message, _ in sent:
            more = {"plans", "stale"} & set(message.content["config"]) | {"merged"} & set(message.content)
            assert kind == "server" or not more


@pytest.mark.parametrize("method", ["fmd", "fmq", "fmes"])
def test_methods_that_merge_nothing_are_refused(make_config: Make, method: str) -> None:
    with pytest.raises(ConfigError, match=f"method is '{method}', allowed with merged_downlink 'server' is flux"):
        federation.run(make_config({"method": method, "wire.merged": "server"}))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="stale_profile is False"):
        checked_config({"wire.merged": "server", "profiling.stale": False})
    with pytest.raises(ConfigError, match="withhold_reports is True"):
        checked_config({"wire.merged": "server", "privacy.withhold_reports": True, "roles.assignment": "random"})
