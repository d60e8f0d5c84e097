"""A participant's link, for real: a relay between its SuperNode and the SuperLink that lets bytes through at a rate.

It stands where the network would, knows nothing of what passes (TLS goes through it), and needs no rights: the shaped
connections of one node share one rate in each direction, as the applications of one device do.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path

from fluxlib.config import RunConfig
from fluxlib.devices import catalogue
from fluxlib.devices.catalogue import Link
from fluxlib.federation.engines.deployment.processes import HOST, LocalFederation, free_ports

BLOCK = 16 * 1024
"""Bytes that pass at once."""
IN_FLIGHT = 256
"""Blocks that are on their way, at most."""


class Bucket:
    """One direction of a link: says when the next bytes are through."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at = bytes_per_s, 0.0

    async def take(self, num_bytes: int) -> float:
        """Wait until ``num_bytes`` have left; the time at which they had."""
        now = asyncio.get_running_loop().time()
        self.free_at = max(self.free_at, now) + num_bytes / self.bytes_per_s
        await asyncio.sleep(self.free_at - now)
        return self.free_at


class Relay:
    """Listens on ``port`` of this machine and passes everything on to ``target``, in a thread of its own.

    Args:
        link: bytes towards ``target`` go at its upload rate, those back at its download rate; each takes its latency.
    """

    def __init__(self, port: int, target: int, link: Link) -> None:
        self.port, self.target, self.link = port, target, link
        self._up, self._down = Bucket(link.up_bytes_per_s), Bucket(link.down_bytes_per_s)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=f"relay-{port}")

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        self._thread.start()
        listening = asyncio.start_server(self._serve, HOST, self.port)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()

    def stop(self) -> None:
        """Close what is open; a relay that never started has nothing."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # one that was just accepted is among the next
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        with suppress(
            asyncio.CancelledError
        ):  # the relay stops; Python 3.11 logs a cancelled handler as one that failed
            await self._join(reader, writer)

    async def _join(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self.target)
        except OSError:  # nobody there: as a network would, hang up
            writer.close()
            return
        task = asyncio.current_task()
        self._open.add(task)  # the loop itself keeps no task alive that only waits
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(reader, far_writer, self._up))
                ways.create_task(self._pass(far_reader, writer, self._down))
        except* OSError:  # one side is gone: so is the other
            pass
        finally:
            writer.close()
            far_writer.close()
            self._open.discard(task)

    async def _pass(self, reader: StreamReader, writer: StreamWriter, bucket: Bucket) -> None:
        """One direction of one connection, until its sender has said all."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        arriving = asyncio.create_task(_arrive(on_the_way, writer))
        try:
            while block := await reader.read(BLOCK):
                await on_the_way.put((await bucket.take(len(block)) + self.link.latency_s, block))
            await on_the_way.put((0.0, b""))
            await arriving
        finally:
            arriving.cancel()


async def _arrive(on_the_way: asyncio.Queue[tuple[float, bytes]], writer: StreamWriter) -> None:
    while True:
        due, block = await on_the_way.get()
        if not block:
            writer.write_eof()
            return
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        writer.write(block)
        await writer.drain()


class ShapedFederation(LocalFederation):
    """A federation of this machine whose nodes really have the link of their run.

    They profile before they train. A profile after the reply is a process of its own, and on cores that are all taken
    its start costs more than it hides.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        super().__init__(folder, config)
        taken, link = {self.port, *self.node_ports}, catalogue.link(config.clock.link)
        ports = [port for port in free_ports(2 * len(taken)) if port not in taken]
        self.relays = [Relay(port, self.port, link) for port in ports[: len(self.node_ports)]]

    def doors(self) -> list[str]:
        """Each node's relay."""
        for relay in self.relays:
            relay.start()
        return [f"{HOST}:{relay.port}" for relay in self.relays]

    def stop(self) -> None:
        super().stop()
        while self.relays:
            self.relays.pop().stop()
