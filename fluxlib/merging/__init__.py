"""Experts that are not tuned, merged into few frozen ones (section 5 of the paper).

:func:`plan` does it all: how many slots each layer gets (:func:`layer_budgets`, eq. 1), which experts resemble one
another (:func:`features`, :func:`cluster`), and how much of each goes into its slot (:func:`merge_weights`, eq. 2).
Beyond the paper, :func:`joint_clusters` answers the first two questions at once, and :func:`align_neurons` improves
the averages; :class:`Slots` stay from round to round. :func:`output_error` and :func:`growth` say what merging costs.
The model is only read; :func:`fluxlib.moe.compact.customize` carries a plan out.
"""

from fluxlib.merging.budgets import layer_budgets
from fluxlib.merging.clustering import cluster, inertia
from fluxlib.merging.error import growth, output_error
from fluxlib.merging.features import features, match_neurons
from fluxlib.merging.joint import joint_clusters
from fluxlib.merging.plan import align_neurons, merge_weights, plan
from fluxlib.merging.slots import Slots, can_stay, join, lack_a_place, merge_slots, plans_of
