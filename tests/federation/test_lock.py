"""Two processes never write the same run; a crash leaves nothing that blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxlib import federation
from fluxlib.config import ConfigError, RunConfig
from fluxlib.federation.store import lock

HOLD = """
import sys, time
from pathlib import Path
from fluxlib.federation.store import lock
with lock.hold(Path(sys.argv[1]), "one"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_the_run(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"in which process {holder.pid} on \S+ is running one at this moment"):
        with lock.hold(tmp_path, "one"):
            pass
    with lock.hold(tmp_path, "another"):
        pass


def test_a_killed_holder_leaves_nothing_that_blocks(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / ".one.lock").exists()
    with lock.hold(tmp_path, "one"):
        assert f"process {os.getpid()} on" in (tmp_path / ".one.lock").read_text()


def test_a_lock_is_held_against_this_process_too_and_given_back(tmp_path: Path) -> None:
    with lock.hold(tmp_path, "one"), pytest.raises(ConfigError, match="running one"):
        with lock.hold(tmp_path, "one"):
            pass
    with lock.hold(tmp_path, "one"):
        pass


def test_a_run_holds_its_folder(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config({"federation.rounds": 1})
    with lock.hold(tmp_path, config.run_id), pytest.raises(ConfigError, match=f"running {config.run_id}"):
        federation.run(config, out=tmp_path)
    federation.run(config, out=tmp_path)
