"""Figures: pure functions from a tidy table to a picture; nothing is simulated here.

- :mod:`fluxlib.figures.canvas` -- what a picture is, saving it as pdf, png and csv, intervals over seeds
- :mod:`fluxlib.figures.times` -- time to target as a table, and in words
- :mod:`fluxlib.figures.comparison` -- convergence and time to accuracy of several methods
- :mod:`fluxlib.figures.portraits` -- one model, one partition, one run
- :mod:`fluxlib.figures.plans` -- a configuration before it is run, and roles over rounds
- :mod:`fluxlib.figures.runs` -- single runs side by side
- :mod:`fluxlib.figures.timeline` -- what ran when
- :mod:`fluxlib.figures.trials` -- the search for each method's settings
- :mod:`fluxlib.figures.measured` -- what figures of the ``measurements`` table share
- :mod:`fluxlib.figures.profiling`, :mod:`fluxlib.figures.merging` -- sections 4 and 5 of the paper
- :mod:`fluxlib.figures.overhead` -- what a round costs, by phase, memory and link
- :mod:`fluxlib.figures.sensitivity` -- who is ahead on other devices and links
- :mod:`fluxlib.figures.scale` -- participants, their heterogeneity and budgets
- :mod:`fluxlib.figures.claims` -- the claims table as a picture
- :mod:`fluxlib.figures.real` -- the public models on the catalogue's devices
- :mod:`fluxlib.figures.probes`, :mod:`fluxlib.figures.roles`, :mod:`fluxlib.figures.role_tables` -- section 6
"""

from fluxlib.figures import measured, merging, overhead, probes, profiling, real, role_tables, roles, scale, sensitivity
from fluxlib.figures.canvas import Picture, save
from fluxlib.figures.claims import draw_claims, draw_speed_ups
from fluxlib.figures.comparison import convergence, time_to_accuracy
from fluxlib.figures.plans import overview, roles_over_rounds, slots
from fluxlib.figures.portraits import activation, activation_by_label, partition, phases
from fluxlib.figures.runs import compare_runs, curves
from fluxlib.figures.timeline import timeline
from fluxlib.figures.times import (
    describe_times,
    option_table,
    time_to_target,
    times_to_target,
    with_variants,
    without_reference,
)
from fluxlib.figures.trials import draw_trials, trials

__all__ = [
    "Picture",
    "activation",
    "activation_by_label",
    "compare_runs",
    "convergence",
    "curves",
    "describe_times",
    "draw_claims",
    "draw_speed_ups",
    "draw_trials",
    "measured",
    "merging",
    "option_table",
    "overhead",
    "overview",
    "partition",
    "phases",
    "probes",
    "profiling",
    "real",
    "role_tables",
    "roles",
    "roles_over_rounds",
    "save",
    "scale",
    "sensitivity",
    "slots",
    "time_to_accuracy",
    "time_to_target",
    "timeline",
    "times_to_target",
    "trials",
    "with_variants",
    "without_reference",
]
