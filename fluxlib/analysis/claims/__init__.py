"""The paper's claims (``claims.yaml``) beside what the tables say, claim by claim, and one verdict each (``judge``)."""

from fluxlib.analysis.claims.judge import CLAIMS, VERDICTS, Claim, Reading
from fluxlib.analysis.claims.table import claims, in_notebook, read, readings, summary, to_markdown
from fluxlib.analysis.claims.tables import Tables, load
