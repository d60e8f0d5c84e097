"""The paper's claims beside what the tables say: the claims table.

- :mod:`fluxlib.claims.paper` -- the claims: the paper's value, its place, the number to reach, which tables tell,
- :mod:`fluxlib.claims.base` -- what a claim and a reading are, and the rule of a verdict,
- :mod:`fluxlib.claims.races` -- FLUX against each method, seed by seed, misses counted,
- :mod:`fluxlib.claims.federated`, :mod:`fluxlib.claims.measured` -- readers of runs and of study notebooks,
- :mod:`fluxlib.claims.table` -- one row per claim, Markdown, the README's sections.
"""

from fluxlib.claims import federated, measured
from fluxlib.claims.base import VERDICTS, Claim, Reading, Tables, load
from fluxlib.claims.measured import clock_check
from fluxlib.claims.paper import CLAIMS
from fluxlib.claims.races import races, scores, scores_markdown, speed_up_markdown, speed_ups, timed
from fluxlib.claims.table import SECTIONS, claims, goals, page_sections, readings, summary, to_markdown

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
    "load",
    "measured",
    "page_sections",
    "races",
    "readings",
    "scores",
    "scores_markdown",
    "speed_up_markdown",
    "speed_ups",
    "summary",
    "timed",
    "to_markdown",
]
