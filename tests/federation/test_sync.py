"""Versions, deltas and digests: a delta leads exactly to what a full copy would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from fluxlib.federation.client.local_copy import LocalCopy, ResyncNeeded, Workspace
from fluxlib.federation.protocol import wire
from fluxlib.federation.protocol.sync import NOTHING, Delta, ExpertStore, ModelVersion, frozen_digest
from fluxlib.moe import find

EXPERT_BYTES = 4 * (8 * 8 + 8 * 4)  # gate_up_proj [2 * 4, 8] and down_proj [8, 4] in float32


def changes(
    store: ExpertStore, *keys: tuple[int, int], seed: int = 0
) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    return {
        key: {name: torch.randn(t.shape, generator=chance) for name, t in store.tensors(key).items()} for key in keys
    }


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture
def space(tiny: Any) -> Workspace:
    return Workspace(tiny.build_model(), None)


def base(space: Workspace) -> LocalCopy:
    return LocalCopy.load(RecordDict(), space.base_digest)


def test_both_sides_name_the_base_alike(store: ExpertStore, space: Workspace) -> None:
    assert store.digest == space.base_digest
    assert store.frozen_digest == space.frozen_digest


def test_apply_adds_exactly_and_leaves_the_rest_bit_for_bit(store: ExpertStore, tiny: Any) -> None:
    before = ExpertStore(tiny.build_model())
    given = changes(store, (0, 1))
    store.apply(given)
    for key in store.keys:
        for name, tensor in store.tensors(key).items():
            old = before.tensors(key)[name]
            assert torch.equal(tensor, old + given[key][name] if key in given else old)
    assert (store.version, store.changed()) == (1, [(0, 1)])
    assert frozen_digest(store.model) == before.frozen_digest


def test_a_delta_holds_only_what_changed_since(store: ExpertStore) -> None:
    first = store.digest
    store.apply(changes(store, (0, 0), (1, 2)))
    second = store.digest
    store.apply(changes(store, (1, 2), seed=1))
    for version, digest, count in ((0, first, 2), (1, second, 1), (2, store.digest, 0)):
        delta = store.delta(ModelVersion(version, digest))
        assert (delta.since, delta.num_experts, delta.num_bytes) == (version, count, count * EXPERT_BYTES)
        assert len(delta.arrays) == 2 * count


@pytest.mark.parametrize(("version", "digest"), [(NOTHING, ""), (0, "wrong"), (7, "unknown")])
def test_an_unknown_state_gets_everything(store: ExpertStore, version: int, digest: str) -> None:
    store.apply(changes(store, (0, 0)))
    delta = store.delta(ModelVersion(version, digest))
    assert (delta.since, delta.num_experts, delta.num_bytes) == (NOTHING, 8, 8 * EXPERT_BYTES)


def test_bfloat16_on_the_wire_halves_the_bytes_not_the_model(tiny: Any) -> None:
    store = ExpertStore(tiny.build_model(), "bfloat16")
    given = changes(store, (0, 0))
    expected = store.tensors((0, 0))["down_proj"] + given[0, 0]["down_proj"]
    store.apply(given)
    assert store.delta(ModelVersion(0, store.digest_of_version[0])).num_bytes == EXPERT_BYTES // 2
    assert torch.equal(store.tensors((0, 0))["down_proj"], expected)


@pytest.mark.parametrize("kind", wire.FORMS)
def test_deltas_lead_to_the_same_model_as_a_full_copy(tiny: Any, kind: wire.Form) -> None:
    store = ExpertStore(tiny.build_model(), kind)
    one, other = Workspace(tiny.build_model(), None, kind), Workspace(tiny.build_model(), None, kind)
    held = base(one)
    for seed, keys in enumerate([[(0, 0), (1, 1)], [(0, 0)], [(1, 3)]]):
        store.apply(changes(store, *keys, seed=seed))
        held = held.updated(store.delta(held.version), one.base)
    one.load(held)
    full = base(other).updated(store.delta(), other.base)
    other.load(full)
    assert held.version.digest == full.version.digest == store.digest
    assert same_weights(one.model, other.model)
    if kind == "float32":
        assert same_weights(one.model, store.model)


def test_only_what_differs_is_written(store: ExpertStore, space: Workspace) -> None:
    at_base = base(space)
    store.apply(changes(store, (0, 0), (1, 1)))
    ahead = at_base.updated(store.delta(at_base.version), space.base)
    assert [space.load(held) for held in (at_base, ahead, ahead, at_base, ahead)] == [0, 2, 0, 2, 2]
    assert same_weights(space.model, store.model)


def test_the_base_comes_back_bit_for_bit(store: ExpertStore, space: Workspace, tiny: Any) -> None:
    store.apply(changes(store, (0, 0)))
    space.load(base(space).updated(store.delta(base(space).version), space.base))
    space.load(base(space))
    assert same_weights(space.model, tiny.build_model())


def test_a_delta_from_an_older_version_than_held_is_fine(store: ExpertStore, space: Workspace) -> None:
    store.apply(changes(store, (0, 0)))
    held = base(space).updated(store.delta(base(space).version), space.base)
    store.apply(changes(store, (1, 0)))
    assert held.updated(store.delta(base(space).version), space.base).version.digest == store.digest


def test_a_gap_or_a_wrong_digest_asks_for_everything(store: ExpertStore, space: Workspace) -> None:
    store.apply(changes(store, (0, 0)))
    first = store.digest
    store.apply(changes(store, (1, 0)))
    with pytest.raises(ResyncNeeded, match="holds version 0"):
        base(space).updated(store.delta(ModelVersion(1, first)), space.base)
    good = store.delta(base(space).version)
    damaged = Delta(good.arrays, 0, ModelVersion(2, "0" * 64))
    with pytest.raises(ResyncNeeded, match="digest"):
        base(space).updated(damaged, space.base)
    assert base(space).updated(store.delta(), space.base).version.digest == store.digest


def test_what_is_held_survives_in_the_nodes_state(store: ExpertStore, space: Workspace) -> None:
    store.apply(changes(store, (0, 0)))
    held = base(space).updated(store.delta(base(space).version), space.base)
    state = RecordDict()
    held.save(state)
    again = LocalCopy.load(state, space.base_digest)
    assert again == held


def test_a_saved_state_is_put_back_and_a_damaged_one_refused(store: ExpertStore, tiny: Any) -> None:
    store.apply(changes(store, (0, 0)))
    store.apply(changes(store, (1, 2)))
    experts = {key: {n: t.clone() for n, t in store.tensors(key).items()} for key in store.changed()}
    changed_at = {key: store.changed_at[key] for key in store.changed()}
    again = ExpertStore(tiny.build_model())
    again.set(experts, changed_at, store.digest_of_version)
    assert (again.version, again.digest, again.changed_at) == (store.version, store.digest, store.changed_at)
    assert same_weights(again.model, store.model)
    assert again.delta(ModelVersion(1, store.digest_of_version[1])).num_experts == 1
    experts[0, 0]["down_proj"][0, 0] += 1
    with pytest.raises(wire.WireError, match="damaged"):
        ExpertStore(tiny.build_model()).set(experts, changed_at, store.digest_of_version)
    with pytest.raises(wire.WireError, match="another base"):
        ExpertStore(tiny.build_model(seed=1)).set(experts, changed_at, store.digest_of_version)


def test_other_weights_than_experts_have_a_digest_too(tiny: Any) -> None:
    model = tiny.build_model()
    before = frozen_digest(model)
    find.layers(model)[0].experts.down_proj.data[0, 0, 0] += 1
    assert frozen_digest(model) == before
    model.lm_head.weight.data[0, 0] += 1
    assert frozen_digest(model) != before


def test_deltas_are_made_once_per_version(store: ExpertStore) -> None:
    store.apply(changes(store, (0, 0)))
    held = ModelVersion(0, store.digest_of_version[0])
    assert store.delta(held) is store.delta(held)


# Lossy forms: differences from the base, and experts that are only held approximately.


@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 2**-8), ("int8", 1 / 120)])
def test_rounding_is_of_the_whole_change_and_does_not_add_up(tiny: Any, kind: wire.Form, error: float) -> None:
    store, one = ExpertStore(tiny.build_model(), kind), Workspace(tiny.build_model(), None, kind)
    held, plain = base(one), ExpertStore(tiny.build_model())
    for seed in range(6):
        store.apply({key: {n: 1e-3 * t for n, t in c.items()} for key, c in changes(store, (0, 0), seed=seed).items()})
        held = held.updated(store.delta(held.version), one.base)
    one.load(held)
    for name, tensor in ExpertStore(one.model).tensors((0, 0)).items():
        change = store.tensors((0, 0))[name] - plain.tensors((0, 0))[name]
        assert (tensor - store.tensors((0, 0))[name]).abs().max() <= error * change.abs().max() + 1e-7


def test_merged_experts_come_in_4_bits_and_exactly_once_they_are_tuned(tiny: Any, space: Workspace) -> None:
    store = ExpertStore(tiny.build_model(), approximates=True)
    both = frozenset({(0, 0), (1, 1)})
    store.apply(changes(store, (0, 0), (1, 1)))
    first = store.delta(base(space).version, merged=both - {(0, 0)})
    assert (first.num_experts, first.num_approximate, first.after.approximate) == (1, 1, frozenset({(1, 1)}))
    assert first.num_bytes == EXPERT_BYTES + 2 * (32 + 2 + 4)  # 64 codes of 4 bits, a scale, a unit
    held = base(space).updated(first, space.base)
    assert held.version == first.after and first.after.digest != store.digest
    space.load(held)
    got = ExpertStore(space.model).tensors((1, 1))["down_proj"]
    assert 0 < (got - store.tensors((1, 1))["down_proj"]).norm() < 0.2 * store.tensors((1, 1))["down_proj"].norm()
    store.apply(changes(store, (0, 0), seed=1))
    second = store.delta(first.after, merged=frozenset({(0, 0)}))  # now the other one is tuned
    assert (second.num_experts, second.num_approximate) == (1, 1) and second.after.approximate == {(0, 0)}
    held = held.updated(second, space.base)
    assert held.version.approximate == {(0, 0)} and len(held.arrays) == 4
    last = store.delta(second.after)
    assert (last.num_experts, last.num_approximate, last.after.digest) == (1, 0, store.digest)
    space.load(held.updated(last, space.base))
    assert same_weights(space.model, store.model)


def test_an_approximate_expert_that_did_not_change_stays_as_it_is(tiny: Any, space: Workspace) -> None:
    store, every = ExpertStore(tiny.build_model(), approximates=True), frozenset({(0, 0), (1, 1)})
    store.apply(changes(store, (0, 0)))
    first = store.delta(base(space).version, merged=every)
    store.apply(changes(store, (1, 1)))
    second = store.delta(first.after, merged=every)
    assert (second.num_experts, second.num_approximate, second.after.approximate) == (0, 1, every)
    assert base(space).updated(first, space.base).updated(second, space.base).version.approximate == every


def test_who_holds_another_approximation_than_the_server_thinks_gets_everything(tiny: Any, space: Workspace) -> None:
    store, every = ExpertStore(tiny.build_model(), approximates=True), frozenset({(0, 0), (1, 1)})
    store.apply(changes(store, (0, 0)))
    held = base(space).updated(store.delta(base(space).version), space.base)  # exact
    store.apply(changes(store, (1, 1)))
    wrong = store.delta(ModelVersion(1, held.version.digest, frozenset({(0, 0)})), every)
    with pytest.raises(ResyncNeeded, match="digest"):
        held.updated(wrong, space.base)
    full = store.delta(ModelVersion(), every)
    again = base(space).updated(full, space.base)
    assert (full.num_experts, full.num_approximate, again.version.approximate) == (0, 2, every)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_difference_from_another_base_is_noticed(tiny: Any, kind: wire.Form) -> None:
    store, other = ExpertStore(tiny.build_model(), kind, approximates=True), Workspace(tiny.build_model(1), None, kind)
    store.apply(changes(store, (0, 0)))
    with pytest.raises(ResyncNeeded, match="digest"):
        base(other).updated(store.delta(), other.base)
