"""What FLUX+ saves, measured here: seconds of a participant's round beside FLUX's and FMD's, and its profile's error.

    python benchmarks/flux_plus.py             both mini models, five rounds of each method
    python benchmarks/flux_plus.py --quick     one model, one round

Nothing crosses a network. Methods take turns, so that each has the same machine; medians. A sixteenth of the experts is
tuned and merged, as in the race. FLUX's profile may run while a server works, but takes this machine's time too.
``speedup``: FMD's seconds over the method's.

``training``: frequencies that FLUX+ sees in its training's own passes, through its customised model, against those of
the whole model on the same samples in full precision; ``4 bit``: of FLUX's profile of two batches, against the same.
"""

from __future__ import annotations

from functools import partial

import torch
from _measure import Row, interleaved, machine, options_of, summary, table, write

from fluxlib import methods, profiling, roles, seeding
from fluxlib.analysis import studies
from fluxlib.config import RunConfig, make_config
from fluxlib.methods.base import Budget, LocalData, LocalRound, ParticipantState
from fluxlib.methods.local import profile, size

METHODS = ("fmd", "flux", "flux_plus")
SHARE = 1 / 16
CPU = torch.device("cpu")


def local_round(name: str, bench: studies.Bench, config: RunConfig, state: ParticipantState) -> LocalRound:
    """The round of a participant whose utilities are its frequencies."""
    known = state.profile
    assert known is not None
    places = round(SHARE * known.frequency.numel())
    budget, believed = Budget(places, places), roles.RoleState.start(known.frequency[None])
    assigned = methods.get(name).assign(believed, [budget], 0.8, seeding.generator(0, "assign"), config)[0]
    batches = bench.local(config.training.local_steps * config.training.batch_size)
    data = LocalData(batches, batches[: config.profiling.batches])
    return LocalRound(state, assigned, budget, data, config, 2, seeding.generator(0, "train"))


def play(bench: studies.Bench, local: LocalRound) -> None:
    """All that one participant does in a round."""
    method = methods.get(local.config.method)
    method.train(bench.model, local)
    if method.afterwards:
        profile(bench.model, local.data, local.config)


def main() -> None:
    parser = options_of(__doc__)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = make_config({"training.local_steps": 8})
    times: list[Row] = []
    errors: list[Row] = []
    for model in list(studies.REAL_SHAPES)[: 1 if given.quick else None]:
        (bench,) = studies.benches(model, ["mini-mmlu"], [0])
        first = profiling.profile(bench.model, bench.local(32), bits=4)
        locals_ = {
            name: local_round(name, bench, config.updated({"method": name}), ParticipantState(first))
            for name in METHODS
        }
        found = interleaved(
            {name: partial(play, bench, local) for name, local in locals_.items()}, 1 if given.quick else 5, CPU
        )
        for name, seconds in found.items():
            times.append({"model": model, "method": name} | summary(seconds, found["fmd"]))
        _, state = methods.get("flux_plus").train(bench.model, locals_["flux_plus"])
        trained = locals_["flux_plus"].data.train
        truth = profiling.profile(bench.model, trained, bits=16)
        for name, seen, samples in (("4 bit", first, 32), ("training", state.profile, size(trained)[0])):
            assert seen is not None
            error = profiling.frequency_error(seen, truth)
            errors.append({"model": model, "profile": name, "samples": samples, "error": error})
    facts = machine(CPU)
    text = "\n".join([
        f"mini-mmlu, one participant, seed 0; {facts}", "",
        table(times, ["model", "method", "median_s", "speedup"]), "",
        table(errors, ["model", "profile", "samples", "error"]),
    ])  # fmt: skip
    write(given.out, "flux_plus", {"machine": facts, "times": times, "errors": errors}, text)


if __name__ == "__main__":
    main()
