"""What every method promises, and what FLUX and FMD do beyond that."""

import copy
import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import nn

from fluxlib import gradients, methods, models, profiling, roles, seeding
from fluxlib.config import AssignmentKind
from fluxlib.devices import dry_run
from fluxlib.devices.memory import plan_memory
from fluxlib.merging.slots import NOWHERE
from fluxlib.methods import flux, flux_plus
from fluxlib.methods.base import Budget, LocalData, LocalRound, ParticipantState, Update
from fluxlib.methods.flux_plus import MAX_STALENESS
from fluxlib.methods.local import customized, squared_gradient_norms
from fluxlib.models.parameters import count_parameters
from fluxlib.moe import find
from fluxlib.moe.adapter import Adapter
from fluxlib.moe.compact import LayerPlan
from fluxlib.roles import Roles

from .conftest import CONFIG

LAYERS, EXPERTS = 4, 16
BUDGET = Budget(num_tuned=16, num_merged=16)


def assigned(name: str) -> Roles:
    state = roles.RoleState.start(torch.rand(1, LAYERS, EXPERTS, generator=seeding.generator(0, "frequency")))
    found = methods.get(name).assign(state, [BUDGET], 0.5, seeding.generator(0, "assign"), CONFIG)
    return found[0]


def train(
    name: str, model: nn.Module, data: LocalData, changes: dict[str, object] | None = None
) -> tuple[Update, ParticipantState, Roles]:
    config = CONFIG.updated(changes or {})
    given = assigned(name)
    run = methods.get(name).train
    chance = seeding.generator(0, "train")
    update, state = run(model, LocalRound(ParticipantState(), given, BUDGET, data, config, 1, chance))
    return update, state, given


@pytest.mark.parametrize("name", methods.METHODS)
class TestEveryMethod:
    def test_leaves_the_model_as_it_was(self, name: str, model: nn.Module, data: LocalData) -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        train(name, model, data)
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_uploads_exactly_the_exploited_experts(self, name: str, model: nn.Module, data: LocalData) -> None:
        update, _, given = train(name, model, data)
        assert sorted(update.changes) == [tuple(key) for key in given.exploit.nonzero().tolist()]

    def test_every_routed_token_is_counted_once_per_choice(self, name: str, model: nn.Module, data: LocalData) -> None:
        update, _, _ = train(name, model, data)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in data.train)
        assert update.tokens.sum(1).tolist() == [4 * tokens] * LAYERS

    def test_same_generator_same_update(self, name: str, model: nn.Module, data: LocalData) -> None:
        first, again = (train(name, model, data)[0] for _ in range(2))
        assert first.loss == again.loss
        for key, tensors in first.changes.items():
            assert all(torch.equal(tensor, again.changes[key][part]) for part, tensor in tensors.items())

    def test_parts_of_a_batch_and_fewer_activations_kept_change_nothing(
        self, name: str, model: nn.Module, data: LocalData
    ) -> None:
        sgd: dict[str, object] = {"training.optimizer": "sgd"}
        whole, _, given = train(name, model, data, sgd)
        parts, _, _ = train(name, model, data, sgd | {"training.micro_batch": 3, "training.checkpointing": True})
        assert not model.is_gradient_checkpointing
        assert torch.equal(parts.tokens, whole.tokens) and parts.work == whole.work
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        torch.testing.assert_close(parts.utilities[given.exploit], whole.utilities[given.exploit], equal_nan=True)
        for key, tensors in whole.changes.items():
            for part, tensor in tensors.items():
                assert (parts.changes[key][part] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-7, (key, part)

    def test_a_16_bit_model_learns_in_32(self, name: str, model: nn.Module, data: LocalData) -> None:
        half, small = copy.deepcopy(model).to(torch.bfloat16), {"training.learning_rate": 1e-5}
        before = {key: value.clone() for key, value in half.state_dict().items()}
        ours, full = train(name, half, data, small)[0], train(name, model, data, small)[0]
        assert all(torch.equal(value, half.state_dict()[key]) for key, value in before.items())
        assert ours.loss == pytest.approx(full.loss, rel=0.01)
        sizes = []
        for update in (ours, full):
            tensors = [tensor for changed in update.changes.values() for tensor in changed.values()]
            assert {tensor.dtype for tensor in tensors} == {torch.float32}
            sizes.append(math.hypot(*(float(tensor.norm()) for tensor in tensors)))
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1), "steps of 1e-5 are lost on a weight of 16 bits"

    def test_a_loss_that_explodes_is_named(self, name: str, model: nn.Module, data: LocalData) -> None:
        broken = {key: value.clone() for key, value in data.train[0].items()}
        broken["labels"][:] = -100  # nothing to score: the mean is 0 / 0
        with pytest.raises((FloatingPointError, ValueError), match="loss is nan at step 1|scored token"):
            train(name, model, dataclasses.replace(data, train=[broken]))


def test_one_step_of_sgd_is_minus_the_gradient(model: nn.Module, data: LocalData) -> None:
    one = dataclasses.replace(data, train=data.train[:1])
    update, _, _ = train("fmd", model, one, {"training.optimizer": "sgd", "training.learning_rate": 0.5})
    model.zero_grad()
    model(**data.train[0]).loss.backward()
    gradient = model.model.layers[1].mlp.experts.down_proj.grad[3]
    torch.testing.assert_close(update.changes[1, 3]["down_proj"], -0.5 * gradient, rtol=1e-4, atol=1e-7)
    model.zero_grad()


def test_gradient_norms_of_tuned_experts_are_the_models_own(model: nn.Module, data: LocalData) -> None:
    plans = [LayerPlan(tuned=(0, 1), groups=tuple((e,) for e in range(2, EXPERTS)))] * LAYERS
    with customized(model, plans) as compact:
        model(**data.train[0]).loss.backward()
        norms = squared_gradient_norms(compact)
    keys = [(layer, expert) for layer in range(LAYERS) for expert in (0, 1)]
    expected = gradients.true_norms(model, data.train[0], keys)
    torch.testing.assert_close(norms[:, :2].flatten(), expected, rtol=1e-3, atol=1e-12)
    assert norms[:, 2:].isnan().all()


def test_a_watched_expert_stays_frozen_and_shows_its_gradients_norm(model: nn.Module, data: LocalData) -> None:
    alone = tuple((e,) for e in range(2, EXPERTS))
    with customized(model, [LayerPlan(tuned=(0, 1), groups=alone)] * LAYERS) as compact:
        for layer in compact:
            layer.watch(3)
        model(**data.train[0]).loss.backward()
        norms = squared_gradient_norms(compact)
        with pytest.raises(ValueError, match="count: expected at most the leading slots"):
            compact[0].watch(EXPERTS)
    keys = [(layer, expert) for layer in range(LAYERS) for expert in range(5)]
    expected = gradients.true_norms(model, data.train[0], keys)
    torch.testing.assert_close(norms[:, :5].flatten(), expected, rtol=1e-3, atol=1e-12)
    assert norms[:, 5:].isnan().all()


class TestFluxPlus:
    def test_it_tunes_nearly_its_whole_budget_and_watches_what_the_rest_makes_room_for(self) -> None:
        assert flux_plus.split(Budget(16, 16), 64, 4) == (14, 8)
        assert flux_plus.split(Budget(6, 6), 96, 6) == (5, 4)
        assert flux_plus.split(Budget(1, 4), 64, 4) == (1, 0)
        assert flux_plus.split(Budget(64, 0), 64, 4) == (64, 0)
        assert flux_plus.split(Budget(50, 10), 64, 4) == (43, 17)  # one of each layer is left
        given = assigned("flux_plus")
        assert (int(given.exploit.sum()), int(given.explore.sum())) == (14, 8)

    @pytest.mark.parametrize("name", ["llama-moe-3.5b", "deepseek-moe-16b"])
    def test_what_it_watches_fits_where_what_it_gives_up_was(self, name: str) -> None:
        config, step = models.config(name), dry_run.Step(batch=16, tokens=128)
        before, after = (plan_memory(config, "flux_plus", None, *counts, step) for counts in ((64, 64), (56, 96)))
        expert = count_parameters(dry_run.meta_model(config, torch.bfloat16)).per_expert
        assert after.peak_bytes + 4 * expert <= before.peak_bytes  # and the one gradient that exists

    def test_utilities_and_the_next_profile_come_from_the_training_itself(
        self, model: nn.Module, data: LocalData
    ) -> None:
        update, state, given = train("flux_plus", model, data)
        assert torch.equal(~update.utilities.isnan(), given.exploit | given.explore)
        assert update.work.profile_samples == update.work.probe_samples == update.work.num_quantized == 0
        seen = state.profile
        assert seen is not None and torch.equal(seen.tokens, update.tokens)
        assert seen.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in data.train)
        torch.testing.assert_close(seen.gate.sum(1), torch.ones(LAYERS))

    def test_slots_stay_until_copies_are_refreshed(self, model: nn.Module, data: LocalData) -> None:
        first, state, given = train("flux_plus", model, data)
        merged = ~given.exploit
        assert first.work.num_merge_sources == int(merged.sum())
        layer, expert = given.exploit.nonzero()[0].tolist()
        exploit = given.exploit.clone()
        exploit[layer, expert] = False
        later = Roles(exploit, given.explore)
        for number, num_read in ((2, 1), (MAX_STALENESS, 1), (MAX_STALENESS + 1, int((~exploit).sum()))):
            chance = seeding.generator(0, "train")
            update, after = flux_plus.train(model, LocalRound(state, later, BUDGET, data, CONFIG, number, chance))
            assert update.work.num_merge_sources == num_read, f"round {number}"
            assert after.slots is not None and after.slots.place[layer, expert] != NOWHERE
            assert after.slots.made == (1 if num_read == 1 else number)

    def test_with_every_expert_tuned_the_profile_is_that_of_the_model(self, model: nn.Module, data: LocalData) -> None:
        one = dataclasses.replace(data, train=data.train[:1])
        nothing = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
        given = LocalRound(
            ParticipantState(), Roles(~nothing, nothing), Budget(64, 0), one, CONFIG, 1, seeding.generator(0, "train")
        )
        _, state = flux_plus.train(model, given)
        expected = profiling.profile(model, one.train, bits=16, attention=False)
        assert state.profile is not None and torch.equal(state.profile.tokens, expected.tokens)
        torch.testing.assert_close(state.profile.gate, expected.gate)


class TestFlux:
    def test_utilities_cover_what_was_tuned_or_probed(self, model: nn.Module, data: LocalData) -> None:
        update, _, given = train("flux", model, data, {"roles.probes_per_round": None})
        assert torch.equal(~update.utilities.isnan(), given.exploit | given.explore)
        assert (update.utilities.nan_to_num() >= 0).all()

    @pytest.mark.parametrize("kind", get_args(AssignmentKind))
    def test_every_assignment_fills_the_same_budget(self, kind: AssignmentKind) -> None:
        frequency = torch.rand(3, LAYERS, EXPERTS, generator=seeding.generator(0, "frequency"))
        state, config = roles.RoleState.start(frequency), CONFIG.updated({"roles.assignment": kind})
        found = flux.assign(state, [BUDGET] * 3, 0.5, seeding.generator(0, "assign"), config)
        assert found.exploit.sum(dim=(1, 2)).tolist() == [8] * 3
        assert found.explore.sum(dim=(1, 2)).tolist() == [8] * 3

    def test_exploration_is_random_unless_it_is_to_rotate(self) -> None:
        """Half of the experts were measured last round: who rotates explores the others, who draws does not."""
        state = roles.RoleState.start(torch.ones(1, LAYERS, EXPERTS))
        fresh = torch.arange(LAYERS * EXPERTS).view(1, LAYERS, EXPERTS) % 2 == 0
        state = roles.update(state, torch.where(fresh, 1.0, math.nan))
        shares = {}
        for how in ("random", "oldest"):
            config = CONFIG.updated({"roles.exploration": how})
            found = flux.assign(state, [BUDGET], 0.01, seeding.generator(0, "assign"), config)
            shares[how] = float(fresh[found.explore].float().mean())
        assert shares["oldest"] < shares["random"]

    def test_a_backward_pass_measures_all_explored_experts_exactly(self, model: nn.Module, data: LocalData) -> None:
        update, _, given = train("flux", model, data, {"roles.explore_by": "backward"})
        assert torch.equal(~update.utilities.isnan(), given.exploit | given.explore)
        assert update.work.probe_samples == 3 * len(data.train[0]["input_ids"])
        probed, _, _ = train("flux", model, data, {"roles.num_probes": 400})
        both = ~probed.utilities.isnan() & given.explore & (update.utilities > 0)
        torch.testing.assert_close(probed.utilities[both], update.utilities[both], rtol=0.3, atol=0)

    def test_guidance_is_charged(self, model: nn.Module, data: LocalData) -> None:
        """One pass to cache inputs, one more for the guess; what each probed expert takes is the same."""
        plain, guided = (
            train("flux", model, data, {"roles.explore_by": how})[0].work for how in ("probes", "guided_probes")
        )
        assert guided.probe_samples == 2 * plain.probe_samples == 2 * len(data.train[0]["input_ids"])
        assert guided.expert_probe_samples == plain.expert_probe_samples > 0

    def test_only_assignments_that_use_probes_pay_for_them(self, model: nn.Module, data: LocalData) -> None:
        update, _, given = train("flux", model, data, {"roles.assignment": "utility"})
        assert torch.equal(~update.utilities.isnan(), given.exploit)
        assert update.work.probe_samples == 0

    def test_probes_are_limited(self, model: nn.Module, data: LocalData) -> None:
        update, _, given = train("flux", model, data)
        assert int((~update.utilities.isnan() & given.explore).sum()) == CONFIG.roles.probes_per_round

    def test_explored_experts_are_neither_tuned_nor_merged(self, model: nn.Module, data: LocalData) -> None:
        given = assigned("flux")
        plans = flux.make_plans(model, flux.profile(model, data, CONFIG), given, BUDGET, CONFIG.merging, CONFIG.seed)
        for plan, exploit, explore in zip(plans, given.exploit, given.explore, strict=True):
            assert list(plan.tuned) == exploit.nonzero().flatten().tolist()
            alone = [group[0] for group in plan.groups[: int(explore.sum())]]
            assert alone == explore.nonzero().flatten().tolist()
            plan.check(EXPERTS)
        slots = sum(len(plan.groups) for plan in plans) - int(given.explore.sum())
        assert slots == BUDGET.num_merged

    def test_a_run_can_ask_for_joint_budgets_and_gate_weights(self, model: nn.Module, data: LocalData) -> None:
        given, known = assigned("flux"), flux.profile(model, data, CONFIG)
        config = CONFIG.updated({"merging.budgets": "joint", "merging.weights": "gate"})
        plans = flux.make_plans(model, known, given, BUDGET, config.merging, config.seed)
        assert sum(len(plan.groups) for plan in plans) == BUDGET.num_merged + int(given.explore.sum())
        assert plans[0].weights is not None
        assert plans[0].weights[-1] == pytest.approx(known.gate[0, list(plans[0].groups[-1])].tolist())

    def test_the_profile_is_of_the_model_it_holds_and_stays(self, model: nn.Module, data: LocalData) -> None:
        update, state, _ = train("flux", model, data)
        assert state.profile_round == 1
        assert not update.work.hidden_profile
        expected = flux.profile(model, data, CONFIG)
        torch.testing.assert_close(state.profile.frequency, expected.frequency)

    def test_a_known_profile_is_not_made_again_before_training(self, model: nn.Module, data: LocalData) -> None:
        _, state, given = train("flux", model, data)
        run = methods.get("flux").train
        update, _ = run(model, LocalRound(state, given, BUDGET, data, CONFIG, 2, seeding.generator(0)))
        assert "first_profile" not in update.phases_s
        assert update.work.hidden_profile

    def test_work_is_counted(self, model: nn.Module, data: LocalData) -> None:
        update, _, given = train("flux", model, data)
        work = update.work
        assert (work.num_experts, work.num_tuned) == (64, int(given.exploit.sum()))
        assert work.num_frozen == int(given.explore.sum()) + BUDGET.num_merged
        assert work.train_samples == 8
        assert work.train_tokens == sum(int(batch["attention_mask"].sum()) for batch in data.train)


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="method is 'fedavg', allowed are flux, flux_plus, fmd, fmq, fmes"):
        methods.get("fedavg")


def test_flux_with_everything_exploited_is_fmd(model: nn.Module, data: LocalData) -> None:
    everything = torch.ones(LAYERS, EXPERTS, dtype=torch.bool)
    given, budget = Roles(everything, ~everything), Budget(LAYERS * EXPERTS, 0)
    local = LocalRound(ParticipantState(), given, budget, data, CONFIG, 1, seeding.generator(0))
    updates = [methods.get(name).train(model, local)[0] for name in ("flux", "fmd")]
    for key, tensors in updates[1].changes.items():
        assert all(torch.equal(tensor, updates[0].changes[key][part]) for part, tensor in tensors.items())


class TestAdapters:
    LORA = {"adapter.kind": "lora", "adapter.rank": 6, "adapter.alpha": 9.0}

    @pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "fmq"])
    def test_changes_are_those_of_b_and_the_model_is_left_as_it_was(
        self, name: str, model: nn.Module, data: LocalData
    ) -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        update, _, given = train(name, model, data, self.LORA)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert sorted(update.changes) == [tuple(key) for key in given.exploit.nonzero().tolist()]
        shapes = {"gate_up_proj": (64, 6), "down_proj": (64, 6)}
        assert all({n: tuple(t.shape) for n, t in one.items()} == shapes for one in update.changes.values())
        assert update.work.adapter_rank == 6 and train(name, model, data)[0].work.adapter_rank == 0
        if methods.get(name).utilities:
            assert not update.utilities[given.exploit].isnan().any()

    def test_one_step_of_sgd_is_the_full_step_projected_by_a(self, model: nn.Module, data: LocalData) -> None:
        one, sgd = dataclasses.replace(data, train=data.train[:1]), {"training.optimizer": "sgd"}
        full, low = (train("fmd", model, one, sgd | more)[0].changes[1, 3] for more in ({}, self.LORA))
        tensors = find.expert_tensors(find.layers(model)[1].experts, 3)
        fixed = Adapter(6, 9.0, CONFIG.seed).fixed((1, 3), tensors, find.Layout(tuple(tensors)))
        for name, change in full.items():
            torch.testing.assert_close(low[name], change @ fixed[name].T, rtol=1e-3, atol=1e-8)

    def test_what_it_watches_takes_as_much_room_as_it_gives_up(self) -> None:
        state = roles.RoleState.start(torch.ones(1, LAYERS, EXPERTS))
        given = flux_plus.assign(state, [BUDGET], 0.5, seeding.generator(0), CONFIG.updated(self.LORA))
        assert (int(given.exploit.sum()), int(given.explore.sum())) == (14, 2)
