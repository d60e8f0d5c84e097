"""Which expert each participant tunes, and which it only looks at (section 6 of the paper).

Everything is a pure function of its arguments. P participants, L MoE layers, E experts per layer.
"""

from fluxlib.roles.assignment import Roles, assign, num_probed, priorities
from fluxlib.roles.state import Fault, RoleState, ages, current_utilities, update
from fluxlib.roles.utility import epsilon_schedule, first_utilities, utility
