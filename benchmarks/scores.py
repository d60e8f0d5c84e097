"""How far a score can be trusted: its standard error, with samples that ask the same thing counted once.

    python benchmarks/scores.py            both mini models, four tasks, eight rounds of FMD each
    python benchmarks/scores.py --quick    one model, one task, one round

A generated task asks for few things, each of them with many sets of options: 1,000 samples are no 1,000 draws. Of
another world's things the score has the error ``prompts as draws``. Of this one's it has ``options as draws``, for the
test asks for every thing that the task teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import variance

import pandas as pd
import torch
from _measure import Row, options_of, table

from fluxlib import federation, models
from fluxlib.config import make_config
from fluxlib.tasks import load
from fluxlib.tasks.evaluate import evaluate

MODELS = ("mini-llama-moe", "mini-deepseek-moe")
TASKS = ("mini-mmlu", "mini-piqa", "mini-dolly", "mini-gsm8k")
SAMPLES = 1000


def errors(prompts: Sequence[str], metrics: Sequence[float]) -> tuple[float, float]:
    """Standard errors of a mean metric: with other prompts, and of the same prompts with other options.

    Samples with one prompt are one draw of the first (a cluster); a prompt with one sample has no options to draw.
    """
    of_prompt: dict[str, list[float]] = {}
    for prompt, metric in zip(prompts, metrics, strict=True):
        of_prompt.setdefault(prompt, []).append(metric)
    num, mean = len(metrics), sum(metrics) / len(metrics)
    between = sum(sum(metric - mean for metric in same) ** 2 for same in of_prompt.values())
    within = sum(len(same) * variance(same) for same in of_prompt.values() if len(same) > 1)
    return between**0.5 / num, within**0.5 / num


def row(model: str, task: str, rounds: int) -> Row:
    """A run of FMD, and what its final score is worth."""
    config = make_config({
        "method": "fmd", "model": model, "task": task, "federation.rounds": rounds, "federation.participants": 6,
        "training.local_steps": 8, "training.batch_size": 16, "training.learning_rate": 3e-3,
        "evaluation.every": rounds, "evaluation.samples": 1,
    })  # fmt: skip
    tuned = federation.run(config).model
    tests, (_, tokenizer) = load(task), models.load(model)
    samples = tests.test[:SAMPLES]
    score = evaluate(tuned, tokenizer, tests.metric, samples, config.training.max_tokens)
    of_prompts, of_options = errors([one.prompt for one in samples], score.of_each)
    plain = (score.metric * (1 - score.metric) / len(samples)) ** 0.5
    return {
        "model": model, "task": task, "samples": len(samples), "prompts": len({one.prompt for one in samples}),
        "score": score.metric, "as if all were draws": plain, "prompts as draws": of_prompts,
        "options as draws": of_options,
    }  # fmt: skip


def main() -> None:
    given = options_of(__doc__).parse_args()
    torch.set_num_threads(1)
    cells, rounds = list(product(MODELS, TASKS)), 8
    if given.quick:
        cells, rounds = cells[:1], 1
    rows = [row(model, task, rounds) for model, task in cells]
    given.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(given.out / "scores.csv", index=False)
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
