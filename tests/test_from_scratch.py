"""All of FLUX once more, in one notebook and without the library: the same roles, plans, utilities and weights."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import steps
import torch

from fluxlib import federation, models, roles
from fluxlib.app import pipeline
from fluxlib.config import REPO_ROOT, RunConfig, make_config
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.methods import flux
from fluxlib.moe import find

NOTEBOOK = REPO_ROOT / "notebooks" / "09_from_scratch.ipynb"
CODE = [cell for cell in pipeline.cells(NOTEBOOK) if cell["cell_type"] == "code"]


def lines(cell: dict[str, Any]) -> list[str]:
    return [line for line in cell["source"].splitlines() if line.strip()]


def test_it_is_short():
    assert max(len(cell["source"].splitlines()) for cell in CODE) <= 15
    assert sum(len(lines(cell)) for cell in CODE) <= 400


def test_it_takes_the_base_and_the_data_from_the_library_and_nothing_else():
    imports = [line for cell in CODE for line in lines(cell) if re.search(r"\bfluxlib\b", line)]
    assert imports == [
        "from fluxlib import models, tasks",
        "from fluxlib.tasks.batches import make_batch, sample_batches",
        "from fluxlib.tasks.partition import partition",
    ]


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """What the notebook's names stand for at its end; what a reader may change is left out."""
    names: dict[str, Any] = {}
    for cell in CODE:
        if not steps.ASIDES & set(cell["metadata"].get("tags", [])):
            exec(compile(cell["source"], "09_from_scratch", "exec"), names)
    return names


def config(notebook: dict[str, Any]) -> RunConfig:
    """The notebook's parameters as those of a run."""
    return make_config({
        "task": notebook["task_name"],
        "seed": notebook["seed"],
        "data.task_size": notebook["num_samples"],
        "federation": {"rounds": notebook["rounds"], "participants": notebook["participants"]},
        "training.local_steps": notebook["local_steps"],
        "training.batch_size": notebook["batch_size"],
        "training.learning_rate": notebook["learning_rate"],
        "training.optimizer": "sgd",
        "budget.tune_frac": notebook["tune_budget"] / (notebook["L"] * notebook["E"]),
        "budget.merge_frac": notebook["merge_budget"] / (notebook["L"] * notebook["E"]),
        "roles.probes_per_round": notebook["most_probes"],
        "evaluation.every": notebook["rounds"],
    })  # fmt: skip


def load_in_64_bits(load, name, *_) -> tuple[Any, Any]:
    """As the notebook computes: then no token is so undecided between two experts that rounding decides."""
    model, tokenizer = load(name, torch.float64)
    model.set_experts_implementation("eager")  # the only one that takes 64 bits
    return model, tokenizer


@pytest.fixture(scope="module")
def library(notebook) -> dict[str, Any]:
    """The same run by the library, and what passed through it."""
    seen: dict[str, Any] = {"plans": [], "profiles": [], "utilities": [], "rounds": []}
    make_plans, update, run_round = flux.make_plans, roles.update, FluxStrategy.run_round

    def watch_plans(model, known, *rest):
        seen["profiles"].append(known)
        seen["plans"].append(make_plans(model, known, *rest))
        return seen["plans"][-1]

    def watch_utilities(state, utilities, *rest):
        seen["utilities"].append(utilities)
        return update(state, utilities, *rest)

    def watch_rounds(strategy, number):
        seen["rounds"].append(run_round(strategy, number))
        return seen["rounds"][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", partial(load_in_64_bits, models.load))
        patch.setattr(flux, "make_plans", watch_plans)
        patch.setattr(roles, "update", watch_utilities)
        patch.setattr(FluxStrategy, "run_round", watch_rounds)
        seen["result"] = federation.run(config(notebook))
    return seen


def test_the_same_experts_are_exploited_and_explored(notebook, library):
    assert len(notebook["history"]) == len(library["rounds"]) == notebook["rounds"]
    for ours, theirs in zip(notebook["history"], library["rounds"], strict=True):
        for kind in ("exploit", "explore"):
            assert torch.equal(ours[kind], torch.stack([getattr(one.roles, kind) for one in theirs.participants]))


def test_the_same_experts_are_merged(notebook, library):
    assert len(notebook["plans"]) == len(library["plans"]) == notebook["rounds"] * notebook["participants"]
    for ours, theirs in zip(notebook["plans"], library["plans"], strict=True):
        for groups, plan in zip(ours, theirs, strict=True):
            # Explored experts have a slot of their own, before the groups.
            assert sorted(map(tuple, groups)) == sorted(plan.groups[len(plan.groups) - len(groups) :])


def test_utilities_are_the_same(notebook, library):
    for number, (ours, theirs) in enumerate(zip(notebook["history"], library["utilities"], strict=True)):
        assert torch.equal(ours["utilities"].isnan(), theirs.isnan()), f"round {number + 1}"
        exploit = ours["exploit"]
        torch.testing.assert_close(ours["utilities"][exploit], theirs[exploit], rtol=1e-4, atol=1e-4)
        # Of hundreds. A probe subtracts two nearly equal losses, and the model's norms round to 32 bits.
        torch.testing.assert_close(ours["utilities"], theirs, rtol=1e-4, atol=0.05, equal_nan=True)


def test_the_global_model_is_the_same(notebook, library):
    found = [layer.experts for layer in find.layers(library["result"].model)]
    for ours, name in ((notebook["up"], "gate_up_proj"), (notebook["down"], "down_proj")):
        theirs = torch.stack([getattr(experts, name).detach() for experts in found])
        assert (ours - theirs).abs().max() < 1e-5
    first, last = library["result"].rounds["loss"].iloc[[0, -1]]
    assert [notebook["losses"][0], notebook["losses"][-1]] == pytest.approx([first, last], abs=1e-5)
    assert last < first - 0.02, "it is a model that learned"
