"""What `--help` says of each option of `python -m vdusefast.bench fio`."""

from __future__ import annotations

JOB_HELP = {
    "name": "start a job of that name",
    "rw": "read, write, randread, randwrite, rw, randrw, trim, randtrim",
    "rwmixread": "share of reads in a mix, in per cent",
    "bs": "bytes of one request: 4k, 128k, 1m",
    "size": "bytes that the job covers; the whole device unless given",
    "offset": "where on the device it starts",
    "iodepth": "requests in flight",
    "numjobs": "so many of this job at once",
    "runtime": "stop after so long: 10, 10s, 500ms",
    "time_based": "go on until runtime is over, however often the range is covered",
    "ramp_time": "run so long before measuring",
    "verify": "crc32c or pattern: what is written is read back and compared",
    "verify_pattern": "the bytes of verify=pattern: 0xdeadbeef, or text",
    "do_verify": "read everything back after the run; 1 unless set to 0",
    "fsync": "a FLUSH after every so many writes",
    "randrepeat": "the same random order each time; 1 unless set to 0",
    "randseed": "seed of that order",
    "norandommap": "random blocks may come twice before all have come once",
    "stonewall": "wait for the jobs before this one",
    "group_reporting": "one line for all clones of a job",
    "description": "a text for the report",
}

RUN_HELP = {
    "transport": "kernel (a real /dev/vdX, loaded by the real fio), loopback, or auto: kernel where it works",
    "queues": "virtqueues, each with a worker process of its own; auto = 2 where there are 2 CPUs",
    "cpus": "CPUs of the workers, one a queue: 0,1 or 0-3; or auto",
    "driver_cpus": "CPUs of the load; those that no worker has unless given",
    "queue_size": "entries of a virtqueue, a power of two",
    "packed": "1 offers packed rings, 0 split ones alone",
    "in_order": "1 offers IN_ORDER, where the engine ends requests in order",
    "indirect": "1 offers indirect descriptors",
    "backend": "file:PATH, memory:SIZE, nbd://..., rbd:... (docs/stores.md); a temporary file unless given",
    "engine": "auto, sync, cached or uring",
    "merge": "0: engines sync and cached carry out adjacent requests one by one",
    "sqpoll": "1: a thread of the kernel's submits to io_uring",
    "map": "auto: engine sync reads a file on tmpfs through a mapping; off: it never does",
    "cache": "writeback, writethrough, none (O_DIRECT) or unsafe",
    "poll": "adaptive, always (an idle worker spins for ever) or never (it sleeps at once)",
    "poll_us": "microseconds that an idle worker spins at most before it sleeps",
    "irq_delay_us": "microseconds that an interrupt waits at most for more completions; 0 = never",
    "baseline": "afterwards the real fio by these engines: psync,io_uring",
    "config": "a device's TOML file; options override it",
    "output": "write the report to this file",
    "output_format": "normal or json",
    "explain": "end with a paragraph that says what the figures mean",
    "direct": "kernel transport: 1 (unless set to 0) passes the page cache of /dev/vdX by",
    "ioengine": "kernel transport: io_uring or libaio, whichever is there, or psync, posixaio",
}


def option_help() -> str:
    """Return the list of all options with what each means."""
    width = 2 + max(len(name) for name in [*JOB_HELP, *RUN_HELP])
    lines = ["Options of a job, as in fio; also in job files ([global] and a section for each job):"]
    lines += [f"  --{name:<{width}} {text}" for name, text in JOB_HELP.items()]
    lines += ["", "Options of the run:"]
    lines += [f"  --{name.replace('_', '-'):<{width}} {text}" for name, text in RUN_HELP.items()]
    return "\n".join(lines)
