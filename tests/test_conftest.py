"""A test that is left out is named, and fails where everything should be there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("ci", "failed", "said"), [("", 0, "1 tests left out"), ("1", 1, "left out, with CI set")])
def test_what_is_left_out_is_said(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, failed: int, said: str
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(
        "import pytest\n\ndef test_a():\n    pytest.importorskip('no_such_module')\n\n"
        "@pytest.mark.xfail\ndef test_b():\n    raise ValueError\n"
    )
    result = pytester.runpytest_inprocess("-ra", "-p", "no:xdist")
    result.assert_outcomes(failed=failed, skipped=1 - failed, xfailed=1)
    result.stdout.fnmatch_lines([f"*{said}*"])
    assert "::test_a" in result.stdout.str() and "no_such_module" in result.stdout.str()
