"""Generated parts of a page: what lies between the marks changes, and nothing else."""

from __future__ import annotations

import pytest

from fluxlib import pages
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
