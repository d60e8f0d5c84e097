"""A real JupyterLab in a real, headless Chromium: both are set up here, or the tests say why they are left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fluxlib.config import REPO_ROOT

ARTIFACTS = REPO_ROOT / "build" / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL_S = 300
PATIENCE_S = 300
"""For a server to start or end: five seconds where nothing else runs, minutes where much does."""
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-color-profile=srgb",
]  # fmt: skip


def find_chromium() -> str | None:
    """``$FLUXLIB_CHROMIUM``, or a browser on the path."""
    given = os.environ.get("FLUXLIB_CHROMIUM")
    return given if given else next((found for name in NAMES if (found := shutil.which(name))), None)


def install_chromium() -> str:
    """Try Debian's package where that is possible; gives why it was not, or an empty text."""
    if os.environ.get("FLUXLIB_NO_INSTALL"):
        return "FLUXLIB_NO_INSTALL is set"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return "installing it takes apt-get and root"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", "chromium"]):
        try:
            done = subprocess.run(
                ["apt-get", *command], capture_output=True, text=True, env=environment, timeout=INSTALL_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} took more than {INSTALL_S} s"
        if done.returncode:
            return f"apt-get {command[0]} failed: {done.stderr.strip()[-200:]}"
    return ""


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium with a profile of its own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests left out: playwright is not installed")
    reason = "" if find_chromium() else install_chromium()
    path = find_chromium()
    if path is None:
        pytest.skip(f"browser tests left out: no Chromium on the path ({reason}); FLUXLIB_CHROMIUM may name one")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A JupyterLab of its own, on copies of the notebooks; gives its address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "notebooks"
    shutil.copytree(REPO_ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".*"))
    log = (folder / "lab.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "jupyter", "lab", "--no-browser", "--port=0", "--allow-root",
            "--IdentityProvider.token=test", f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True",
            "--ServerApp.log_level=WARN",
        ],
        env=os.environ | _folders(folder) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)},
        stdout=subprocess.DEVNULL, stderr=log,
    )  # fmt: skip
    try:
        yield _address(process, folder), notebooks
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def _folders(folder: Path) -> dict[str, str]:
    """Nothing of the person who runs the tests is read or written; no news is fetched, all cells are in the page."""
    settings = folder / "settings" / "@jupyterlab"
    for extension, name, values in (
        ("apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
        ("application-extension", "sidebar", {}),
    ):
        file = settings / extension / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
    }


def _address(process: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            try:
                url = json.loads(file.read_text())["url"]
                urllib.request.urlopen(f"{url}api?token=test", timeout=5).close()
                return str(url)
            except (ValueError, OSError, KeyError):
                pass
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {(folder / 'lab.log').read_text()[-2000:]}")
