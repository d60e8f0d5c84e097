"""Two processes never write the same run; a crash leaves nothing that blocks."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fluxlib import federation
from fluxlib.config import RunConfig
from fluxlib.federation.store import lock
from fluxlib.io import ConfigError


def hold(folder: Path, held: Any) -> None:
    with lock.hold(folder, "one"):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process, a copy of this one: it has nothing to import."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_holds_the_run(holder: BaseProcess, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"in which process {holder.pid} on \S+ is running one at this moment"):
        with lock.hold(tmp_path, "one"):
            pass
    with lock.hold(tmp_path, "another"):
        pass


def test_a_killed_holder_leaves_nothing_that_blocks(holder: BaseProcess, tmp_path: Path) -> None:
    holder.kill()
    holder.join()
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
