"""Running the jobs of a plan on a device: driver threads, their CPUs, progress, stopping and failures."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.bench.raw.plan import Instance, ThreadPlan, plan_threads
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import VdusefastError

POLL_S = 0.1
SPIN_US = 1000.0  # before the driver sleeps, where it has a CPU of its own; longer than a batch of a disk takes
STALL_S = 30.0


@dataclass
class CpuTime:
    """The time that a driver thread used, in seconds, and its context switches."""

    user_s: float = 0.0
    system_s: float = 0.0
    switches: int = 0


@dataclass
class JobRun:
    """A finished (or stopped) job."""

    instance: Instance
    results: _driver.JobResults
    cpu: CpuTime


@dataclass
class Progress:
    """A look at the running jobs."""

    elapsed_s: float
    expected_s: float  # 0 when not known
    requests: int
    bytes: int
    checking: bool  # all running jobs are in their verification phase


@dataclass
class Control:
    """How the runner learns whether to go on: `stopped` by the user, `failure` of the device."""

    stopped: Callable[[], bool]
    failure: Callable[[], VdusefastError | None]
    progress: Callable[[Progress], None]


@dataclass
class _Worker:
    """One driver thread."""

    plan: ThreadPlan
    jobs: list[_driver.Job]
    loop: _driver.DriverThread
    cpu: int | None
    thread: threading.Thread | None = None
    time: CpuTime = field(default_factory=CpuTime)
    error: OSError | None = None

    def run(self) -> None:
        """Body of the thread."""
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        before = resource.getrusage(resource.RUSAGE_THREAD)
        try:
            self.loop.run()
        except OSError as error:
            self.error = error
        after = resource.getrusage(resource.RUSAGE_THREAD)
        switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
        self.time = CpuTime(after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, switches)


def run_group(
    driver: LoopbackDriver,
    instances: list[Instance],
    *,
    cpus: list[int],
    worker_cpus: list[int],
    moves_no_data: bool,
    control: Control,
) -> list[JobRun]:
    """Run jobs that belong together to their end and return their results.

    cpus: for the driver's threads, in turn. Raises the device's failure, or VdusefastError when the driver had to
    give up.
    """
    plans = plan_threads(len(instances), driver.queue_count)
    jobs = [_make(driver, one, plan_queues(plans, i), moves_no_data) for i, one in enumerate(instances)]
    workers = []
    for i, plan in enumerate(plans):
        cpu = cpus[i % len(cpus)]
        # A CPU that something else needs is worth more than the time a sleep costs.
        alone = cpu not in worker_cpus and len(plans) <= len(cpus)
        mine = [jobs[j] for j in plan.jobs]
        rings = [driver.ring(q) for q in plan.queues]
        loop = _driver.DriverThread(rings, mine, spin_us=SPIN_US if alone else 0.0, stall_s=STALL_S)
        workers.append(_Worker(plan, mine, loop, cpu))
    _run_threads(workers, instances, control)
    runs: list[JobRun | None] = [None] * len(instances)
    for worker in workers:
        count, used = len(worker.plan.jobs), worker.time
        share = CpuTime(used.user_s / count, used.system_s / count, used.switches // count)
        for j in worker.plan.jobs:
            runs[j] = JobRun(instances[j], jobs[j].results(), share)
    return [run for run in runs if run is not None]


def plan_queues(plans: list[ThreadPlan], job: int) -> int:
    """Return how many queues the thread of `job` drives."""
    return next(len(plan.queues) for plan in plans if job in plan.jobs)


def _make(driver: LoopbackDriver, one: Instance, queues: int, moves_no_data: bool) -> _driver.Job:
    spec = one.spec
    load = Workload(
        kind=spec.kind,
        order=spec.order,
        block_bytes=spec.bs,
        depth=spec.iodepth,
        size_bytes=one.size,
        offset_bytes=one.offset,
        io_limit=0 if spec.time_based else None,
        queue_count=queues,
        read_share=spec.rwmixread / 100,
        fsync_every=spec.fsync,
        verify=spec.verify,
        check_after=spec.do_verify and spec.verify != "none",
        seed=one.seed,
        order_seed=one.order_seed,
        ramp_s=spec.ramp_time,
        runtime_s=spec.runtime,
        moves_no_data=moves_no_data,
    )
    return make_job(driver, load)


def _run_threads(workers: list[_Worker], instances: list[Instance], control: Control) -> None:
    for worker in workers:
        worker.thread = threading.Thread(target=worker.run, name="vdusefast-driver")
        worker.thread.start()
    started = time.monotonic()
    expected_s = max((one.spec.ramp_time + one.spec.runtime for one in instances), default=0.0)
    failure: VdusefastError | None = None
    asked = False
    try:
        while any(worker.thread is not None and worker.thread.is_alive() for worker in workers):
            failure = failure or control.failure()
            if failure is not None or (not asked and control.stopped()):
                asked = True
                for worker in workers:
                    worker.loop.stop(abandon=failure is not None)
            control.progress(_look(workers, time.monotonic() - started, expected_s))
            _join(workers, POLL_S)
    finally:
        # Also when the caller is interrupted: no thread may outlive the memory it works on.
        for worker in workers:
            worker.loop.stop(abandon=True)
        _join(workers, None)
    failure = failure or control.failure()
    if failure is not None:
        raise failure
    for worker in workers:
        if worker.error is not None:
            raise VdusefastError(f"driver gave up: {worker.error.strerror}")


def _look(workers: list[_Worker], elapsed_s: float, expected_s: float) -> Progress:
    jobs = [job for worker in workers for job in worker.jobs]
    counts = [job.progress() for job in jobs]
    checking = all(job.phase != "run" for job in jobs)
    return Progress(elapsed_s, expected_s, sum(c[0] for c in counts), sum(c[1] for c in counts), checking)


def _join(workers: list[_Worker], timeout_s: float | None) -> None:
    """Wait for all threads, `timeout_s` in all at most."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    for worker in workers:
        if worker.thread is not None:
            worker.thread.join(None if end is None else max(0.0, end - time.monotonic()))
