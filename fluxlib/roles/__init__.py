"""Which expert each participant tunes, and which it only looks at (section 6 of the paper).

- :mod:`fluxlib.roles.utility`: what an expert is worth (eq. 3) and how much of a budget exploits that (epsilon).
- :mod:`fluxlib.roles.assignment`: by what experts are chosen (:func:`priorities`), and the choice, eq. 4
  (:func:`assign`).
- :mod:`fluxlib.roles.state`: what the server remembers between rounds, and what it believes of what it is told.

Everything is a pure function of its arguments. P participants, L MoE layers, E experts per layer.
"""

from fluxlib.roles.assignment import Roles, assign, num_probed, priorities
from fluxlib.roles.state import Fault, RoleState, ages, current_utilities, update
from fluxlib.roles.utility import epsilon_schedule, first_utilities, utility
