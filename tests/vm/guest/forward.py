"""Ports of the host, at the same addresses in the guest: where a monitor says that its OSDs are is true here, too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

HOST = "10.0.2.2"  # bench.vm.machine.HOST_ADDRESS
LOOPBACK = "127.0.0.1"
READ_BYTES = 1 << 18
START_S = 10.0


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, until one side ends."""
    try:
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _serve(ports: Sequence[int], ready: threading.Event) -> None:
    tasks: set[asyncio.Task[Any]] = set()

    def connect(port: int) -> Any:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                their_reader, their_writer = await asyncio.open_connection(HOST, port)
            except OSError:
                writer.close()
                return
            for pump in (_pump(reader, their_writer), _pump(their_reader, writer)):
                task = asyncio.ensure_future(pump)
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        return connected

    servers = [await asyncio.start_server(connect(port), LOOPBACK, port) for port in ports]
    ready.set()
    await asyncio.gather(*(server.serve_forever() for server in servers))


def start(ports: Sequence[int]) -> None:
    """Forward these ports from now on, in a thread that ends with the process. Raises TimeoutError."""
    ready = threading.Event()
    threading.Thread(target=lambda: asyncio.run(_serve(ports, ready)), daemon=True).start()
    if not ready.wait(START_S):
        raise TimeoutError("no forwarding of ports")
