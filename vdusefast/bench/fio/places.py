"""Where each job works on the device: files of the jobs become ranges of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vdusefast.bench.fio.numbers import Amount, Numbers
from vdusefast.bench.fio.script import Job
from vdusefast.errors import ConfigError

ALIGN_BYTES = 1 << 20
NAMES_OF_DISKS = ("rbdname", "uri")  # of engines that are for one disk
UNSIZED_BYTES = 64 << 20  # of a file without a size, where the device's size is ours to choose


@dataclass(frozen=True)
class Need:
    """What one job works on. files: names, the same for all clones; () = each clone has a file of its own."""

    job: Job
    files: tuple[str, ...]
    clones: int
    size: Amount | None  # of one clone, None: all that there is
    offset: Amount
    increment: Amount
    io_bytes: int  # to move, where that is more than the size
    resized: bool  # the size is not the one that the job gives

    @property
    def extent_bytes(self) -> int:
        """How far the files reach, 0 when no size says so. Of private files: that of one clone."""
        if self.size is None or self.size.percent:
            return 0
        steps = self.increment.count * (self.clones - 1) if self.files else 0
        return self.offset.count + steps + self.size.count


@dataclass(frozen=True)
class Range:
    """The range of a file, or, with `stride_bytes`, of the files of the clones, one after another."""

    start: int
    length: int
    stride_bytes: int = 0


def need_of(job: Job, numbers: Numbers) -> Need:
    """Return what a job works on. Raises ConfigError when a number makes no sense."""
    base = job.get("kb_base") or "1024"

    def amount(name: str) -> Amount | None:
        text = job.get(name)
        return numbers.amount(name, text.partition(":")[0] if name == "size" else text, base) if text else None

    files = tuple(_names(job))
    count = amount("nrfiles")
    pieces = max(len(files), 1 if files or count is None else count.count, 1)
    given, file_size, io_bytes = amount("size"), amount("filesize"), 0
    size = given
    offset, increment = amount("offset") or Amount(), amount("offset_increment") or Amount()
    if file_size is not None and not file_size.percent:
        # Of each file the part behind the offset is left, while a size begins there.
        offset = Amount(offset.of(file_size.count))
        whole = Amount((file_size.count - (offset.count if offset.count < file_size.count else 0)) * pieces)
        if size is not None and not size.percent and size.count > whole.count:
            io_bytes = size.count
        size = whole if size is None or size.percent or size.count > whole.count else size
    if size == Amount():
        size = None
    clones = (amount("numjobs") or Amount(1)).count or 1
    return Need(job, files, clones, size, offset, increment, io_bytes, size not in (given, None))


def _names(job: Job) -> list[str]:
    """Return the files that a job names, in one spelling."""
    name, directory = job.get("filename"), job.get("directory") or ""
    if not name:
        return [disk for option in NAMES_OF_DISKS if (disk := job.get(option))]
    return [f"{directory}/{one}" if directory else one for one in re.split(r"(?<!\\):", name)]


def required_bytes(needs: Sequence[Need]) -> int:
    """Return the size of a device for these jobs, 0 when nothing says it."""
    if _share_all(needs):
        return max((need.extent_bytes for need in needs), default=0)
    return sum(_lengths(needs, UNSIZED_BYTES).values())


def _share_all(needs: Sequence[Need]) -> bool:
    """Return whether there is one file, or one list of files, for everything."""
    private = [need for need in needs if not need.files]
    if private:
        return len(needs) == 1 and private[0].clones == 1
    return len({need.files for need in needs}) <= 1


def _lengths(needs: Sequence[Need], unsized: int) -> dict[object, int]:
    """Return the length of each file, or of the files of all clones of a job, in the order of the jobs."""
    lengths: dict[object, int] = {}
    for need in needs:
        one = -(-(need.extent_bytes or unsized) // ALIGN_BYTES) * ALIGN_BYTES
        key: object = need.files or id(need.job)
        lengths[key] = max(lengths.get(key, 0), one * (1 if need.files else need.clones))
    return lengths


def place(needs: Sequence[Need], capacity_bytes: int) -> list[Range | None]:
    """Return the range of each job, None for the whole device as fio sees it.

    Jobs that share one file share the device. Several files lie one after another. Raises ConfigError when they do
    not fit.
    """
    if _share_all(needs):
        for need in needs:
            if need.extent_bytes > capacity_bytes:
                raise ConfigError(
                    f"job {need.job.name}: offset + size = {need.extent_bytes} bytes, but the device has "
                    f"{capacity_bytes}; use a smaller size, or a larger store"
                )
        return [None] * len(needs)
    sized = sum(_lengths(needs, 0).values())
    unsized = sum(need.clones if not need.files else 1 for need in needs if not need.extent_bytes)
    share = (capacity_bytes - sized) // unsized // ALIGN_BYTES * ALIGN_BYTES if unsized else 0
    if sized > capacity_bytes or (unsized and share <= 0):
        raise ConfigError(
            f"the jobs have several files of {sized} bytes in all, but the device has {capacity_bytes}; use smaller "
            "sizes, or one filename for all jobs"
        )
    starts: dict[object, int] = {}
    at = 0
    lengths = _lengths(needs, share)
    for key, length in lengths.items():
        starts[key] = at
        at += length
    ranges: list[Range | None] = []
    for need in needs:
        key = need.files or id(need.job)
        stride = 0 if need.files else lengths[key] // need.clones
        ranges.append(Range(starts[key], stride or lengths[key], stride))
    return ranges


def place_options(need: Need, where: Range | None) -> dict[str, str | None]:
    """Return the options that put a job there."""
    options: dict[str, str | None] = {}
    if need.io_bytes and "io_size" not in need.job.options:
        options["io_size"] = str(need.io_bytes)
    if where is None:
        if need.resized and need.size is not None:
            options["size"] = str(need.size.count)
            options |= {"offset": str(need.offset.count)} if need.offset.count else {}
        return options
    offset = need.offset.of(where.length)
    options["offset"] = str(where.start + offset)
    options["size"] = str(need.size.of(where.length) if need.size is not None else where.length - offset)
    step = need.increment.of(where.length) + where.stride_bytes
    if step:
        options["offset_increment"] = str(step)
    return options
