"""Pre-training of the two mini base models: the recorded recipe, from nothing to ``data/models``.

``python -m fluxlib.pretraining mini-llama-moe`` regenerates a base. The text is the four mini formats with known
facts as they are and unknown facts drawn anew every time (:mod:`fluxlib.tasks.mini`), so a base knows the language,
the arithmetic and some of the world.

Besides the language-model loss there is one term on every router (:func:`~fluxlib.pretraining.training.router_term`).
It holds the experts' shares to a target, Zipf-like in the first MoE layer and even in the last, and lowers
H(expert | label), more with depth: experts specialise by label and none starves. It is the mutual-information loss of
Mod-Squad (Chen et al., CVPR 2023) with a target in place of evenness.
"""

from fluxlib.pretraining.bases import build_model, build_tokenizer
from fluxlib.pretraining.training import RECIPES, Recipe, pretrain

__all__ = ["RECIPES", "Recipe", "build_model", "build_tokenizer", "pretrain"]
