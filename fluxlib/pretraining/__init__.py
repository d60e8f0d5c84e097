"""Pre-training of the two mini base models: the recorded recipe, from nothing to ``data/models``.

``python -m fluxlib.pretraining mini-llama-moe`` regenerates a base. The text is the four mini formats with known
facts as they are and unknown facts drawn anew every time (:mod:`fluxlib.tasks.mini`), so a base knows the language,
the arithmetic and some of the world.

Besides the language-model loss there is one term on the router, after the mutual-information loss of Mod-Squad
(Chen et al., CVPR 2023): ``I(expert; label) = H(expert) - H(expert | label)`` is raised in every MoE layer, so that
experts specialise by label without any expert dying. The weight of ``H(expert)`` grows with depth: early layers
may stay skewed, late layers become even, as section 3 of the paper observes in large models.
"""

from fluxlib.pretraining.bases import build_model, build_tokenizer
from fluxlib.pretraining.training import RECIPES, Recipe, pretrain

__all__ = ["RECIPES", "Recipe", "build_model", "build_tokenizer", "pretrain"]
