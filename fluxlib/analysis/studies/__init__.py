"""What the study notebooks measure, as rows of the ``measurements`` table.

A notebook names what is to be measured and shows it; how it is measured is here, so that both mini models, all tasks
and all seeds go through the same code.

- :mod:`~fluxlib.analysis.studies.bench` -- a model, one participant's batches, and rows of the table,
- :mod:`~fluxlib.analysis.studies.profiling`, :mod:`~fluxlib.analysis.studies.training` -- section 4 of the paper,
- :mod:`~fluxlib.analysis.studies.merging`, :mod:`~fluxlib.analysis.studies.overhead` -- section 5,
- :mod:`~fluxlib.analysis.studies.real`, :mod:`~fluxlib.analysis.studies.host` -- the clock at real shapes, and here,
- :mod:`~fluxlib.analysis.studies.sensitivity` -- stored runs on the clock of other devices and links.
"""

from fluxlib.analysis.studies.bench import REAL_SHAPES, Bench, benches, measurements, row

__all__ = ["REAL_SHAPES", "Bench", "benches", "measurements", "row"]
