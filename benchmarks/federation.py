"""What the in-process engine costs besides training: time per participant and round, and memory.

    python benchmarks/federation.py                       overhead for three amounts of traffic, then scale
    python benchmarks/federation.py --participants 1000   the largest number of participants of the scale test

A method that does no work stands for training: its changes are made once, before the clock starts. Evaluation and
data loading are left out, since they are the same whatever carries the messages. ``overhead_ms`` is wall time and
``cpu_ms`` processor time, per participant and round, the median over rounds; on a busy machine only the second
means much. Needs no model and no data on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers as tf
from torch import nn

from fluxlib import federation, methods, roles
from fluxlib.config import RunConfig, make_config
from fluxlib.federation.client import participant
from fluxlib.federation.server import rounds
from fluxlib.methods.base import Budget, LocalData, LocalRound, Method, ParticipantState, Update, Work
from fluxlib.tasks.evaluate import Score

TARGET_S = 0.005
"""Overhead per participant and round that the in-process engine is to stay under."""

MADE: dict[tuple[int, int], dict[str, torch.Tensor]] = {}


def write_model(folder: Path, layers: int, experts: int, hidden: int, width: int) -> Path:
    """A random OLMoE of the mini models' size, with a tokenizer that is never used."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = tf.OlmoeConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, num_experts=experts, num_experts_per_tok=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    for layer in range(layers):
        for expert in range(experts):
            gate_up, down = torch.randn(2 * width, hidden) * 1e-3, torch.randn(hidden, width) * 1e-3
            MADE[layer, expert] = {"gate_up_proj": gate_up, "down_proj": down}
    return folder


def assign(
    state: roles.RoleState, budgets: Sequence[Budget], epsilon: float, generator: torch.Generator, config: RunConfig
) -> roles.Roles:
    counts = [budget.num_tuned for budget in budgets]
    return roles.assign(roles.current_utilities(state), counts, 1.0, generator)


def train(model: nn.Module, local: LocalRound) -> tuple[Update, ParticipantState]:
    assigned = local.roles
    tuned = [(layer, expert) for layer, expert in assigned.exploit.nonzero().tolist()]
    update = Update(
        changes={key: MADE[key] for key in tuned},
        utilities=torch.where(assigned.exploit, 1.0, torch.nan),
        tokens=assigned.exploit.float(),
        loss=1.0,
        num_samples=1,
        work=Work(assigned.exploit.numel(), train_steps=1, train_samples=1, train_tokens=1),
    )
    return update, local.state


def no_data(*_: Any) -> LocalData:
    return LocalData([], [])


def measure(folder: Path, name: str, tune: float, participants: int, per_round: int, num_rounds: int) -> dict[str, Any]:
    """One run without work; the first round, which fills caches, is left out of the medians."""
    settings = {
        "method": "idle", "model": str(folder), "task": "mini-piqa", "data.task_size": max(60, 2 * participants),
        "federation.rounds": num_rounds, "federation.participants": participants, "evaluation.samples": 1,
        "federation.participants_per_round": per_round, "budget.tune_frac": tune,
        "budget.merge_frac": 0.0 if tune == 1 else 0.25,
    }  # fmt: skip
    config = make_config(settings)
    ticks: list[float] = []
    result = federation.run(config, on_round=lambda row: ticks.append(time.process_time()))
    cpu = [after - before for before, after in itertools.pairwise(ticks)][1:]
    walls = result.rounds["round_wall_s"].iloc[2:]
    last = result.rounds.iloc[-1]
    return {
        "what": name,
        "participants": participants,
        "per_round": per_round,
        "rounds": num_rounds,
        "uplink_mb": round(float(last["uplink_bytes"]) / per_round / 1e6, 2),
        "downlink_mb": round(float(last["downlink_bytes"]) / per_round / 1e6, 2),
        "overhead_ms": round(1e3 * float(walls.median()) / per_round, 2),
        "cpu_ms": round(1e3 * statistics.median(cpu) / per_round, 2),
        "target_ms": 1e3 * TARGET_S,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--participants", type=int, default=1000, help="largest number of participants (0: no scale test)"
    )
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    methods.METHODS["idle"] = Method("idle", "No work", assign, train, profiles=False)
    participant.local_data = no_data
    rounds.evaluate = lambda *_: Score(0.0, 0.0, (0.0,))
    transformers.utils.logging.disable_progress_bar()
    cases = [("an eighth tuned", 0.125, 10, 10), ("a quarter tuned", 0.25, 10, 10), ("all tuned", 1.0, 10, 10)]
    for count in (count for count in (10, 100, 1000, 10000) if count <= given.participants):
        cases += [("scale, 10 per round", 0.25, count, 10)] + [("scale, all", 0.25, count, count)] * (count > 10)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(Path(temporary), layers=8, experts=16, hidden=128, width=64)
        for name, tune, participants, per_round in cases:
            print(json.dumps(measure(folder, name, tune, participants, per_round, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
