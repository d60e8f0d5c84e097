"""Experts that are not tuned, merged into few frozen ones (section 5 of the paper).

:func:`plan` does it all: how many slots each layer gets (:func:`layer_budgets`, eq. 1), which experts resemble one
another (:func:`features`, :func:`cluster`), and how much of each goes into its slot (:func:`merge_weights`, eq. 2).
Beyond the paper, :func:`joint_clusters` answers the first two questions at once, :func:`align_neurons` improves the
averages, :func:`budgets_by_error` spends slots where merging was measured to hurt, and :func:`output_grams` compares
experts by what they answer. :func:`reusable_slots` keeps what a round has not changed. :func:`output_error` says what
merging costs, :func:`discard` is the comparison. The model is only read; :func:`fluxlib.moe.compact.customize` carries
a plan out.
"""

from fluxlib.merging.budgets import layer_budgets
from fluxlib.merging.clustering import cluster, inertia
from fluxlib.merging.error import output_error
from fluxlib.merging.features import features, match_neurons
from fluxlib.merging.joint import joint_clusters
from fluxlib.merging.measured import budgets_by_error, error_curves, growth, one_layer
from fluxlib.merging.outputs import output_grams
from fluxlib.merging.plan import align_neurons, discard, merge_weights, plan
from fluxlib.merging.reuse import compact_layers, reusable_slots

__all__ = [
    "align_neurons",
    "budgets_by_error",
    "cluster",
    "compact_layers",
    "discard",
    "error_curves",
    "features",
    "growth",
    "inertia",
    "joint_clusters",
    "layer_budgets",
    "match_neurons",
    "merge_weights",
    "one_layer",
    "output_error",
    "output_grams",
    "plan",
    "reusable_slots",
]
