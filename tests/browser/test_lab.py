"""What a new user does: open the dashboard, turn something, run, stop, go on; run a notebook from top to bottom."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest

from fluxlib import records

from .conftest import ARTIFACTS

TIMEOUT_S = 600
"""For one step; on a machine that does nothing else all of them together take well under a minute."""

ROUNDS = 40
"""More than are done before a page is closed and opened again: no test waits for the last one."""

SMALL = {"data.task_size": 400, "training.local_steps": 1, "evaluation.samples": 16, "training.batch_size": 8}


NUMBERED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)
    return prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text))
}"""
"""Every code cell has been run: its number stands beside it."""


REACHED = """number => {
    const said = [...document.querySelectorAll('.widget-html')].map(item => item.textContent.match(/round (\\d+) of/))
    return said.some(found => found && Number(found[1]) >= number)
}"""

READY = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget
    await notebook.context.ready
    await notebook.sessionContext.ready
    await notebook.sessionContext.session.kernel.info
}"""
"""Cells that are run before the kernel has answered are not run at all."""


class Page:
    """A notebook in JupyterLab, and the few things that are done to it."""

    def __init__(self, browser, address: str, name: str) -> None:
        self.page = browser.new_page(viewport={"width": 1480, "height": 1050})
        self.page.set_default_timeout(1000 * TIMEOUT_S)
        self.problems: list[str] = []
        self.name = name
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(f"{address}lab/tree/{name}?token=test&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.command("application:toggle-left-area")

    def command(self, name: str) -> None:
        """What a menu does; it is not waited for, and what it gives is not sent over."""
        self.page.evaluate(f"() => {{ window.jupyterapp.commands.execute('{name}') }}")

    def run_all(self) -> None:
        """As a user: Run > Run All Cells, and wait until the last code cell has its number."""
        self.page.evaluate(READY)
        self.command("notebook:run-all-cells")
        try:
            self.page.wait_for_function(NUMBERED)
        except Exception:
            self.shot(f"failed-{self.name}")
            raise

    def errors(self) -> list[str]:
        found = self.page.query_selector_all(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
        return [item.inner_text()[-500:] for item in found] + self.problems

    def shot(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")

    def image(self) -> str:
        """Where the picture of the plan comes from: another address is another picture."""
        return str(self.page.locator("img.widget-image").first.get_attribute("src"))

    def wait_image(self, other_than: str) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while self.image() == other_than and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        assert self.image() != other_than, "the picture did not change"
        return self.image()

    def slider(self, label: str):
        return self.page.locator(".widget-slider", has=self.page.locator(f"label:text-is('{label}')")).locator(
            ".noUi-handle"
        )

    def button(self, text: str):
        return self.page.locator(f"button.widget-button:has-text('{text}')")

    def tab(self, title: str) -> None:
        self.page.locator(f".lm-TabBar-tab:has-text('{title}')").last.click()

    def wait_round(self, number: int) -> None:
        """Until the run that is shown has finished so many rounds."""
        self.page.wait_for_function(REACHED, arg=number)

    def wait_text(self, text: str) -> None:
        self.page.wait_for_selector(f"text={text}")


def parametrize(notebook: Path, **values: object) -> None:
    """Other values in the parameters cell, as a user would type them."""
    content = json.loads(notebook.read_text())
    cell = next(cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "".join(f"\n{name} = {value!r}" for name, value in values.items())
    notebook.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def out(tmp_path_factory, lab):
    """Where the dashboard of this lab keeps its runs; its parameters cell says so."""
    folder = tmp_path_factory.mktemp("explore")
    parametrize(lab[1] / "explore.ipynb", participants=2, rounds=ROUNDS, settings=SMALL, out=str(folder))
    return folder


@pytest.fixture(scope="module")
def opened(browser, lab, out):
    """The dashboard after Run All Cells."""
    found = open_dashboard(browser, lab[0])
    yield found
    found.page.close()


def open_dashboard(browser, address: str) -> Page:
    found = Page(browser, address, "explore.ipynb")
    found.run_all()
    found.page.locator("img.widget-image").first.wait_for(state="attached")
    found.page.locator(".widget-hbox").first.scroll_into_view_if_needed()
    return found


def finished(out: Path, part: str) -> int:
    """Rounds in the checkpoint of the run whose name holds ``part``."""
    found = list((out / "checkpoints").glob(f"*{part}*/manifest.json"))
    return int(json.loads(found[0].read_text())["round"]) if found else 0


def test_the_dashboard_opens_moves_refuses_runs_and_stops(opened, out):
    page = opened.page
    assert opened.errors() == []
    before = opened.image()
    opened.slider("tuned").focus()
    page.keyboard.press("ArrowRight")
    moved = opened.wait_image(before)
    opened.shot("1-before")

    page.keyboard.press("Home")
    opened.wait_text("tuned (tune_fraction): Input should be greater than 0")
    assert opened.button("Run").is_disabled()
    opened.shot("2-impossible")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    opened.wait_image(moved)

    opened.button("Run").click()
    opened.wait_round(2)
    opened.shot("3-running")
    opened.button("Stop").click()
    opened.wait_text("Stopped.")
    opened.shot("4-stopped")
    assert 2 <= finished(out, "-t10-") < ROUNDS

    # While the kernel is busy, a button's message overtakes a slider's: the picture says that the slider's is there.
    before = opened.image()
    opened.slider("rounds").focus()
    page.keyboard.press("Home")
    opened.wait_image(before)
    opened.button("Run").click()
    opened.wait_text("Complete.")
    opened.shot("5-complete")
    assert opened.errors() == []


def test_closing_the_browser_loses_nothing(browser, lab, out):
    """The page is closed while a run goes on; then the kernel is ended in the middle of it, too."""
    first = open_dashboard(browser, lab[0])
    first.button("Run").click()
    first.wait_round(1)
    first.page.close()

    again = open_dashboard(browser, lab[0])
    again.wait_round(2)
    end_kernels(lab[0])
    again.page.close()
    kept = finished(out, "-t25-")
    assert 2 <= kept < ROUNDS, "rounds that were finished are there, whatever was closed"

    last = open_dashboard(browser, lab[0])
    last.tab("Run and compare")
    last.wait_text("Unfinished: ")
    last.page.locator("select[multiple] option:has-text('unfinished')").first.click()
    last.button("Use its settings").click()
    last.button("Run").click()
    last.wait_round(kept + 1)
    last.button("Stop").click()
    last.wait_text("Stopped.")
    last.shot("6-gone-on")
    (table,) = (out / "rounds").glob("*-t25-*.parquet")
    rounds = records.read("rounds", table)["round"].tolist()
    assert rounds == list(range(len(rounds))) and len(rounds) > kept + 1
    assert last.errors() == []
    last.page.close()


def end_kernels(address: str) -> None:
    """What a machine that is switched off does to them: no cell is told."""
    headers = {"Authorization": "token test"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}api/kernels", headers=headers)) as answer:
        kernels = json.load(answer)
    for kernel in kernels:
        request = urllib.request.Request(f"{address}api/kernels/{kernel['id']}", headers=headers, method="DELETE")
        urllib.request.urlopen(request).close()


def test_a_notebook_runs_from_top_to_bottom(browser, lab):
    address, folder = lab
    parametrize(folder / "00_start_here.ipynb", num_samples=16)
    found = Page(browser, address, "00_start_here.ipynb")
    found.run_all()
    assert found.errors() == []
    assert found.page.locator(".jp-OutputArea-output img").count() >= 3
    found.page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    found.shot("7-notebook")
    found.page.close()
