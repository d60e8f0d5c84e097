"""A relay passes everything on, at its link's rate."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from _relay import Relay

from fluxlib.devices.catalogue import Link
from fluxlib.federation.engines.deployment.processes import HOST, free_ports


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets, until the other side has said all."""
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("up", "down", "latency", "least"), [(1e6, 1e12, 0.0, 0.3), (1e12, 5e5, 0.0, 0.6), (1e12, 1e12, 0.2, 0.4)]
)
def test_bytes_arrive_unchanged_and_no_sooner_than_the_link_lets_them(
    echo: int, up: float, down: float, latency: float, least: float
) -> None:
    link = Link(name="l", title="l", up_bytes_per_s=up, down_bytes_per_s=down, latency_s=latency)
    (port,) = free_ports(1)
    relay, sent = Relay(port, echo, link), bytes(range(256)) * 1200  # 307 kB
    relay.start()
    try:
        start = time.monotonic()
        with socket.create_connection((HOST, port)) as connection:
            threading.Thread(target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR))).start()
            got = b"".join(iter(lambda: connection.recv(65536), b""))
        assert got == sent
        assert time.monotonic() - start > least
    finally:
        relay.stop()


def test_who_is_not_there_is_hung_up_on() -> None:
    port, nobody = free_ports(2)
    relay = Relay(port, nobody, Link(name="l", title="l", up_bytes_per_s=1e6, down_bytes_per_s=1e6, latency_s=0.0))
    relay.start()
    try:
        with socket.create_connection((HOST, port), timeout=10) as connection:
            assert connection.recv(1) == b""
    finally:
        relay.stop()


def test_a_connection_of_which_one_side_is_reset_ends_on_the_other() -> None:
    port, far = free_ports(2)
    relay = Relay(port, far, Link(name="l", title="l", up_bytes_per_s=1e6, down_bytes_per_s=1e6, latency_s=0.0))
    with socket.create_server((HOST, far)) as server:
        relay.start()
        try:
            with socket.create_connection((HOST, port), timeout=10) as connection:
                connection.sendall(b"first")
                accepted, _ = server.accept()
                assert accepted.recv(5) == b"first"
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                accepted.close()
                assert connection.recv(1) == b""
        finally:
            relay.stop()
