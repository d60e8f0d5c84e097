"""A call that takes no longer than it may: what stops a participant that hangs.

A Python call cannot be interrupted from outside, so it runs in a thread of its own. When its time is over, an exception
ends that thread as soon as it is back in Python; a call that never comes back from C is left behind. Either way the
caller goes on, and must not use anything that the call may still be writing to.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
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
    outcome: Future[Result] = Future()
    start = end = time.monotonic()

    def work() -> None:
        nonlocal end
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:  # given to the caller, who decides
            outcome.set_exception(error)
        end = time.monotonic()

    thread = threading.Thread(target=work, name="limited", daemon=True)
    thread.start()
    try:
        thread.join(limit_s)
    finally:  # also when who waits is interrupted
        late = thread.is_alive()
        if late:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Abandoned))
    if late or end - start > limit_s:  # also what came back too late on a busy machine
        raise TimeLimitExceeded(f"it took longer than the {limit_s:g} s it may take")
    return outcome.result()
