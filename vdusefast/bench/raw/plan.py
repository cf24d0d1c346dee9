"""Where each job works on the device, and which driver thread runs it on which queues."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.errors import ConfigError

ORDER_SEED = 0xF10  # the same random order in each run


@dataclass(frozen=True)
class Instance:
    """One clone of a job: its window of the device in bytes, and its seeds."""

    spec: JobSpec
    number: int
    offset: int
    size: int
    seed: int  # of verified blocks: other in each run, so that what an earlier run left never passes for ours
    order_seed: int

    @property
    def last(self) -> int:
        """Last byte of the window."""
        return self.offset + self.size - 1


@dataclass(frozen=True)
class ThreadPlan:
    """The share of one driver thread: its queues, and the places of jobs in the run."""

    queues: tuple[int, ...]
    jobs: tuple[int, ...]


def required_bytes(job: JobSpec) -> int:
    """Return the size of the device that the job asks for, 0 when it names no size."""
    return job.offset + job.size if job.size else 0


def place_job(job: JobSpec, capacity_bytes: int, block_bytes: int) -> list[Instance]:
    """Return the clones of a job. Those that verify and write share its range out in disjoint slices.

    Raises ConfigError when the job does not fit.
    """
    _check_fit(job, capacity_bytes, block_bytes)
    size = job.size or capacity_bytes - job.offset
    slices = job.numjobs if job.verify != "none" and job.writes else 1
    return [
        _instance(job, number, *_slice(job, job.offset, size, number if slices > 1 else 0, slices))
        for number in range(job.numjobs)
    ]


def plan_threads(job_count: int, queue_count: int) -> list[ThreadPlan]:
    """Give every queue to exactly one thread: a thread a queue when there are jobs enough, else a thread a job."""
    if job_count >= queue_count:
        return [ThreadPlan((q,), tuple(range(q, job_count, queue_count))) for q in range(queue_count)]
    return [ThreadPlan(tuple(range(j, queue_count, job_count)), (j,)) for j in range(job_count)]


def _check_fit(job: JobSpec, capacity_bytes: int, block_bytes: int) -> None:
    if job.bs % block_bytes or job.offset % block_bytes:
        raise ConfigError(
            f"job {job.name}: bs {job.bs} and offset {job.offset} must be multiples of the device's "
            f"block of {block_bytes} bytes"
        )
    end = job.offset + (job.size or job.bs)
    if end > capacity_bytes:
        raise ConfigError(f"job {job.name}: offset + size = {end} bytes, but the device has {capacity_bytes}")


def _slice(job: JobSpec, offset: int, size: int, place: int, count: int) -> tuple[int, int]:
    """Return offset and size of slice `place` of `count`, in whole blocks of 4 KiB and of the job."""
    if count > 1:
        part = size // count
        # Slices start at multiples of every member's block where these are powers of two, else of this job's.
        part -= part % max(job.bs, 4096)
        offset, size = offset + place * part, part
    size -= size % job.bs
    if size < job.bs:
        raise ConfigError(f"job {job.name}: its share of the device is smaller than one block of {job.bs} bytes")
    return offset, size


def _instance(job: JobSpec, number: int, offset: int, size: int) -> Instance:
    seed = int.from_bytes(os.urandom(4), "little") | 1
    return Instance(job, number, offset, size, seed, ORDER_SEED + number)
