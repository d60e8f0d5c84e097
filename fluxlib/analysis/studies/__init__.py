"""What the study notebooks measure, as rows of the ``measurements`` table: one file per notebook.

A notebook names what is to be measured and shows it; how it is measured is here, so that both mini models, all tasks
and all seeds go through the same code.
"""

from fluxlib.analysis.studies.bench import Bench, Row, benches, measurements, row
from fluxlib.analysis.wording import REAL_SHAPES
