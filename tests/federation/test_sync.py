"""Versions, deltas and digests: a delta leads exactly to what a full copy would."""

from __future__ import annotations

from typing import Any, get_args

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


def test_a_16_bit_models_small_changes_add_up(tiny: Any) -> None:
    store = ExpertStore(tiny.build_model().to(torch.bfloat16))
    space = Workspace(tiny.build_model().to(torch.bfloat16), None)
    before = {name: tensor.float() for name, tensor in store.tensors((0, 1)).items()}
    for _ in range(100):
        store.apply({(0, 1): {name: torch.full_like(tensor, 1e-4) for name, tensor in before.items()}})
    for name, tensor in store.learned((0, 1)).items():
        torch.testing.assert_close(tensor, before[name] + 0.01)
        assert torch.equal(store.tensors((0, 1))[name], tensor.to(torch.bfloat16))
    held = base(space).updated(store.delta(base(space).version), space.base)
    assert space.load(held) == 1 and same_weights(space.model, store.model)
    again = ExpertStore(tiny.build_model().to(torch.bfloat16))
    again.set({(0, 1): store.learned((0, 1))}, store.history, store.digest_of_version)
    assert same_weights(again.model, store.model)


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


@pytest.mark.parametrize("kind", get_args(wire.Form))
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
    history = {key: list(store.history[key]) for key in store.changed()}
    again = ExpertStore(tiny.build_model())
    again.set(experts, history, store.digest_of_version)
    assert (again.version, again.digest, again.history) == (store.version, store.digest, store.history)
    assert same_weights(again.model, store.model)
    assert again.delta(ModelVersion(1, store.digest_of_version[1])).num_experts == 1
    experts[0, 0]["down_proj"][0, 0] += 1
    with pytest.raises(wire.WireError, match="damaged"):
        ExpertStore(tiny.build_model()).set(experts, history, store.digest_of_version)
    with pytest.raises(wire.WireError, match="another base"):
        ExpertStore(tiny.build_model(seed=1)).set(experts, history, store.digest_of_version)


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


# Lossy forms, and experts that are held as they were.


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


def test_an_expert_that_is_not_tuned_waits_until_it_is_or_until_it_is_too_old(tiny: Any, space: Workspace) -> None:
    store, lazy = ExpertStore(tiny.build_model()), frozenset({(1, 1)})
    store.apply(changes(store, (0, 0), (1, 1)))
    first = store.delta(base(space).version, lazy, max_staleness=2)
    assert (first.num_experts, first.after.stale) == (1, frozenset({(1, 1, 0)})) and first.after.digest != store.digest
    held = base(space).updated(first, space.base)
    assert held.version == first.after
    space.load(held)
    got, old = (ExpertStore(model).tensors((1, 1))["down_proj"] for model in (space.model, tiny.build_model()))
    assert torch.equal(got, old)
    store.apply({})
    second = store.delta(held.version, lazy, max_staleness=2)
    assert (second.num_experts, second.after.stale) == (0, frozenset({(1, 1, 0)}))
    held = held.updated(second, space.base)
    assert store.delta(held.version, frozenset(), max_staleness=2).num_experts == 1  # now it is tuned
    store.apply({})
    third = store.delta(held.version, lazy, max_staleness=2)  # three rounds old
    assert (third.num_experts, third.after.stale, third.after.digest) == (1, frozenset(), store.digest)
    space.load(held.updated(third, space.base))
    assert same_weights(space.model, store.model)


def test_a_copy_that_waits_is_as_old_as_what_it_was_made_of(tiny: Any, space: Workspace) -> None:
    store, lazy = ExpertStore(tiny.build_model()), frozenset({(1, 1)})
    store.apply(changes(store, (1, 1)))
    held = base(space).updated(store.delta(base(space).version), space.base)
    store.apply(changes(store, (0, 0)))
    held = held.updated(store.delta(held.version, lazy, max_staleness=1), space.base)
    assert held.version.stale == frozenset()  # it did not change
    store.apply(changes(store, (1, 1), seed=2))
    late = store.delta(held.version, lazy, max_staleness=1)
    assert late.after.stale == {(1, 1, 2)} and held.updated(late, space.base).version == late.after


def test_who_holds_other_copies_than_the_server_thinks_gets_everything(tiny: Any, space: Workspace) -> None:
    store, lazy = ExpertStore(tiny.build_model()), frozenset({(0, 0), (1, 1)})
    store.apply(changes(store, (0, 0), (1, 1)))
    held = base(space).updated(store.delta(base(space).version), space.base)
    for wrong in ({(0, 0, 0)}, {(0, 0, -5)}, {(7, 7, 0)}):
        full = store.delta(ModelVersion(1, held.version.digest, frozenset(wrong)), lazy, max_staleness=9)
        assert (full.since, full.num_experts, full.after.stale) == (-1, len(store.keys), frozenset())


def test_a_difference_from_another_base_is_noticed(tiny: Any) -> None:
    store, other = ExpertStore(tiny.build_model(), "int8"), Workspace(tiny.build_model(1), None, "int8")
    store.apply(changes(store, (0, 0)))
    with pytest.raises(ResyncNeeded, match="digest"):
        base(other).updated(store.delta(), other.base)
