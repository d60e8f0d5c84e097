"""Which expert each participant tunes, and which it only looks at (section 6 of the paper).

- :mod:`fluxlib.roles.utility`: what an expert is worth (eq. 3) and how much of a budget exploits that
  (epsilon).
- :mod:`fluxlib.roles.assignment`: :func:`assign` (eq. 4), with rotation, coverage and a limit of tuners as
  options.
- :mod:`fluxlib.roles.policy`: by what experts are chosen: FLUX's rule and what it is compared with.
- :mod:`fluxlib.roles.state`: what the server remembers between rounds, and what it believes of what it is
  told.

Everything is a pure function of its arguments. P participants, L MoE layers, E experts per layer.
"""

from fluxlib.roles.assignment import Assignment, assign
from fluxlib.roles.policy import PROBES, num_probed, priorities
from fluxlib.roles.state import Fault, RoleState, ages, current_utilities, overdue, uncertainty_bonus, update
from fluxlib.roles.utility import epsilon_schedule, first_utilities, utility

__all__ = [
    "PROBES",
    "Assignment",
    "Fault",
    "RoleState",
    "ages",
    "assign",
    "current_utilities",
    "epsilon_schedule",
    "first_utilities",
    "num_probed",
    "overdue",
    "priorities",
    "uncertainty_bonus",
    "update",
    "utility",
]
