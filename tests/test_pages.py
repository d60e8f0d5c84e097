"""The generated pages of ``docs`` are up to date; what they are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest

from fluxlib import records
from fluxlib.config import REPO_ROOT, SETTINGS


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_up_to_date(name):
    assert (REPO_ROOT / "docs" / name).read_text() == pages.PAGES[name](), "`make pages` writes it anew"


def test_only_what_changed_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGES", {"a.md": lambda: "one", "b.md": lambda: "two"})
    assert [page.name for page in pages.write_all(tmp_path)] == ["a.md", "b.md"]
    (tmp_path / "b.md").write_text("something else")
    assert pages.write_all(tmp_path) == [tmp_path / "b.md"] and (tmp_path / "b.md").read_text() == "two"


def test_every_setting_has_a_meaning_and_what_is_allowed():
    text = pages.settings()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\S+)` \| (.+) \| `(.*)` \| (.+) \|$", text, re.M)}
    assert list(rows) == list(SETTINGS) and not any(meaning == "None" for _, _, meaning in rows.values())
    assert rows["federation.rounds"] == ("integer ≥ 1", "10", "rounds of the run, at most")
    assert rows["merging.budgets"][0] == "`adaptive`, `uniform`, `single`, `joint`"
    assert rows["roles.epsilon"][0] == "`dynamic`, `paper` or number"
    assert rows["evaluation.samples"][:2] == ("integer ≥ 1 or None", "None")


def test_every_column_is_in_the_data_dictionary():
    text = pages.tables()
    for table in records.TABLES:
        for column in records.columns(table):
            assert f"| `{column.name}` | {column.dtype} |" in text
            assert column.description


def picture(folder: Path, stem: str, numbers: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.png").write_bytes(b"")
    (folder / f"{stem}.csv").write_text(numbers)


def test_a_family_of_figures_appears_once_with_its_scale(tmp_path):
    folder = tmp_path / pages.FIGURES
    rows = "task,seed,clock_model,link\nmini-mmlu,0,llama-moe-3.5b,1gbps\nmini-mmlu,1,llama-moe-3.5b,1gbps\n"
    for model in pages.MODELS:
        picture(folder, f"convergence-{model}", rows)
    picture(folder, "of_its_own-mini-deepseek-moe", "value\n1\n")
    picture(folder, "all_models", "model,seed\na,0\nb,0\n")
    text = pages.gallery(tmp_path)
    assert re.findall(r"\(../(figures/[^)]+)\)", text) == [
        "figures/full/convergence-mini-llama-moe.png",
        "figures/full/all_models.png",
        "figures/full/of_its_own-mini-deepseek-moe.png",
    ]
    scale = "`mini-llama-moe` · `mini-mmlu` · 2 seeds · device clock: llama-moe-3.5b over 1gbps"
    assert f"**Score over time of each method (Fig. 10, 11).** {scale} |" in text
    assert "**all models.** `a, b` · 1 seed |" in text and "**of its own.** `mini-deepseek-moe` |" in text


def test_every_tracked_figure_has_a_title():
    assert set(pages.families(REPO_ROOT / pages.FIGURES)) <= set(pages.FAMILIES)
