import itertools

import pytest
import torch
from mini_bases import build_tokenizer
from torch import nn

from fluxlib import seeding, tasks
from fluxlib.config import make_config
from fluxlib.methods.base import LocalData
from fluxlib.models import LlamaMoeConfig, LlamaMoeForCausalLM
from fluxlib.tasks.batches import sample_batches

CONFIG = make_config(
    {
        "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "profiling.batches": 1,
        "roles.probes_per_round": 3,
    }
)


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: object) -> nn.Module:
    """Random weights: 4 MoE layers of 16 experts, top-4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - transformers draws initial weights from the global generator
        return LlamaMoeForCausalLM(
            LlamaMoeConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=16 * 32,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_experts=16,
                num_selects=4,
                gate_network="mlp",
                gate_add_noise=False,
                score_scale_factor=4.0,
                max_position_embeddings=256,
                pad_token_id=0,
            )
        ).eval()


@pytest.fixture(scope="session")
def data(tokenizer: object) -> LocalData:
    examples = tasks.load("mini-mmlu", size=40).train
    steps = CONFIG.training
    batches = sample_batches(examples, tokenizer, steps.batch_size, steps.max_tokens, seeding.generator(0, "batches"))
    drawn = list(itertools.islice(batches, 3))
    return LocalData(train=drawn[:2], profile=drawn[2:])
