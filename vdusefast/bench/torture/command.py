"""`python -m vdusefast.bench torture`: kill what serves a device, again and again, and look whether anything is lost.

Here the loopback transport: this process holds the device's bus and drives it, so that everything that belongs to the
server can be killed. What the driver knows of each block is the journal; it is compared after every cycle with what the
device returns, and at the end with the file behind it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from vdusefast.backends import store_scheme
from vdusefast.backends.image_format import path_of
from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.engines import ENGINES
from vdusefast.base.kinds import StoreKind, TransportKind
from vdusefast.bench.common.store import BenchStore
from vdusefast.bench.common.transport import choose_transport
from vdusefast.bench.torture.leaks import Leaks
from vdusefast.bench.torture.load import DriverLoad
from vdusefast.bench.torture.loopback_host import LoopbackHost
from vdusefast.bench.torture.plan import ENDS_SERVER, NEEDS_FILE, RINGS, SIZE_BYTES, TortureOptions
from vdusefast.bench.torture.report import Findings, as_json, as_text
from vdusefast.bench.torture.scene import Scene
from vdusefast.bench.torture.server import LoopbackServer
from vdusefast.config import make_config
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import StopSignals


def run_torture(options: TortureOptions) -> int:
    """Torture a device, report, and return the exit status: 1 when something was lost or left behind.

    Raises VdusefastError for what keeps the suite from running.
    """
    transport, reason = _choose_transport(options.transport)
    _say(f"transport: {transport} ({reason})")
    with StopSignals() as signals, ExitStack() as opened:
        leaks = Leaks()
        uri = _open_store(options, transport, opened)
        findings = Findings(transport, options.engine, uri, options.cache, options.queues, options.seed)
        begin = time.monotonic()
        try:
            if transport == TransportKind.KERNEL:
                from vdusefast.bench.torture.kernel import torture_kernel

                torture_kernel(options, uri, findings, signals, sys.stdout)
            else:
                _torture_loopback(options, uri, findings, signals, sys.stdout)
        except VdusefastError as error:
            if not findings.cycles:
                raise
            findings.failures.append(str(error))  # at the end: what was found is reported all the same
        findings.seconds = time.monotonic() - begin
        findings.leaks += leaks.left()
    print(as_text(findings, terminal_width(sys.stdout)), flush=True)
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(as_json(findings), indent=2) + "\n")
        except OSError as error:
            raise VdusefastError(f"--json {options.json}: {error.strerror}") from None
    return 1 if findings.failed else 0


def _say(text: str) -> None:
    print(wrap(text, terminal_width(sys.stdout)), flush=True)


def _choose_transport(wanted: str) -> tuple[TransportKind, str]:
    """Return the transport to use and the reason; `auto` never takes a kernel, whose devices are for those who ask."""
    if wanted == TransportKind.KERNEL:
        return choose_transport(wanted)
    reason = "as asked" if wanted == TransportKind.LOOPBACK else "everything of the server can be killed here"
    return TransportKind.LOOPBACK, reason


def _open_store(options: TortureOptions, transport: str, opened: ExitStack) -> str:
    """Make the store, if it is not there. Returns its URI. Raises ConfigError."""
    if options.backend is not None and store_scheme(options.backend) == StoreKind.MEMORY:
        others = sorted({kind for kind, count in options.kills.items() if count} & {*ENDS_SERVER, *NEEDS_FILE})
        if others or transport == TransportKind.KERNEL:
            wrong = " and ".join(others) or "--transport kernel"
            raise ConfigError(f"--backend {options.backend} is memory, which ends with its server: leave out {wrong}")
        return options.backend
    if options.backend is not None and not options.backend.startswith("file:"):
        others = sorted({kind for kind, count in options.kills.items() if count} & {*NEEDS_FILE})
        if others:
            raise ConfigError(f"--backend {options.backend} is no file: leave out {' and '.join(others)}")
        return options.backend
    exists = options.backend is not None and path_of(options.backend).exists()
    size_bytes = options.size_bytes or (0 if exists else SIZE_BYTES)
    store = BenchStore(options.backend, size_bytes, reads=False, say=_say)
    return opened.enter_context(store).uri


def _torture_loopback(options: TortureOptions, uri: str, findings: Findings, signals: StopSignals, log: TextIO) -> None:
    """Torture a device on a bus of this process. Raises VdusefastError."""
    config = make_config(
        name=f"torture-{os.getpid()}",
        uri=uri,
        queues=options.queues,
        queue_size=options.queue_size,
        engine=options.engine,
        cache=options.cache,
        **RINGS[options.ring],
    )
    with ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="vdusefast-torture-")))
        host = opened.enter_context(LoopbackHost(directory / "bus"))
        server = LoopbackServer(config, host.path, directory, msg_timeout_s=options.msg_timeout_s)
        opened.enter_context(server)
        server.start(recover=False)
        server.wait_ready()
        driver = opened.enter_context(LoopbackDriver(host.bus))
        # First of all at the end: a driver that lets go of a device waits for its server, who may be dead by then.
        opened.callback(host.close)
        load = DriverLoad(
            driver,
            area_bytes=options.area_bytes(driver.capacity_bytes),
            block_bytes=options.block_bytes,
            depth=options.depth,
            run_s=options.load_s("loopback"),
            seed=options.seed,
            overlap=_engine(options) in ENGINES and ENGINES[_engine(options)].writes_in_order,
            give_up_s=options.give_up_s,
        )
        store = path_of(uri) if uri.startswith("file:") else None
        Scene(options, server, load, store, options.load_s("loopback")).torture(findings, signals, log)


def _engine(options: TortureOptions) -> str:
    """Return the engine that the workers will choose."""
    if options.engine != "auto":
        return options.engine
    if options.backend is not None and not options.backend.startswith("file:"):
        return options.backend.partition(":")[0]
    return "uring" if options.cache == "none" else "cached"
