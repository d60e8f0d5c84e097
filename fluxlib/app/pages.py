"""Generated parts of a Markdown page, each between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fluxlib.config import ConfigError


def section(page: Path, name: str) -> str:
    """What stands between the marks ``name`` of ``page``, without blank lines around it.

    Raises:
        ConfigError: the page is not there, or does not hold both marks once, in order.
    """
    return _parts(page, name)[1].strip()


def replace(page: Path, name: str, text: str) -> bool:
    """Put ``text`` between the marks ``name`` of ``page``; whether that changed anything.

    Raises:
        ConfigError: as in :func:`section`.
    """
    return replace_all(page, {name: text})


def replace_all(page: Path, texts: Mapping[str, str]) -> bool:
    """Put each text between the marks of its name: all of them, or none where marks are missing.

    The page is written once, whole or not at all.

    Raises:
        ConfigError: as in :func:`section`; the page is as it was.
    """
    for name in texts:
        section(page, name)
    old = new = page.read_text() if texts else ""
    for name, text in texts.items():
        begin, end = _marks(name)
        before, _, after = _split(page, new, name)
        new = f"{before}{begin}\n{text}\n{end}{after}"
    if new != old:
        temporary = page.with_name(f".{page.name}.{os.getpid()}.tmp")
        temporary.write_text(new)
        temporary.chmod(page.stat().st_mode)
        os.replace(temporary, page)
    return new != old


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    if not page.is_file():
        raise ConfigError(f"no page {page}")
    return _split(page, page.read_text(), name)


def _split(page: Path, text: str, name: str) -> tuple[str, str, str]:
    begin, end = _marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"{page} needs one {begin} and after it one {end}")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside, after
