"""The paper's claims, in its order: value, place, the number to reach, and which tables tell.

The paper: arXiv 2508.19078. Numbers of figures with a question mark are inferred. Nothing of ours is written here.
"""

from __future__ import annotations

from fluxlib.analysis.claims import federated as runs
from fluxlib.analysis.claims import lead
from fluxlib.analysis.claims import measured as m
from fluxlib.analysis.claims import reasons as r
from fluxlib.analysis.claims.base import MODELLED, Claim
from fluxlib.analysis.claims.races import TARGET_FRACTION
from fluxlib.analysis.studies.verdicts import CLOCK_LINK, TYPICAL, early_over_late
from fluxlib.figures.quality import EQUAL_ROUNDS, EQUAL_SECONDS

GRID = "run `make reproduce PROFILE=full`"
MEASURED = "measured"
BOTH = "scores and bytes measured, seconds modelled"


def _notebook(stem: str) -> str:
    return f"{GRID}: notebook `{stem}`"


CLAIMS = (
    Claim(
        "speed_up", "time to accuracy: faster than FMD by up to", "abstract", "4.75×", BOTH, GRID,
        lead.up_to, 4.75, reach=4.75, unit="x",
    ),
    Claim(
        "ahead_of_fmd", "sooner than FMD (all experts tuned, offloaded) on every task", "Fig. 10, 11", "ahead", BOTH,
        GRID, lead.ahead_of("fmd"), reach=2.0, unit="x",
    ),
    Claim(
        "ahead_of_fmq", "sooner than FMQ (all experts tuned in 4 bit) on every task", "Fig. 10, 11", "ahead", BOTH,
        GRID, lead.ahead_of("fmq"), reach=1.0, unit="x",
    ),
    Claim(
        "ahead_of_fmes", "sooner than FMES (frequent experts tuned, others dropped) on every task", "Fig. 10, 11",
        "ahead", BOTH, GRID, lead.ahead_of("fmes"), reach=1.0, unit="x",
    ),
    Claim(
        "quality_dolly", "final quality on Dolly, ROUGE-L, over FMD's, after as many rounds", "Table 2",
        "0.527 / 0.528 = 99.8 %", MEASURED, GRID,
        runs.final_quality(EQUAL_ROUNDS, "dolly"), 0.527 / 0.528, reach=0.99, unit="%", null=TARGET_FRACTION,
    ),
    Claim(
        "quality", "final quality on every task near FMD's, after as many rounds", "Table 2", "near; 99.8 % on Dolly",
        MEASURED, GRID, runs.final_quality(EQUAL_ROUNDS), 0.527 / 0.528, reach=0.99, unit="%", null=TARGET_FRACTION,
    ),
    Claim(
        "quality_in_time", "final quality on every task near FMD's, after as many device seconds", "Table 2",
        "near; 99.8 % on Dolly", BOTH, GRID, runs.final_quality(EQUAL_SECONDS), 0.527 / 0.528, reach=0.99, unit="%",
        null=TARGET_FRACTION,
    ),
    Claim(
        "fmq_oscillates", "FMQ's curve oscillates: sum of its falls over FMD's", "Fig. 10, 11", "above 1", MEASURED,
        GRID, runs.oscillation, 1.0, unit="x",
    ),
    Claim(
        "participants", "the lead holds from 10 to 30 participants", "Fig. 12, 13?", "ahead at 10, 20, 30", BOTH,
        "run FLUX and FMD with 10, 20 and 30 participants, otherwise alike, as variants of a profile",
        lead.participants, unit="x",
    ),
    Claim(
        "absolute_targets", "targets reached on the paper's data", "set-up",
        "Dolly 0.50, GSM8K 0.62, MMLU 0.75, PIQA 0.80", MEASURED,
        "the paper's models on its data were not run; with GPUs, run `make reproduce PROFILE=paper`",
        runs.absolute_targets,
    ),
    Claim(
        "memory", "memory of a training step: a 48 GB device holds FLUX's, not all experts'", "introduction",
        "fits / does not", MODELLED, _notebook("07_real_models"), m.memory,
    ),
    Claim(
        "uneven", "activation is uneven in early layers: busiest and rarest expert of the first layer", "Fig. 2",
        "> 30 % and < 5 %; last layer even", MEASURED, _notebook("01_profiling"), m.unevenness, unit="%",
    ),
    Claim(
        "dropping", "dropping experts costs more than merging them: error of the merged model below that of the rest",
        "Fig. 3a", "lower", MEASURED, _notebook("02_merging"),
        m.study("02_merging", m.below("error", "adaptive", "discarded")), 0.0, unit="%",
    ),
    Claim(
        "early_errors", "early errors are worse: the first layer's at the end over the last layer's", "Fig. 3b, 8",
        "above 1", MEASURED, _notebook("02_merging"), m.study("02_merging", early_over_late), 1.0, unit="x",
    ),
    Claim(
        "attended", "some rare experts receive much attention: share of the rare ones above the median", "Fig. 9",
        "some", MEASURED, _notebook("01_profiling"), m.attended, unit="%",
    ),
    Claim(
        "drift", "activation drifts while tuning: distance after the last round over that after the first", "Fig. 6a",
        "above 1", MEASURED, _notebook("01_profiling"), m.study("01_profiling", m.drift), 1.0, unit="x",
    ),
    Claim(
        "four_bit", "error of a 4-bit profile", "Fig. 6b?", "11.01 %", MEASURED, _notebook("01_profiling"),
        m.study("01_profiling", m.of("profile_error", "frequency error", x=4)), 0.1101, "smaller", 0.08, "%",
    ),
    Claim(
        "stale_error", "a profile one round old: error added", "Fig. 14", "< 2 %", MEASURED, _notebook("01_profiling"),
        m.study("01_profiling", m.more("profile_age", "stale, a quarter tuned", "fresh, a quarter tuned"), r.why_stale),
        0.02, "smaller", 0.02, "%",
    ),
    Claim(
        "stale_saving", f"a profile one round old: time saved in a typical round ({TYPICAL} samples)", "Fig. 7b, 14",
        "28.2 %", MODELLED, _notebook("01_profiling"),
        m.study("01_profiling", m.of("round_saving", CLOCK_LINK, x=TYPICAL), r.why_saving, m.CLOCK), 0.282, reach=0.28,
        unit="%", null=0.282,
    ),
    Claim(
        "budgets_single", "adaptive layer budgets: error below one slot per layer", "Fig. 15?", "65.6 %", MEASURED,
        _notebook("02_merging"), m.study("02_merging", m.below("error", "adaptive", "single"), r.why_budgets), 0.656,
        reach=0.656, unit="%",
    ),
    Claim(
        "budgets_uniform", "adaptive layer budgets: error below uniform ones", "Fig. 15?", "47.6 %", MEASURED,
        _notebook("02_merging"), m.study("02_merging", m.below("error", "adaptive", "uniform"), r.why_budgets), 0.476,
        reach=0.476, unit="%",
    ),
    Claim(
        "clustering", "clustering all layers at once: times faster than layer by layer", "Fig. 16?", "40×", MEASURED,
        _notebook("02_merging"), m.clustering, 40.0, reach=40.0, unit="x",
    ),
    Claim(
        "weights", "attention × frequency as merge weights: error below frequency alone", "Fig. 17", "19.2 %", MEASURED,
        _notebook("02_merging"),
        m.study("02_merging", m.below("error", "weights: attention x frequency", "weights: frequency"), r.why_weights),
        0.192, reach=0.192, unit="%",
    ),
    Claim(
        "forward_only", "utilities from one forward-only probe: cosine distance to the true ones", "Fig. 18?", "0.29",
        MEASURED, _notebook("03_role_assignment"),
        m.study("03_role_assignment", m.of("probe_cosine_distance", "one-sided (paper)", x=1), r.why_probes,
                null=m.of("probe_cosine_distance", "frequency alone", x=0)), 0.29, "smaller", 0.20,
    ),
    Claim(
        "epsilon", "a rising epsilon reaches the target before a fixed 0.3 or 0.7", "Fig. 19", "fastest", BOTH,
        _notebook("03_role_assignment"), m.fastest_epsilon, unit="x",
    ),
    Claim(
        "overhead_typical", f"FLUX's own share of a typical round ({TYPICAL} samples)", "Fig. 20", "≈ 5 %", MODELLED,
        _notebook("02_merging"),
        m.study("02_merging", m.of("own_share_device", f"{CLOCK_LINK}, serial", x=TYPICAL), r.why_share, m.CLOCK),
        0.05, "smaller", 0.05, "%",
    ),
    Claim(
        "overhead_runs", "FLUX's own share of the rounds of its runs", "Fig. 20", "≈ 5 %", BOTH, GRID,
        runs.own_share, 0.05, "smaller", 0.05, "%",
    ),
)  # fmt: skip
