"""`bench fio` in tests: its arguments for a device, and a run whose target is the store's own file, past the device."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdusefast.api import Device
from vdusefast.bench.common.real_fio import find_fio
from vdusefast.bench.fio import device as fio_device
from vdusefast.bench.fio.arguments import Knowledge, read_arguments
from vdusefast.bench.fio.options import FLAGS, NAMES
from vdusefast.bench.fio.script import Script, read_script
from vdusefast.bench.fio.target import Retargeting, Target

JOBS = Path(__file__).parent / "fio_jobs"
MIB = 1 << 20


@functools.cache
def know() -> Knowledge:
    return Knowledge(find_fio("a test"))


def script(*arguments: str) -> Script:
    return read_script(read_arguments(arguments, NAMES, FLAGS, know()), NAMES, FLAGS)


def retarget(*arguments: str, transport: str = "loopback") -> Retargeting:
    return Retargeting(script(*arguments), know(), transport, "libaio")


def rewritten(
    directory: Path, arguments: Sequence[str], path: str = "/dev/vdx", *, transport: str = "loopback", capacity: int = 0
) -> tuple[list[str], list[str]]:
    """Return the arguments for fio, with job files as their lines in place of their paths; and the notes."""
    jobs = retarget(*arguments, transport=transport)
    made = jobs.turn_to(Target(path, transport, "libaio"), capacity or max(jobs.required_bytes, 64 * MIB))
    out: list[str] = []
    for argument in made.arguments(directory):
        out += Path(argument).read_text().splitlines() if argument.startswith(str(directory)) else [argument]
    return out, jobs.notes


@contextmanager
def _file_of(device: Device, asynchronous: str, route: str) -> Iterator[fio_device.Reachable]:
    path = device.config.backend.uri.removeprefix("file:")
    target = Target(path, "loopback", asynchronous, fio_device.LOOPBACK_MEMORY)
    size_bytes = os.stat(path).st_size
    yield fio_device.Reachable(device, target, size_bytes, read_only=False, can_discard=True)


def load_the_file_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fio load the store's file, so that everything but the way to the device is what people run."""
    monkeypatch.setattr(fio_device, "_attached", _file_of)
