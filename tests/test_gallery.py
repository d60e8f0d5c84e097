"""The README's gallery is made of the tracked figures, every family once."""

from __future__ import annotations

import re
from pathlib import Path

from fluxlib.app import gallery, pages
from fluxlib.config import REPO_ROOT


def picture(folder: Path, stem: str, numbers: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.png").write_bytes(b"")
    (folder / f"{stem}.csv").write_text(numbers)


def test_a_family_appears_once_with_its_scale(tmp_path):
    folder = tmp_path / gallery.FOLDER
    rows = "task,seed,clock_model,link\nmini-mmlu,0,llama-moe-3.5b,1gbps\nmini-mmlu,1,llama-moe-3.5b,1gbps\n"
    for model in gallery.MODELS:
        picture(folder, f"convergence-{model}", rows)
    picture(folder, "of_its_own-mini-deepseek-moe", "value\n1\n")
    picture(folder, "all_models", "model,seed\na,0\nb,0\n")
    text = gallery.gallery(tmp_path)
    assert re.findall(r"\((figures/[^)]+)\)", text) == [
        "figures/full/convergence-mini-llama-moe.png",
        "figures/full/all_models.png",
        "figures/full/of_its_own-mini-deepseek-moe.png",
    ]
    scale = "`mini-llama-moe` · `mini-mmlu` · 2 seeds · device clock: llama-moe-3.5b over 1gbps"
    assert f"**Score over time of each method.** {scale} |" in text
    assert "**all models.** `a, b` · 1 seed |" in text and "**of its own.** `mini-deepseek-moe` |" in text


def test_the_readme_shows_every_tracked_figure_as_it_is():
    shown = pages.section(REPO_ROOT / "README.md", "gallery")
    assert shown == gallery.gallery().strip(), "`python -m fluxlib.app.gallery` writes it anew"
    for family in gallery.families(REPO_ROOT / gallery.FOLDER):
        assert family in gallery.TITLES, f"fluxlib.app.gallery.TITLES does not say what {family} shows"
