"""Pre-training of the two mini base models: the recorded recipe, from nothing to ``data/models``.

``python data/pretraining/pretrain.py mini-llama-moe`` regenerates a base; without a name all. The text is the four mini
formats with known facts as they are and unknown facts drawn anew every time (:mod:`fluxlib.tasks.mini`), so a base
knows the language, the arithmetic and some of the world.

Besides the language-model loss there is one term on every router (:func:`recipe.router_term`). It holds the experts'
shares to a target, Zipf-like in the first MoE layer and even in the last, and lowers H(expert | label), more with
depth: experts specialise by label and none starves. It is the mutual-information loss of Mod-Squad (Chen et al.,
CVPR 2023) with a target in place of evenness.
"""

import json
import sys

from model_card import room_to_learn, routing, write_card
from recipe import RECIPES, pretrain

from fluxlib import models
from fluxlib.config import data_dir


def main(names: list[str]) -> None:
    """Pre-train, score and describe the bases called ``names`` (all, if none is named)."""
    for name in names or list(RECIPES):
        folder = data_dir() / "models" / name
        record = pretrain(name, folder)
        record |= {"routing": routing(name, folder), "scores": room_to_learn(name, folder)}
        (folder / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
        write_card(folder)
        models.write_checksums(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
