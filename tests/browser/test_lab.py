"""What a new user does: open the dashboard, turn something, run, stop, go on; run a notebook from top to bottom."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .conftest import ARTIFACTS

TIMEOUT_S = 240
"""For one step; on a machine that does nothing else all of them together take well under a minute."""

SMALL = {"task_size": 400, "local_steps": 1, "eval_samples": 16, "batch_size": 8}


NUMBERED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)
    return prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text))
}"""
"""Every code cell has been run: its number stands beside it."""


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

    def wait_text(self, text: str) -> None:
        self.page.wait_for_selector(f"text={text}")


def parametrize(notebook: Path, **values: object) -> None:
    """Other values in the parameters cell, as a user would type them."""
    content = json.loads(notebook.read_text())
    cell = next(cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "".join(f"\n{name} = {value!r}" for name, value in values.items())
    notebook.write_text(json.dumps(content))


@pytest.fixture
def dashboard(browser, lab, tmp_path):
    address, folder = lab
    parametrize(folder / "explore.ipynb", participants=2, rounds=8, settings=SMALL, out=str(tmp_path / "runs"))
    found = Page(browser, address, "explore.ipynb")
    found.run_all()
    found.page.locator("img.widget-image").first.wait_for()
    found.page.locator(".widget-hbox").first.scroll_into_view_if_needed()
    yield found
    found.page.close()


def test_the_dashboard_opens_moves_refuses_runs_stops_and_goes_on(dashboard, tmp_path):
    page = dashboard.page
    assert dashboard.errors() == []
    before = dashboard.image()
    dashboard.slider("tuned").focus()
    page.keyboard.press("ArrowRight")
    moved = dashboard.wait_image(before)
    dashboard.shot("1-before")

    page.keyboard.press("Home")
    dashboard.wait_text("tune_fraction (tuned): Input should be greater than 0")
    assert page.locator("button:has-text('Run')").last.is_disabled()
    dashboard.shot("2-impossible")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    dashboard.wait_image(moved)

    page.locator("button.widget-button:has-text('Run')").click()
    dashboard.wait_text("round 2")
    dashboard.shot("3-running")
    page.locator("button.widget-button:has-text('Stop')").click()
    dashboard.wait_text("Stopped.")
    dashboard.shot("4-stopped")
    done = sorted((tmp_path / "runs" / "checkpoints").glob("*/manifest.json"))
    assert len(done) == 1 and 2 <= json.loads(done[0].read_text())["round"] < 8

    page.locator("button.widget-button:has-text('Run')").click()
    dashboard.wait_text("Complete.")
    dashboard.shot("5-complete")
    assert not done[0].exists(), "it went on from the checkpoint and is through"
    assert dashboard.errors() == []


def test_a_notebook_runs_from_top_to_bottom(browser, lab):
    address, folder = lab
    parametrize(folder / "00_start_here.ipynb", num_samples=16)
    found = Page(browser, address, "00_start_here.ipynb")
    found.run_all()
    assert found.errors() == []
    assert found.page.locator(".jp-OutputArea-output img").count() >= 3
    found.page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    found.shot("6-notebook")
    found.page.close()
