"""``python -m fluxlib.pretraining [NAME ...]``: regenerate the mini bases."""

import json
import sys

from fluxlib import models
from fluxlib.config import data_dir
from fluxlib.pretraining.report import room_to_learn, routing, write_card
from fluxlib.pretraining.training import RECIPES, pretrain


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
