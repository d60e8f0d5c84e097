"""What every test needs: one thread (runs are compared bit by bit), no network, cases that repeat, nothing hidden."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")


LONGEST = ("test_smoke.py", "test_deployment.py", "test_lab.py", "test_pipeline.py", "test_engines.py")

TIMES = int(os.environ.get("FLUX_CASES", "1"))
"""``FLUX_CASES=100``: as many times the cases of every property, other ones each time."""
settings.register_profile(
    "flux", max_examples=150 * TIMES, deadline=None, database=None, derandomize=TIMES == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("flux")


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU that is not there; with several workers, begin with the longest files."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With ``CI`` set a test that is left out has failed: everything it needs should be there, but for a GPU."""
    report = yield
    if item.get_closest_marker("cuda"):
        return report
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"left out, with CI set: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter):
    """Count and name the tests that were left out."""
    left_out = terminalreporter.stats.get("skipped", [])
    terminalreporter.section(f"{len(left_out)} tests left out")
    for report in left_out:
        terminalreporter.line(f"{report.nodeid}: {report.longrepr[2]}")
