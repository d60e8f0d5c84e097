"""What a curious server learns of its participants' data.

    python benchmarks/privacy.py --out benchmarks/results    the tables of docs/security.md: half an hour of a core
    python benchmarks/privacy.py --quick                     one round with each method

The server does its work and keeps what it gets. It has rows of its own, of every label, and knows what a round of local
steps on them does to the base model. After each round it asks two questions about each participant; answers are added
up over the rounds.

``label``: which labels have more than an even share of its data? What came (tokens per expert, utilities, changes) is
taken apart into what the server's own rows of each label give, without negative amounts.

``row``: was this very row among its data? Beside each of its rows stands another of the same label, which nobody holds.
A row is suspected when the first hundredth of the change lowers its loss, which is the product of the change with the
row's gradient; or when its own routing leans to where the participant's counts are above what its labels explain.

An answer is an AUC: 0.5 is a guess, 1 is certainty. Cells hold the mean, its 95 % t interval, and the number of values:
participants of all seeds, or for the cost the seeds.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from _measure import Row, machine, options_of, table, write
from flwr.app import Message
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor, nn

from fluxlib import models, profiling, roles, tasks
from fluxlib.analysis.statistics import interval
from fluxlib.config import RunConfig, make_config
from fluxlib.federation import LocalGrid, load_task
from fluxlib.federation.client import client_app, local_copy
from fluxlib.federation.protocol.messages import TrainReport
from fluxlib.federation.protocol.sync import ExpertStore
from fluxlib.federation.protocol.wire import Experts
from fluxlib.federation.server.join import join
from fluxlib.federation.server.strategy import FluxStrategy
from fluxlib.gradients.patching import sample_losses
from fluxlib.methods.base import ExpertKey
from fluxlib.methods.local import Tuned, customized, tune
from fluxlib.moe import find
from fluxlib.moe.capture import capture
from fluxlib.moe.compact import LayerPlan
from fluxlib.tasks.base import Example
from fluxlib.tasks.batches import make_batch
from fluxlib.tasks.evaluate import evaluate

SEEDS, PARTICIPANTS, ROUNDS = (0, 1), 4, 3
PLAN = (
    ("mini-llama-moe", "mini-mmlu", 80, ("flux", "flux_plus", "fmd")),
    ("mini-llama-moe", "mini-mmlu", 20, ("flux",)),
    ("mini-llama-moe", "mini-piqa", 80, ("flux",)),
)
"""Model, task, rows of each participant, and methods."""
TEST_TASK = 1250
"""Of its samples a fifth are for tests: all ask for facts that the training rows tell."""
OWN_SEED = 1_000_000
"""Added to the run's seed: the world is the same to the server's own rows, the rows are others."""
SUSPECTS, SLOPE, MAX_TOKENS = 40, 0.01, 128


def auc(scores: Tensor, truth: Tensor) -> float:
    """How often a true one has the higher score; NaN where all are true, or none is."""
    above = scores[truth][:, None] - scores[~truth][None]
    return float(((above > 0).double() + 0.5 * (above == 0)).mean())


def shares(references: Tensor, seen: Tensor) -> Tensor:
    """``[labels]``: what of each reference ``[labels, d]`` adds up to ``seen [d]``, without negative amounts."""
    references, seen = references.double(), seen.double()
    products = references @ references.T
    products += 1e-9 * products.diagonal().mean() * torch.eye(len(products))
    factor = torch.linalg.cholesky(products).numpy()
    found, _ = nnls(factor.T, solve_triangular(factor, (references @ seen).numpy(), lower=True))
    return torch.from_numpy(found)


def flat(changes: Experts, keys: Iterable[ExpertKey]) -> Tensor:
    return torch.cat([tensor.flatten() for key in keys for tensor in changes[key].values()])


def by_layer(counts: Tensor) -> Tensor:
    """``[..., L * E]`` counts as shares of their layer's."""
    return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1e-12)).flatten(-2)


@contextmanager
def changed(model: nn.Module, changes: Experts, size: float) -> Iterator[None]:
    """``model`` with ``size`` times the changes on it; afterwards it is what it was."""
    found, before = find.layers(model), {}
    for key, tensors in changes.items():
        old = find.expert_tensors(found[key[0]].experts, key[1])
        before[key] = {name: tensor.clone() for name, tensor in old.items()}
        new = {name: old[name] + size * tensor for name, tensor in tensors.items()}
        find.write_expert(found[key[0]].experts, key[1], new)
    yield
    for key, tensors in before.items():
        find.write_expert(found[key[0]].experts, key[1], tensors)


@torch.no_grad()
def seen_by(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``[B]`` summed token losses of each row, and ``[B, L, E]`` its tokens at each expert."""
    with capture(model) as seen:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counts, _, _ = profiling.count(seen, batch["attention_mask"].bool(), find.layers(model)[0].num_experts)
    return sample_losses(logits, batch["labels"]), counts


SAME = ("model", "task", "seed", "data.task_size", "federation.participants")
"""Settings that what the server knows depends on."""


def others(config: RunConfig) -> dict[str, list[Example]]:
    """Rows that no participant holds, by label."""
    task, _ = load_task(config)
    taught = {(row.prompt, row.response) for row in task.train}
    rows: dict[str, list[Example]] = {label: [] for label in task.labels}
    for row in dict.fromkeys(tasks.load(config.task, OWN_SEED + config.seed).train):
        if (row.prompt, row.response) not in taught:
            rows[row.label].append(row)
    return rows


@lru_cache(maxsize=1)
def references(config: RunConfig) -> list[Tuned]:
    """What a round of local steps on the server's own rows of each label does to every expert of the base model."""
    (model, tokenizer), training = models.load(config.model), config.training
    found = []
    for of_label in others(config).values():
        rows = of_label[-training.local_steps * training.batch_size :]
        batches = [
            make_batch(rows[step :: training.local_steps], tokenizer, training.max_tokens)
            for step in range(training.local_steps)
        ]
        plans = [LayerPlan(tuned=tuple(range(layer.num_experts))) for layer in find.layers(model)]
        with customized(model, plans, config) as compact:
            found.append(tune(model, compact, batches, config))
    return found


class Suspects:
    """Rows of one participant, and as many of the same labels that nobody holds, with the scores that they got."""

    def __init__(self, own: Sequence[Example], strangers: dict[str, list[Example]], task: tasks.Task, tokenizer: Any):
        rows = list(dict.fromkeys(own))[:SUSPECTS]
        wanted = Counter(row.label for row in rows)
        every = rows + [row for label, count in wanted.items() for row in strangers[label][:count]]
        labels, held = task.labels, Counter(row.label for row in own)
        self.batch, self.member = make_batch(every, tokenizer, MAX_TOKENS), torch.arange(len(every)) < len(rows)
        self.label = torch.tensor([labels.index(row.label) for row in every])
        self.holds = torch.tensor([held[label] > len(own) / len(labels) for label in labels])
        self.of_rows: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(self.member), dtype=torch.float64))
        self.of_labels: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(labels), dtype=torch.float64))

    def suspect(self, name: str, scores: Tensor) -> None:
        """Add a round's scores of the rows, as their distances from the mean of their label."""
        scores = scores.double()
        scores = scores - torch.stack([scores[self.label == label].mean() for label in self.label])
        self.of_rows[name] += scores / scores.std().clamp(min=1e-12)

    def answers(self) -> Iterator[Row]:
        """Each question, what was looked at, and the AUC."""
        for name, scores in self.of_labels.items():
            yield {"question": "label", "seen": name, "value": auc(scores, self.holds)}
        for name, scores in self.of_rows.items():
            yield {"question": "row", "seen": name, "value": auc(scores, self.member)}


class Curious(FluxStrategy):
    """A server that looks at each reply before it takes it in."""

    def __init__(self, config: RunConfig, store: ExpertStore, tokenizer: Any) -> None:
        super().__init__(LocalGrid(client_app.app, config.federation.participants), config, store)
        self.members = join(self.grid, config, store)
        self.known = references(make_config({name: config.settings()[name] for name in SAME}))
        (task, parts), rows = load_task(config), others(config)
        self.suspects = [Suspects([task.train[i] for i in part], rows, task, tokenizer) for part in parts]

    def profile(self, number: int, participants: Sequence[int]) -> None:
        super().profile(number, participants)
        if self.method.profiles:
            for one in participants:
                _, routed = seen_by(self.store.model, self.suspects[one].batch)
                self.look_at_counts("frequencies", one, self.role_state.first[one], routed)

    def receive(self, number: int) -> Iterator[Message]:
        for reply in super().receive(number):
            report = TrainReport.from_records(reply.content, self.config.wire.uplink, self.store.shapes)
            one, update = report.participant, report.update
            before, routed = seen_by(self.store.model, self.suspects[one].batch)
            self.look_at_changes(one, update.changes, before)
            self.look_at_counts("tokens", one, update.tokens, routed)
            self.look_at_utilities(one, update.utilities)
            yield reply

    def look_at_counts(self, name: str, participant: int, came: Tensor, routed: Tensor) -> None:
        """``came [L, E]`` of tokens, or what is in proportion to it; ``routed [B, L, E]`` of each suspect."""
        suspects, came = self.suspects[participant], by_layer(came)
        known = by_layer(torch.stack([one.tokens for one in self.known]))
        suspects.of_labels[name] += (found := shares(known, came))
        expected = found.float() @ known
        suspects.suspect(name, (by_layer(routed) - known[suspects.label]) @ ((came - expected) / (expected + 1e-3)))

    def look_at_utilities(self, participant: int, came: Tensor) -> None:
        known, there = torch.stack([roles.utility(one.squared_norms, one.tokens) for one in self.known]), ~came.isnan()
        if there.any():
            self.suspects[participant].of_labels["utilities"] += shares(known[:, there], came[there])

    def look_at_changes(self, participant: int, changes: Experts, before: Tensor) -> None:
        suspects = self.suspects[participant]
        known = torch.stack([flat(one.changes, changes) for one in self.known])
        suspects.of_labels["changes"] += shares(known, flat(changes, changes))
        with changed(self.store.model, changes, SLOPE):
            suspects.suspect("changes", before - seen_by(self.store.model, suspects.batch)[0])


def scored(model: nn.Module, tokenizer: Any, config: RunConfig) -> dict[str, float]:
    task = tasks.load(config.task, config.seed, TEST_TASK)
    score = evaluate(model, tokenizer, task.metric, task.test, config.training.max_tokens)
    return {task.metric: score.metric, "loss": score.loss}


def measure(config: RunConfig) -> Iterator[Row]:
    """What the server of one run learns of each participant, and the scores of the model before and after."""
    local_copy.workspace.cache_clear()
    model, tokenizer = models.load(config.model)
    before = scored(model, tokenizer, config)
    server = Curious(config, ExpertStore(model, config.wire.downlink), tokenizer)
    for number in range(1, config.federation.rounds + 1):
        server.run_round(number)
    after = scored(model, tokenizer, config)
    for seen, value in (after | {f"{name} before": score for name, score in before.items()}).items():
        yield {"question": "cost", "seen": seen, "value": value}
    for suspects in server.suspects:
        yield from suspects.answers()


NAMES = ("setting", "method")


def runs(quick: bool) -> Iterator[tuple[Row, RunConfig]]:
    """Every run, with what it is called in the tables."""
    for model, task, rows, methods in PLAN[:1] if quick else PLAN:
        for seed, method in itertools.product(SEEDS[:1] if quick else SEEDS, methods):
            config = make_config({
                "method": method, "model": model, "task": task, "seed": seed,
                "federation.participants": PARTICIPANTS, "federation.rounds": 1 if quick else ROUNDS,
                "data.task_size": rows * PARTICIPANTS * 5 // 4,
            })  # fmt: skip
            yield {"setting": f"{model}, {task}, {rows} rows", "method": method}, config


def wide(found: Sequence[Row], question: str) -> list[Row]:
    """The answers to a question: a row per setting and method, a column for each thing that was looked at."""
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in found:
        if row["question"] == question:
            names = tuple(row[name] for name in NAMES)
            groups.setdefault(names, {}).setdefault(row["seen"], []).append(row["value"])
    return [
        dict(zip(NAMES, names, strict=True)) | {seen: cell(values, question != "cost") for seen, values in of.items()}
        for names, of in groups.items()
    ]


def cell(values: Sequence[float], is_auc: bool) -> str:
    """Mean, interval (an AUC's ends at 1) and number of the values."""
    mean, low, high = interval(values)
    return f"{mean:.2f} [{low:.2f}, {min(high, 1.0) if is_auc else high:.2f}] {len(values)}"


def main() -> None:
    parser = options_of(__doc__)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    for names, config in runs(given.quick):
        print(*names.values(), flush=True)
        found += [names | row for row in measure(config)]
    facts, text = machine(torch.device("cpu")), []
    tables = {question: wide(found, question) for question in ("label", "row", "cost")}
    for question, rows in tables.items():
        columns = dict.fromkeys(name for row in rows for name in row)
        text += [f"## {question}", "", table(rows, list(columns)), ""]
    write(given.out, "privacy", {"machine": facts} | tables, "\n".join(["# Privacy", "", str(facts), "", *text]))


if __name__ == "__main__":
    main()
