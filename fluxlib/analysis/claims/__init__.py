"""The paper's claims beside what the tables say: the claims table.

- :mod:`fluxlib.analysis.claims.paper` -- the claims: the paper's value, its place, the number to reach, which tables tell,
- :mod:`fluxlib.analysis.claims.base` -- what a claim and a reading are; the rule of a verdict is
  :mod:`fluxlib.analysis.studies.verdicts`'s, for the study notebooks as well,
- :mod:`fluxlib.analysis.claims.races` -- FLUX against each method, seed by seed, misses counted,
- :mod:`fluxlib.analysis.claims.lead`, :mod:`fluxlib.analysis.claims.federated`, :mod:`fluxlib.analysis.claims.measured` -- readers: who is
  sooner, scores and overhead of runs, the study notebooks; :mod:`fluxlib.analysis.claims.reasons` -- why,
- :mod:`fluxlib.analysis.claims.stored` -- the settings of stored runs, and which of them are no evidence,
- :mod:`fluxlib.analysis.claims.table` -- one row per claim, Markdown, the README's sections.
"""

from fluxlib.analysis.claims import federated, lead, measured
from fluxlib.analysis.claims.base import VERDICTS, Claim, Reading, Tables, load
from fluxlib.analysis.claims.measured import clock_check
from fluxlib.analysis.claims.paper import CLAIMS
from fluxlib.analysis.claims.races import races, scores, scores_markdown, speed_up_markdown, speed_ups, timed
from fluxlib.analysis.claims.stored import left_out
from fluxlib.analysis.claims.table import (
    SECTIONS,
    claims,
    goals,
    page_sections,
    races_markdown,
    readings,
    summary,
    to_markdown,
)

__all__ = [
    "CLAIMS",
    "SECTIONS",
    "VERDICTS",
    "Claim",
    "Reading",
    "Tables",
    "claims",
    "clock_check",
    "federated",
    "goals",
    "lead",
    "left_out",
    "load",
    "measured",
    "page_sections",
    "races",
    "races_markdown",
    "readings",
    "scores",
    "scores_markdown",
    "speed_up_markdown",
    "speed_ups",
    "summary",
    "timed",
    "to_markdown",
]
