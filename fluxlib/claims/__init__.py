"""The paper's claims beside what the tables say: the claims table.

- :mod:`fluxlib.claims.paper` -- the claims: the paper's value, its place, the number to reach, which tables tell,
- :mod:`fluxlib.claims.base` -- what a claim and a reading are; the rule of a verdict is
  :mod:`fluxlib.studies.verdicts`'s, for the study notebooks as well,
- :mod:`fluxlib.claims.races` -- FLUX against each method, seed by seed, misses counted,
- :mod:`fluxlib.claims.lead`, :mod:`fluxlib.claims.federated`, :mod:`fluxlib.claims.measured` -- readers: who is
  sooner, scores and overhead of runs, the study notebooks; :mod:`fluxlib.claims.reasons` -- why,
- :mod:`fluxlib.claims.stored` -- the settings of stored runs, and which of them are no evidence,
- :mod:`fluxlib.claims.table` -- one row per claim, Markdown, the README's sections.
"""

from fluxlib.claims import federated, lead, measured
from fluxlib.claims.base import VERDICTS, Claim, Reading, Tables, load
from fluxlib.claims.measured import clock_check
from fluxlib.claims.paper import CLAIMS
from fluxlib.claims.races import races, scores, scores_markdown, speed_up_markdown, speed_ups, timed
from fluxlib.claims.stored import left_out
from fluxlib.claims.table import SECTIONS, claims, goals, page_sections, races_markdown, readings, summary, to_markdown

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
