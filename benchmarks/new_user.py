"""What a new user waits for: clone, environment, first figure, dashboard, a new picture after one change.

    python benchmarks/new_user.py                      everything, packages from the index
    python benchmarks/new_user.py --venv .venv         with an environment that is there already
    python benchmarks/new_user.py --figure-only        no browser

Each step is what README says, in a clone of this repository's last commit in a temporary folder. ``clone -> ...`` are
sums without ``make venv``, which is a row of its own: mostly the package index. The dashboard is there when JupyterLab
serves ``explore.ipynb``, all its cells have been run in headless Chromium, and its picture is visible; a new picture is
timed from the key press on a slider to another picture in the page. Give it a machine that does nothing else: the load
before and after is stored with the numbers. Needs playwright and a Chromium (``FLUXLIB_CHROMIUM``) for the dashboard.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _measure import Row, machine, table

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 1200
CHANGES = 3
RUN_ALL = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget
    await notebook.context.ready
    await notebook.sessionContext.ready
    await notebook.sessionContext.session.kernel.info
    window.jupyterapp.commands.execute('notebook:run-all-cells')
}"""
SHOWN = "img.widget-image"
FIRST_FIGURE = ["-m", "fluxlib.app.cli", "notebook", "notebooks/00_start_here.ipynb", "build/start.ipynb"]


class Steps:
    """Seconds of named steps, in their order."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found = work()
        self.rows.append({"step": name, "seconds": time.perf_counter() - start})
        return found

    def total(self, *names: str) -> float:
        """Seconds of ``names`` together."""
        return float(sum(row["seconds"] for row in self.rows if row["step"] in names))


def call(command: list[str], folder: Path) -> None:
    """Run ``command``; what it says is shown if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def environment(clone: Path) -> dict[str, str]:
    """The clone's own code, whatever environment it runs in; nothing of the user's Jupyter."""
    own = {name: str(clone / "build" / "jupyter" / name) for name in ("config", "data", "runtime", "workspaces")}
    return os.environ | {
        "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": own["config"],
        "JUPYTER_DATA_DIR": own["data"], "JUPYTER_RUNTIME_DIR": own["runtime"],
        "JUPYTERLAB_WORKSPACES_DIR": own["workspaces"],
    }  # fmt: skip


@contextmanager
def jupyterlab(python: Path, clone: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``make lab`` without a browser, on a free port."""
    process = subprocess.Popen(
        [str(python), "-m", "jupyter", "lab", "--no-browser", "--port=0", "--allow-root", "--notebook-dir=.",
         "--IdentityProvider.token=new", "--LabApp.expose_app_in_browser=True"],
        cwd=clone, env=environment(clone), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def address(process: subprocess.Popen[bytes], clone: Path) -> str:
    """Where it answers."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        for file in (clone / "build/jupyter/runtime").glob("jpserver-*.json"):
            try:
                url = str(json.loads(file.read_text())["url"])
                urllib.request.urlopen(f"{url}api?token=new", timeout=5).close()
                return url
            except (ValueError, OSError, KeyError):
                pass
        time.sleep(0.05)
    sys.exit("JupyterLab did not start")


def dashboard(steps: Steps, python: Path, clone: Path) -> None:
    """JupyterLab, the dashboard's first picture, and new ones after one change each."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("FLUXLIB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with jupyterlab(python, clone) as process, sync_playwright() as driver:
        url = steps("JupyterLab answers", lambda: address(process, clone))
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1480, "height": 1050})
        page.set_default_timeout(1000 * PATIENCE_S)
        steps("page of explore.ipynb", lambda: page.goto(f"{url}lab/tree/notebooks/explore.ipynb?token=new&reset"))

        def run_all() -> None:
            page.wait_for_selector(".jp-Notebook .jp-Cell")
            page.evaluate(RUN_ALL)
            page.locator(SHOWN).first.wait_for()

        steps("Run All Cells: first picture", run_all)
        slider = page.locator(".widget-slider", has=page.locator("label:text-is('tuned')")).locator(".noUi-handle")
        for number in range(CHANGES):
            steps(f"change of one parameter -> new picture ({number + 1})", lambda: change(page, slider))
        browser.close()


def change(page: Any, slider: Any) -> None:
    """One step of the slider, until the page shows another picture."""
    before = page.locator(SHOWN).first.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([selector, before]) => document.querySelector(selector).src !== before", arg=[SHOWN, before]
    )


def sums(steps: Steps, with_dashboard: bool) -> list[Row]:
    """The rows that the README quotes."""
    rows = [{"step": "clone -> first figure", "seconds": steps.total("clone", "first notebook (00_start_here)")}]
    if with_dashboard:
        parts = ("clone", "JupyterLab answers", "page of explore.ipynb", "Run All Cells: first picture")
        rows.append({"step": "clone -> dashboard", "seconds": steps.total(*parts)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="an environment that is there; default: `make venv` in the clone")
    parser.add_argument("--figure-only", action="store_true", help="no browser")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/new_user.json"))
    given = parser.parse_args()
    steps, before = Steps(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="flux-new-user-") as folder:
        clone = Path(folder) / "flux"
        steps("clone", lambda: call(["git", "clone", "--quiet", str(ROOT), str(clone)], Path(folder)))
        if given.venv is None:
            steps("make venv", lambda: call(["make", "venv"], clone))
        python = (given.venv.absolute() if given.venv else clone / ".venv") / "bin" / "python"
        steps("first notebook (00_start_here)", lambda: call([str(python), *FIRST_FIGURE], clone))
        if not given.figure_only:
            dashboard(steps, python, clone)
    rows = [*steps.rows, *sums(steps, not given.figure_only)]
    loads = {"load_before": round(before, 2), "load_after": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    facts = machine(torch.device("cpu")) | loads | {"environment": "there already" if given.venv else "make venv"}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    print(table(rows, ["step", "seconds"]))
    print(f"load {loads['load_before']} before, {loads['load_after']} after; stored in {given.out}")


if __name__ == "__main__":
    main()
