"""A call that takes no longer than it may: what stops a participant that hangs.

A Python call cannot be interrupted from outside, so it runs in a thread of its own. When its time is over, an exception
is raised in that thread, which ends it as soon as it is back in Python (a loop, a ``sleep`` that is over); a call that
never comes back from C is left behind. Either way the caller goes on, and must not use anything that the call may still
be writing to.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class TimeLimitExceeded(TimeoutError):
    """A call took longer than it may; the message says how long that was."""


class _Abandoned(BaseException):
    """Raised in the thread whose time is over; no handler of ``Exception`` keeps it alive."""


def call(limit_s: float | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, or what it raises.

    Args:
        limit_s: seconds that it may take; ``None``: call it directly, without a limit.

    Raises:
        TimeLimitExceeded: it was not back in time.
    """
    if limit_s is None:
        return function(*arguments)
    results: list[Result] = []
    errors: list[BaseException] = []
    start = time.monotonic()
    end = start

    def work() -> None:
        nonlocal end
        try:
            results.append(function(*arguments))
        except BaseException as error:  # given to the caller, who decides
            errors.append(error)
        end = time.monotonic()

    thread = threading.Thread(target=work, name="limited", daemon=True)
    thread.start()
    try:
        thread.join(limit_s)
    except BaseException:  # who waits was interrupted
        _end(thread)
        raise
    if thread.is_alive():
        _end(thread)
    if thread.is_alive() or end - start > limit_s:  # also what came back too late on a busy machine
        raise TimeLimitExceeded(f"it took longer than the {limit_s:g} s it may take")
    if errors:
        raise errors[0]
    return results[0]


def _end(thread: threading.Thread) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Abandoned))
