"""A tiny random OLMoE on disk, a tiny run, and a method that changes experts without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from fluxlib import methods, roles
from fluxlib.config import RunConfig
from fluxlib.config import make_config as validated
from fluxlib.federation.client import local_copy
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.methods.base import Budget, LocalRound, Method, ParticipantState, Update, Work
from fluxlib.moe import find

LAYERS, EXPERTS = 2, 4


def build_model(seed: int = 0) -> nn.Module:
    config = tf.OlmoeConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        intermediate_size=4, num_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=chance)
    return model.eval()


def write_model(folder: Path, seed: int = 0) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?:+-*=()' \n"
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(letters, start=3)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    build_model(seed).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-olmoe")


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Roles:
    counts = [budget.num_tuned for budget in budgets]
    return roles.assign(roles.current_utilities(state), counts, epsilon, generator)


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    """Changes that depend on the model that is held, on chance and on the state that was kept."""
    found, assigned, generator = find.layers(model), local.roles, local.generator
    changes, tokens = {}, torch.zeros(assigned.exploit.shape)
    for layer, expert in assigned.exploit.nonzero().tolist():
        tensors = find.expert_tensors(found[layer].experts, expert)
        changes[layer, expert] = {
            name: 0.1 * t + 0.01 * torch.randn(t.shape, generator=generator) + 0.001 * local.state.profile_round
            for name, t in tensors.items()
        }
        tokens[layer, expert] = float(torch.randint(1, 9, (), generator=generator))
    utilities = torch.rand(assigned.exploit.shape, generator=generator)
    measured = assigned.exploit | assigned.explore
    update = Update(
        changes=changes,
        utilities=torch.where(measured, utilities, torch.nan),
        tokens=tokens,
        loss=float(utilities.mean()),
        num_samples=len(local.data.train) * local.config.training.batch_size,
        work=Work(assigned.exploit.numel(), num_tuned=len(changes), train_steps=1, train_samples=2, train_tokens=20),
        phases_s={"train": 0.001},
    )
    return update, replace(local.state, profile_round=local.number)


FAKE = Method("fake", "Fake", assign, train, profiles=False)
FAKE_PROFILING = Method("fake-profiling", "Fake with profiles", assign, train, profiles=True)


@pytest.fixture(autouse=True)
def fake_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for method in (FAKE, FAKE_PROFILING):
        monkeypatch.setitem(methods.METHODS, method.name, method)
    yield
    local_copy.workspace.cache_clear()


@pytest.fixture
def make_config(model_folder: Path) -> Callable[..., RunConfig]:
    """A tiny run with some settings changed: ``make_config({"federation.rounds": 2})``."""

    def make(changes: Mapping[str, Any] | None = None) -> RunConfig:
        small = {
            "method": "fake", "model": str(model_folder), "task": "mini-piqa", "data.task_size": 60,
            "federation.rounds": 3, "federation.participants": 3, "evaluation.samples": 4,
            "training.local_steps": 1, "training.batch_size": 2, "training.max_tokens": 200,
            "budget.tune_frac": 0.5, "budget.merge_frac": 0.25, "profiling.batches": 1,
        }  # fmt: skip
        return validated(small | dict(changes or {}))

    return make


@pytest.fixture
def store() -> ExpertStore:
    return ExpertStore(build_model())


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(build_model=build_model, write_model=write_model, LAYERS=LAYERS, EXPERTS=EXPERTS)
