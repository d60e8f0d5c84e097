"""FLUX's and FLUX+'s merging held against other authors' rules for keeping fewer experts, on both mini models.

    python benchmarks/rivals.py             four tasks, three seeds, ten minutes of one core; writes docs/rivals.md
    python benchmarks/rivals.py --quick     one task, one seed, one model

A quarter or an eighth of the experts is left; in a third setting half of the eighth are the most used ones, as they
are, and the rule decides on the others alone, as in a round of FLUX+ that tunes a sixteenth. Every rule sees the same
samples of one participant, with the model in full precision; what it loses is measured on other samples of the same
participant:

- divergence: of the predictions of every next token from the full model's, in nats per token,
- error: of the hidden state behind the last layer, as a share of its length, mean over tokens,
- loss: how much worse the tokens of the answers are predicted, in nats per token.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from _measure import Row, table
from _references import (
    Fewer,
    Seen,
    frequency,
    grouped,
    hc_smoe,
    in_force,
    lifted,
    m_smoe,
    observe,
    one_by_one,
    ream,
    reap,
    rest,
)
from torch import Tensor

from fluxlib import merging, profiling, records
from fluxlib.analysis import studies
from fluxlib.analysis.statistics import geometric
from fluxlib.analysis.studies.bench import tuned_experts
from fluxlib.config import REPO_ROOT, MergingConfig
from fluxlib.merging.features import gram_of
from fluxlib.methods.flux_plus import MERGING
from fluxlib.moe import find

TASKS = ("mini-gsm8k", "mini-mmlu", "mini-piqa", "mini-dolly")
SETTINGS = {
    "a quarter of the experts left": (4, False),
    "an eighth of the experts left": (8, False),
    "an eighth left, half of it tuned": (8, True),
}
"""One in so many experts is left; whether half of these are the most used ones, as they are."""
SAMPLES = 32
"""That every rule sees: as many as FLUX profiles in a round."""
FIELDS = ("divergence", "error", "loss")
FULL, PAGE = REPO_ROOT / "data" / "results" / "full" / "measurements", REPO_ROOT / "docs" / "rivals.md"
MARK = "<!-- below: python benchmarks/rivals.py --page -->"


@dataclass(frozen=True)
class Case:
    """One participant's samples, what the full model does with them, and experts that stay as they are ``[L, E]``."""

    bench: studies.Bench
    batches: Sequence[dict[str, Tensor]]
    known: profiling.Profile
    seen: Sequence[Seen]
    tuned: Tensor

    @classmethod
    def of(cls, bench: studies.Bench) -> Case:
        batches = bench.local(SAMPLES)
        seen = observe(bench.model, find.layers(bench.model), batches)
        known = profiling.profile(bench.model, batches, bits=16)
        return cls(bench, batches, known, seen, torch.zeros_like(known.frequency, dtype=torch.bool))


def flux(rules: MergingConfig, case: Case, kept: int) -> list[Fewer]:
    """The library's own plan, with as many slots over all layers."""
    plans = merging.plan(case.bench.model, case.known, case.tuned, kept * len(case.seen), rules)
    return [Fewer(plan) for plan in plans]


def sized(case: Case, kept: int) -> list[Fewer]:
    """A trial: FLUX+'s objective with sizes in the place of gates.

    An expert counts by the squared length of what it adds, a layer by what its experts add to the median token.
    Neurons are aligned, down projections fitted to the participant's tokens.
    """
    layers = find.layers(case.bench.model)
    sizes = [(seen.gates.T * seen.outputs.norm(dim=2)).square().sum(dim=1) for seen in case.seen]
    sizes, others = [size / size.sum() for size in sizes], [(~row).nonzero().flatten() for row in case.tuned]
    costs = []
    for layer, seen, size, members in zip(layers, case.seen, sizes, others, strict=True):
        gram = gram_of(layer.experts)
        costs.append(gram[members][:, members] * seen.added.median() / (size @ gram.diagonal()))
    weights = [size[members] for size, members in zip(sizes, others, strict=True)]
    labels = merging.joint_clusters(costs, weights, kept * len(layers))
    found = []
    for layer, seen, label, weight, tuned in zip(layers, case.seen, labels, weights, case.tuned, strict=True):
        plan = lifted(Fewer(grouped(clusters(label), weight)), tuned).plan
        found.append(Fewer(merging.align_neurons(layer, plan), fit_to=seen))
    return found


def clusters(labels: Tensor) -> list[tuple[int, ...]]:
    return [tuple((labels == slot).nonzero().flatten().tolist()) for slot in range(int(labels.max()) + 1)]


def each(rule: Callable[[Seen, int], Fewer], case: Case, kept: int) -> list[Fewer]:
    """A rule for one layer."""
    return [lifted(rule(rest(*pair), kept), pair[1]) for pair in zip(case.seen, case.tuned, strict=True)]


def everywhere(rule: Callable[[Sequence[Seen], int], list[Fewer]], case: Case, kept: int) -> list[Fewer]:
    """A rule for all layers at once."""
    found = rule([rest(*pair) for pair in zip(case.seen, case.tuned, strict=True)], kept)
    return [lifted(*pair) for pair in zip(found, case.tuned, strict=True)]


def behind_merged(tied: bool, case: Case, kept: int) -> list[Fewer]:
    """REAM as its authors have it; or with the router tied and the smallest groups that hold every expert."""

    def rule(tuned: Tensor, seen: Seen) -> Fewer:
        size = {"group_size": -(-int((~tuned).sum()) // kept)} if tied else {}
        return lifted(ream(rest(seen, tuned), kept, tied=tied, **size), tuned)

    return one_by_one(case.bench.model, case.batches, [partial(rule, tuned) for tuned in case.tuned])


def fitted(rule: Callable[[Case, int], list[Fewer]], case: Case, kept: int) -> list[Fewer]:
    """Another's groups with the trial's down projections."""
    return [replace(fewer, fit_to=seen) for fewer, seen in zip(rule(case, kept), case.seen, strict=True)]


RULES: dict[str, Callable[[Case, int], list[Fewer]]] = {
    "FLUX": partial(flux, MergingConfig()),
    "FLUX+": partial(flux, MERGING),
    "frequency dropping": partial(each, frequency),
    "REAP": partial(each, reap),
    "REAM": partial(behind_merged, False),
    "REAM, router tied, small groups": partial(behind_merged, True),
    "HC-SMoE": partial(each, hc_smoe),
    "M-SMoE": partial(everywhere, m_smoe),
    "trial: FLUX+ by size, fitted": sized,
    "trial: HC-SMoE, fitted": partial(fitted, partial(each, hc_smoe)),
}


@torch.no_grad()
def look(bench: studies.Bench) -> tuple[Tensor, Tensor, float]:
    """Of the held-out samples: log-probabilities ``[N, V]`` of every next token, last hidden states, answers' loss."""
    last, _ = find.decoder_layers(bench.model, find.layers(bench.model)[-1])
    hidden: list[Tensor] = []
    handle = last[-1].register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if type(out) is tuple else out))
    found, labels = [], []
    for batch in bench.held_out:
        logits = bench.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        real = batch["attention_mask"].bool()
        hidden[-1] = hidden[-1][real]
        found.append(logits[:, :-1][real[:, 1:]].log_softmax(dim=1))
        labels.append(batch["labels"][:, 1:][real[:, 1:]])
    handle.remove()
    predicted, label = torch.cat(found), torch.cat(labels)
    asked = label >= 0
    return predicted, torch.cat(hidden), float(-predicted[asked, label[asked]].mean())


def losses(case: Case) -> Iterator[Row]:
    """Rows of every setting and rule."""
    bench, num_experts = case.bench, len(case.seen[0].experts)
    truth, states, loss = look(bench)
    for (title, (one_in, halved)), name in itertools.product(SETTINGS.items(), RULES):
        kept = num_experts // one_in
        if halved:
            kept //= 2
            case = replace(case, tuned=tuned_experts(case.known, kept / num_experts))
        else:
            case = replace(case, tuned=torch.zeros_like(case.tuned))
        with in_force(bench.model, RULES[name](case, kept)):
            found, changed, worse = look(bench)
        values = (
            (truth.exp() * (truth - found)).sum(dim=1).mean(),
            ((changed - states).norm(dim=1) / states.norm(dim=1)).mean(),
            worse - loss,
        )
        for field, value, unit in zip(FIELDS, values, ("nats/token", "", "nats/token"), strict=True):
            yield bench.row(f"{field}: {title}", name, float(value), x=1 / one_in, unit=unit)


COLUMNS = {
    "divergence": "divergence", "times": "times FLUX+'s", "below": "below FLUX+'s in", "error": "error",
    "loss": "loss, added",
}  # fmt: skip


def rows_of(frame: pd.DataFrame, title: str) -> list[Row]:
    """One row per rule, least divergence first: means over tasks and seeds.

    ``times``: divergence over FLUX+'s, geometric mean over tasks and the seeds' 95 % t interval.
    """
    wide = frame.pivot(index=["seed", "task"], columns=["study", "setting"], values="value")
    divergence = wide[f"divergence: {title}"]
    ratio = divergence.div(divergence["FLUX+"], axis=0)
    found = []
    for name in ratio.columns[ratio.apply(lambda values: geometric(values)[0]).argsort()]:
        mean, low, high = geometric(geometric(ratio.loc[seed, name])[0] for seed in ratio.index.unique("seed"))
        is_own = name == "FLUX+"
        found.append(
            {"rule": name, "times": "1" if is_own else f"{mean:.2f} ({low:.2f} to {high:.2f})"}
            | {"below": "" if is_own else f"{int((ratio[name] < 1).sum())} of {len(ratio)}"}
            | {field: f"{wide[f'{field}: {title}'][name].mean():.3f}" for field in FIELDS}
        )
    return found


def tables(frame: pd.DataFrame) -> str:
    """Markdown: a table for each model and setting."""
    parts = []
    for (model, rows), title in itertools.product(frame.groupby("model", sort=False), SETTINGS):
        named = [{"rule": row["rule"]} | {COLUMNS[key]: row[key] for key in COLUMNS} for row in rows_of(rows, title)]
        parts += [f"**`{model}`, {title}**", table(named, list(named[0]))]
    return "\n\n".join(parts)


def write_page() -> str:
    """Put the tables of what is stored below the line of the page that asks for it."""
    kept = [records.read("measurements", FULL / f"rivals-{model}.parquet") for model in studies.REAL_SHAPES]
    text, found = PAGE.read_text(), tables(pd.concat(kept))
    PAGE.write_text(text[: text.index(MARK) + len(MARK)] + f"\n\n{found}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one task, one seed, one model; the page stays as it is")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables of the page anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in [] if given.page else list(studies.REAL_SHAPES)[: 1 if given.quick else None]:
        start, rows = pd.Timestamp.now("UTC").to_pydatetime(), []
        for bench in studies.benches(model, TASKS[:1] if given.quick else TASKS, range(1 if given.quick else 3)):
            print(bench.model_name, bench.task, bench.seed, flush=True)
            rows += losses(Case.of(bench))
        frame = studies.measurements(rows, f"rivals-{model}")
        if given.quick:
            print(tables(frame))
        else:
            about = records.about_run({"samples": SAMPLES, "rules": list(RULES)}, start)
            records.write("measurements", frame, FULL / f"rivals-{model}.parquet", about)
    if not given.quick:
        print(write_page())


if __name__ == "__main__":
    main()
