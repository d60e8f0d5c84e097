"""Generated parts of a page: what lies between the marks changes, and nothing else."""

from __future__ import annotations

import pytest

from fluxlib.app import pages
from fluxlib.config import ConfigError


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- claims:begin -->\nold\n<!-- claims:end -->\nafter\n")
    assert pages.replace(page, "claims", "new") and not pages.replace(page, "claims", "new")
    assert page.read_text() == "before\n<!-- claims:begin -->\nnew\n<!-- claims:end -->\nafter\n"
    assert pages.section(page, "claims") == "new"


@pytest.mark.parametrize("text", ["", "<!-- a:end --><!-- a:begin -->", "<!-- a:begin -->" * 2 + "<!-- a:end -->"])
def test_a_page_without_its_marks_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    with pytest.raises(ConfigError, match="no page"):
        pages.section(page, "a")
    page.write_text(text)
    with pytest.raises(ConfigError, match="needs one <!-- a:begin --> and after it one <!-- a:end -->"):
        pages.replace(page, "a", "new")


def test_several_sections_are_replaced_at_once_or_not_at_all(tmp_path):
    page = tmp_path / "page.md"
    marks = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("a", "b"))
    page.write_text(marks)
    with pytest.raises(ConfigError, match="<!-- c:begin -->"):
        pages.replace_all(page, {"a": "new", "c": "new"})
    assert page.read_text() == marks and [file.name for file in tmp_path.iterdir()] == ["page.md"]
    assert pages.replace_all(page, {"a": "1", "b": "2"}) and not pages.replace_all(page, {"a": "1", "b": "2"})
    assert (pages.section(page, "a"), pages.section(page, "b")) == ("1", "2")
