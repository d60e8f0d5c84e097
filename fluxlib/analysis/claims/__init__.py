"""The paper's claims beside what the tables say.

- ``claims.yaml`` -- the claims: the paper's value, its place, the number to reach, what ours is computed from,
- :mod:`~fluxlib.analysis.claims.base` -- a claim, and the tables that tell,
- :mod:`~fluxlib.analysis.claims.judge` -- the rule of a verdict,
- :mod:`~fluxlib.analysis.claims.values`, :mod:`~fluxlib.analysis.claims.of_studies` -- numbers of the study notebooks,
- :mod:`~fluxlib.analysis.claims.of_runs` -- time to target, final quality and overhead of whole runs,
- :mod:`~fluxlib.analysis.claims.table` -- one row per claim, Markdown, the page ``docs/claims.md``.
"""

from fluxlib.analysis.claims.base import CLAIMS, Claim, Tables, load
from fluxlib.analysis.claims.judge import VERDICTS, Reading
from fluxlib.analysis.claims.of_studies import clock_check
from fluxlib.analysis.claims.table import claims, goals, in_notebook, page, read, readings, summary, to_markdown

__all__ = [
    "CLAIMS",
    "VERDICTS",
    "Claim",
    "Reading",
    "Tables",
    "claims",
    "clock_check",
    "goals",
    "in_notebook",
    "load",
    "page",
    "read",
    "readings",
    "summary",
    "to_markdown",
]
