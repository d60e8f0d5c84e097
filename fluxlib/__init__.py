"""FLUX: federated fine-tuning of Mixture-of-Experts language models on devices too small for them.

The library under the notebooks. Read it in the order of the paper: :mod:`fluxlib.moe` is the seam at which a
model's experts are exchanged, :mod:`fluxlib.profiling`, :mod:`fluxlib.merging` and :mod:`fluxlib.roles` are
sections 4, 5 and 6, :mod:`fluxlib.methods` is what one participant does in one round and
:mod:`fluxlib.federation` runs the rounds.
"""

__version__ = "0.1.0"
