"""A resident process that does the work of a SuperNode's messages, each in a fork of itself.

Flower starts a process per message, and every one of them imports torch and transformers anew: about five seconds of
processor time before any work. This process imports them once; for each message it forks, which takes milliseconds and
keeps what Flower's way gives: a participant that crashes, or is killed, takes nothing with it but its reply.

It stands where ``flower-superexec`` stands, beside a SuperNode started with ``--isolation process``, and speaks the
same protocol. Nothing here touches a GPU before the fork. Without it (``--isolation subprocess``) everything works the
same, later.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import httpx

POLL_S = 0.1


def serve(addresses: Sequence[str], goes_on: Callable[[], bool] = lambda: True) -> None:
    """Do the work of the SuperNodes whose Runtime APIs are at ``addresses`` (``host:port``) while ``goes_on()``."""
    import fluxlib.federation.client.client_app  # noqa: F401  (what the forks are not to import again)

    clients = {address: _connect(address) for address in addresses}
    children: set[int] = set()
    while goes_on():
        for address, client in clients.items():
            token = _acquire(client)
            if token:
                children.add(_fork(address, token))
        children = {child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)}
        time.sleep(POLL_S)
    for child in children:
        os.kill(child, signal.SIGKILL)


def _connect(address: str) -> Any:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient

    retries = make_simple_http_retry_invoker()
    retries.max_tries = 1
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # the same machine: a SuperNode's Runtime API listens on the loopback interface
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=retries,
    )


def _acquire(client: Any) -> str:
    """The token of a message that waits for its work; empty for none, or while the SuperNode is not there."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    try:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    except httpx.HTTPError:
        return ""
    return str(found.token) if found.HasField("task") else ""


def _fork(address: str, token: str) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        from flwr.supernode.runtime.run_clientapp import run_clientapp

        run_clientapp(runtime_api_address=address, token=token, insecure=True, parent_pid=os.getppid())
    except SystemExit:  # Flower's way to end
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
