"""What a new user does: open the dashboard, turn something, run, stop, go on; run a notebook from top to bottom."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open

from fluxlib import records
from fluxlib.config import REPO_ROOT

from .conftest import ARTIFACTS, PATIENCE_S

TIMEOUT_S = 60
"""For one step; on a machine that does nothing else all of them together take hardly more."""

POLLING_MS = 250
"""From one look at the page to the next; Playwright's own are sixty in a second, and cost what the kernel could use."""

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

SHOWN = """() => {
    const text = item => item.textContent.trim() + (item.disabled ? ' (disabled)' : '')
    return [...document.querySelectorAll('.widget-html, button.widget-button')].map(text).filter(Boolean)
}"""

PICTURE = "img => document.querySelector('img.widget-image').src != img"

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
        # A kernel starts and imports torch: seconds, or minutes where much else runs.
        self.page.wait_for_function(NUMBERED, polling=POLLING_MS, timeout=1000 * PATIENCE_S)

    def told(self) -> str:
        """What the page says, and which buttons can be pressed; a picture of it lies in ``ARTIFACTS``."""
        self.shot(f"failed-{self.name}")
        return "\n".join(["the page showed:", *self.page.evaluate(SHOWN), *self.errors()])

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
        self.page.wait_for_function(PICTURE, arg=other_than, polling=POLLING_MS)
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
        """Until the run that is shown has finished so many rounds, a minute for each."""
        for each in range(1, number + 1):
            self.page.wait_for_function(REACHED, arg=each, polling=POLLING_MS)

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


@contextmanager
def opened(browser, address: str, name: str) -> Iterator[Page]:
    """A notebook after Run All Cells; what fails meanwhile says what the page showed."""
    found = Page(browser, address, name)
    try:
        found.run_all()
        yield found
    except BaseException as error:
        error.add_note(found.told())
        raise
    finally:
        found.page.close()


@contextmanager
def dashboard(browser, address: str) -> Iterator[Page]:
    """``explore`` after Run All Cells, its dashboard in view."""
    with opened(browser, address, "explore.ipynb") as found:
        found.page.locator("img.widget-image").first.wait_for(state="attached")
        found.page.locator(".widget-hbox").first.scroll_into_view_if_needed()
        yield found


def finished(out: Path, part: str) -> int:
    """Rounds in the checkpoint of the run whose name holds ``part``."""
    for file in (out / "checkpoints").glob(f"*{part}*.safetensors"):
        with safe_open(file, "np") as opened:
            return int(json.loads(opened.metadata()["about"])["round"])
    return 0


def test_the_dashboard_opens_moves_refuses_runs_and_stops(browser, lab, out):
    with dashboard(browser, lab[0]) as shown:
        page = shown.page
        assert shown.errors() == []
        before = shown.image()
        shown.slider("tuned").focus()
        page.keyboard.press("ArrowRight")
        moved = shown.wait_image(before)
        shown.shot("1-before")

        page.keyboard.press("Home")
        shown.wait_text("budget.tune_frac: Input should be greater than 0")
        assert shown.button("Run").is_disabled()
        shown.shot("2-impossible")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        shown.wait_image(moved)

        shown.button("Run").click()
        shown.wait_round(2)
        shown.shot("3-running")
        shown.button("Stop").click()
        shown.wait_text("Stopped.")
        shown.shot("4-stopped")
        assert 2 <= finished(out, "-t10-") < ROUNDS

        shown.slider("rounds").focus()
        page.keyboard.press("Home")
        shown.button("Run").click()
        shown.wait_text("Complete.")
        shown.shot("5-complete")

        shown.tab("Where it pays")
        page.locator("button[title='NVIDIA GeForce RTX 4090 24 GB, 100 Mb/s']").click()
        shown.wait_text("GiB usable on NVIDIA GeForce RTX 4090 24 GB")
        shown.shot("6-map")
        shown.tab("Your model")
        page.get_by_placeholder("a known name").fill(
            str(REPO_ROOT / "data" / "models" / "mini-llama-moe" / "config.json")
        )
        shown.button("What would it need?").click()
        shown.wait_text("times as soon as the best baseline")
        shown.shot("7-model")
        assert shown.errors() == []


def test_closing_the_browser_loses_nothing(browser, lab, out):
    """The page is closed while a run goes on; then the kernel is ended in the middle of it, too."""
    with dashboard(browser, lab[0]) as first:
        first.button("Run").click()
        first.wait_round(1)

    with dashboard(browser, lab[0]) as again:
        again.wait_round(2)
        end_kernels(lab[0])
    kept = finished(out, "-t25-")
    assert 2 <= kept < ROUNDS, "rounds that were finished are there, whatever was closed"

    with dashboard(browser, lab[0]) as last:
        last.tab("Run and compare")
        last.wait_text("Unfinished: ")
        last.page.locator("select[multiple] option:has-text('unfinished')").first.click()
        last.button("Use its settings").click()
        last.button("Run").click()
        last.wait_round(kept + 1)
        last.slider("tuned").focus()
        last.page.keyboard.press("ArrowRight")
        last.wait_round(kept + 2)
        last.button("Stop").click()
        last.wait_text("Stopped.")
        last.shot("8-gone-on")
        (table,) = (out / "rounds").glob("*-t25-*.parquet")
        rounds = records.read("rounds", table)["round"].tolist()
        assert rounds == list(range(len(rounds))) and len(rounds) > kept + 1
        assert last.errors() == []


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
    with opened(browser, address, "00_start_here.ipynb") as found:
        assert found.errors() == []
        assert found.page.locator(".jp-OutputArea-output img").count() >= 3
        found.page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
        found.shot("9-notebook")
