"""Figures: pure functions from a tidy table to a picture, one per figure, named after it; nothing is simulated here.

- :mod:`fluxlib.figures.picture`, :mod:`fluxlib.figures.marks`, :mod:`fluxlib.figures.style` -- files, marks, colours
- :mod:`fluxlib.figures.profiling`, :mod:`fluxlib.figures.merging`, :mod:`fluxlib.figures.roles` -- sections 4, 5 and 6
- :mod:`fluxlib.figures.race` -- methods side by side: convergence, time to target, final quality
- :mod:`fluxlib.figures.overhead`, :mod:`fluxlib.figures.scale` -- what a round costs, and what that depends on
- :mod:`fluxlib.figures.real_models` -- the public models on the catalogue's devices
- :mod:`fluxlib.figures.claims` -- the claims table
- :mod:`fluxlib.figures.dashboard` -- one configuration, one run
"""

from fluxlib.figures import claims, dashboard, merging, overhead, profiling, race, real_models, roles, scale
from fluxlib.figures.picture import Picture, save
