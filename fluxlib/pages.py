"""Generated parts of a Markdown page, each between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

from __future__ import annotations

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
    before, old, after = _parts(page, name)
    new = f"\n{text}\n"
    if new != old:
        begin, end = _marks(name)
        page.write_text(f"{before}{begin}{new}{end}{after}")
    return new != old


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    if not page.is_file():
        raise ConfigError(f"no page {page}")
    begin, end = _marks(name)
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"{page} needs one {begin} and after it one {end}")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside, after
