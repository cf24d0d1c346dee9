"""The text of `--help` for each option of `python -m vdusefast.bench fio`."""

from __future__ import annotations

JOB_HELP = {
    "name": "begin a job, with this name",
    "rw": "read, write, randread, randwrite, rw, randrw, trim, randtrim",
    "rwmixread": "percentage of reads in a mixed job",
    "bs": "bytes of one request: 4k, 128k, 1m",
    "size": "bytes that the job covers. Default: the whole device",
    "offset": "where on the device the range starts, in bytes",
    "iodepth": "requests in flight",
    "numjobs": "number of clones of this job, which run at once",
    "runtime": "stop after this time: 10 (seconds), 10s, 500ms",
    "time_based": "repeat the range until runtime is over",
    "ramp_time": "time to run before the measurement starts",
    "verify": "crc32c or pattern: read back all that was written, and compare",
    "verify_pattern": "the bytes of verify=pattern: 0xdeadbeef, or text",
    "do_verify": "1: read everything back after the run; 0: do not. Default: 1",
    "fsync": "number of writes after which a FLUSH follows",
    "randrepeat": "1: the same random order in each run; 0: another one. Default: 1",
    "randseed": "seed of the random order",
    "norandommap": "choose random blocks without a map: some come twice before others come once",
    "stonewall": "start after all earlier jobs have ended",
    "group_reporting": "one line for all clones of a job",
    "description": "text for the report",
}

RUN_HELP = {
    "transport": "kernel (a real /dev/vdX, loaded by the real fio), loopback, or auto: kernel where it works",
    "queues": "number of virtqueues, each with its own worker process. auto: 2 on 2 or more CPUs",
    "cpus": "CPUs of the workers, one for each queue: 0,1 or 0-3 or auto",
    "driver_cpus": "CPUs of the load. Default: those without a worker",
    "queue_size": "entries of a virtqueue, a power of two",
    "packed": "1: offer packed rings; 0: only split rings",
    "in_order": "1: offer IN_ORDER, if the engine completes requests in order",
    "indirect": "1: offer indirect descriptors",
    "backend": "file:PATH, memory:SIZE, nbd://..., rbd:... (docs/stores.md). Default: a temporary file",
    "engine": "auto, sync, cached or uring",
    "merge": "0: engines sync and cached do not merge adjacent requests",
    "sqpoll": "1: a kernel thread submits to io_uring",
    "map": "auto: engine sync reads a file on tmpfs through a mapping; off: it uses pread",
    "cache": "writeback, writethrough, none (O_DIRECT) or unsafe",
    "poll": "adaptive, always (an idle worker never sleeps) or never (it sleeps at once)",
    "poll_us": "longest time that an idle worker spins before it sleeps, in microseconds",
    "irq_delay_us": "longest time that an interrupt waits for more completions, in microseconds; 0: none",
    "baseline": "afterwards run the real fio on the same file with these engines: psync,io_uring",
    "config": "configuration file of a device (TOML); options override it",
    "output": "write the report to this file",
    "output_format": "normal or json",
    "explain": "explain the figures at the end of the report",
    "direct": "kernel transport: 1: use O_DIRECT on /dev/vdX; 0: its page cache. Default: 1",
    "ioengine": "kernel transport: io_uring, libaio, psync or posixaio. Default: io_uring or libaio",
}


def option_help() -> str:
    """Return the list of all options with their meaning."""
    width = 2 + max(len(name) for name in [*JOB_HELP, *RUN_HELP])
    lines = ["Options of a job, as in fio; also in job files ([global] and a section for each job):"]
    lines += [f"  --{name:<{width}} {text}" for name, text in JOB_HELP.items()]
    lines += ["", "Options of the run:"]
    lines += [f"  --{name.replace('_', '-'):<{width}} {text}" for name, text in RUN_HELP.items()]
    return "\n".join(lines)
