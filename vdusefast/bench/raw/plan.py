"""Where each job works on the device, and which driver thread runs it on which queues."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.errors import ConfigError


@dataclass(frozen=True)
class Instance:
    """One clone of a job: its window of the device in bytes, and its seeds."""

    spec: JobSpec
    number: int  # over all jobs of the run
    group: int
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
    """The share of one driver thread: its queues, and the places of jobs in its group."""

    queues: tuple[int, ...]
    jobs: tuple[int, ...]


def required_bytes(jobs: Sequence[JobSpec]) -> int:
    """Return the size of the device that the jobs ask for, 0 when none names a size."""
    return max((job.offset + job.size for job in jobs if job.size), default=0)


def place_jobs(jobs: Sequence[JobSpec], capacity_bytes: int, block_bytes: int) -> list[list[Instance]]:
    """Return the clones of all jobs, in groups that run one after another (each stonewall begins one).

    Jobs that run together on one window, when one of them verifies and one writes, share it out in disjoint slices.
    Raises ConfigError when a job does not fit or verification could not tell its own data.
    """
    groups: list[list[JobSpec]] = []
    for job in jobs:
        _check_fit(job, capacity_bytes, block_bytes)
        if job.stonewall or not groups:
            groups.append([])
        groups[-1].append(job)
    placed, number = [], 0
    for index, group in enumerate(groups):
        windows: dict[tuple[int, int], list[JobSpec]] = defaultdict(list)
        for job in group:
            size = job.size or capacity_bytes - job.offset
            windows[job.offset, size] += [job] * job.numjobs
        members = []
        for (offset, size), clones in windows.items():
            sliced = any(job.verify != "none" for job in clones) and any(job.writes for job in clones)
            for place, job in enumerate(clones):
                window = _slice(job, offset, size, place, len(clones) if sliced else 1)
                members.append(_instance(job, number, index, *window))
                number += 1
        _check_overlaps(members)
        placed.append(members)
    return placed


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


def _instance(job: JobSpec, number: int, group: int, offset: int, size: int) -> Instance:
    order_seed = job.randseed or (0xF10 if job.randrepeat else int.from_bytes(os.urandom(7), "little"))
    seed = int.from_bytes(os.urandom(4), "little") | 1
    return Instance(job, number, group, offset, size, seed, order_seed + number)


def _check_overlaps(members: list[Instance]) -> None:
    """Refuse a verifying job whose blocks another one writes at the same time."""
    ordered = sorted(members, key=lambda m: m.offset)
    for i, one in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if other.offset > one.last:
                break
            verified = one.spec.verify != "none" or other.spec.verify != "none"
            if verified and (one.spec.writes or other.spec.writes):
                raise ConfigError(
                    f"jobs {one.spec.name} and {other.spec.name} overlap, so that nothing could be verified; give "
                    "them other offset and size, or put stonewall into the later one"
                )
