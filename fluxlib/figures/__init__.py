"""Figures: pure functions from a tidy table to a picture; nothing is simulated here.

- :mod:`fluxlib.figures.canvas` -- what a picture is, saving it as pdf, png and csv, intervals over seeds
- :mod:`fluxlib.figures.times` -- time to target as a table, and in words
- :mod:`fluxlib.figures.comparison` -- convergence and time to accuracy of several methods
- :mod:`fluxlib.figures.portraits` -- one model, one partition, one run
"""

from fluxlib.figures.canvas import Picture, save
from fluxlib.figures.comparison import convergence, time_to_accuracy
from fluxlib.figures.portraits import activation, activation_by_label, partition, phases
from fluxlib.figures.times import describe_times, time_to_target, times_to_target

__all__ = [
    "Picture",
    "activation",
    "activation_by_label",
    "convergence",
    "describe_times",
    "partition",
    "phases",
    "save",
    "time_to_accuracy",
    "time_to_target",
    "times_to_target",
]
