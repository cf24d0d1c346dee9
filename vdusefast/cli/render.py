"""What the commands print about devices: plain aligned text out of the servers' `info` and `stats`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vdusefast.base.columns import columns, wrap
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import Bus, TransportKind
from vdusefast.base.printable import printable
from vdusefast.host import containers
from vdusefast.units import duration_text, size_text

LINE_COLUMNS = 100
LABEL_COLUMNS = 12
# The counters that everybody wants, and what they are called here; `stats` shows all.
MAIN_COUNTERS = {
    "requests": "requests",
    "bytes_read": "read",
    "bytes_written": "written",
    "errors": "errors",
    "kicks": "kicks",
    "irqs": "irqs",
}
STATS_FIXED = ("index", "pid", "cpu", "engine", "state", "reason", "ops")


def table(rows: Sequence[Sequence[object]], left: Iterable[int] = (), width: int | None = None) -> str:
    """Return rows as aligned columns, the first row being the heading. `left`: columns that are not numbers.

    width: of the terminal, where a wider table is folded.
    """
    return columns([[printable(str(cell)) for cell in row] for row in rows], set(left), width)


def list_text(infos: Sequence[Json], width: int | None = None) -> str:
    """Return one line for each device. width: of the terminal."""
    if not infos:
        return "no devices"
    rows = [["NAME", "STATE", "NODE", "BUS", "SIZE", "QUEUES", "BACKEND"]]
    for info in infos:
        size = size_text(info["size_bytes"]) if "size_bytes" in info else "-"
        queues = str(len(info["queues"])) if "queues" in info else "-"
        texts = [str(text or "-") for text in (info["name"], _state(info), info.get("node"), info.get("bus"))]
        rows.append([*texts, size, queues, str(info.get("backend") or "-")])
    return table(rows, left=(0, 1, 2, 3, 6), width=width)


def _state(info: Json) -> str:
    """Return a device's state in one word; what has failed is of more interest than that the rest still runs."""
    failed = info.get("failure") or any(queue.get("state") == "failed" for queue in info.get("queues", ()))
    state = str(info.get("state", ""))
    state = "failed" if failed and state not in ("stopping", "broken") else state
    state = f"{state}, files upgraded" if info.get("upgraded") else state
    return ", ".join([state, *(f"queue {index} waits {waited}" for index, waited in _waiting(info))])


def _waiting(info: Json) -> list[tuple[int, str]]:
    """Return the queues that wait for their storage, each with how long it has."""
    waiting = [queue for queue in info.get("queues", ()) if queue.get("waiting_s")]
    return [(queue["index"], duration_text(queue["waiting_s"])) for queue in waiting]


def show_text(info: Json, width: int | None = None) -> str:
    """Return everything that is known of a device. width: of the terminal."""
    lines = [info["name"]]
    lines += [line for label, text in _facts(info) if text for line in _labelled(label, text, width)]
    if info.get("queues"):
        lines += ["", _queue_table(info, width)]
    return "\n".join(lines)


def placement_text(name: str, placement: Json) -> str:
    """Return where the workers and interrupts of a device go, and why."""
    lines = [f"{name}: which CPUs submit to which queue: {placement['source']}"]
    for queue in placement["queues"]:
        submit = f" (requests from CPU {queue['submit_cpus']})" if queue["submit_cpus"] else ""
        lines.append(f"queue {queue['index']}{submit}")
        worker, irqs = (_known(queue[key]) for key in ("cpu", "irq_cpu"))
        lines.append(f"  worker      {'CPU ' if worker != '-' else ''}{worker}: {queue['cpu_reason']}")
        if queue["irq_reason"]:
            lines.append(f"  interrupts  {'CPU ' if irqs != '-' else ''}{irqs}: {queue['irq_reason']}")
    return "\n".join([*lines, *(f"advice: {sentence}" for sentence in placement["advice"])])


def stats_text(stats: Json, width: int | None = None) -> str:
    """Return all counters, a column for each queue and one for their sum; latencies of what has been done below.

    width: of the terminal.
    """
    columns = [*stats["queues"], stats["total"]]
    heading = ["", *(f"queue {queue['index']}" for queue in stats["queues"]), "total"]
    names = [name for name in stats["total"] if name not in STATS_FIXED]
    rows = [heading, *([name, *(column[name] for column in columns)] for name in names)]
    done = [(name, op) for name, op in stats["total"]["ops"].items() if op["requests"]]
    if not done:
        return table(rows, left=(0,), width=width)
    percentiles = list(done[0][1]["latency_ns"])
    latencies: list[list[object]] = [["", "requests", "bytes", "errors", *(f"{name} us" for name in percentiles)]]
    for name, op in done:
        times = [f"{op['latency_ns'][percentile] / 1000:.1f}" for percentile in percentiles]
        latencies.append([name, op["requests"], op["bytes"], op["errors"], *times])
    return f"{table(rows, left=(0,), width=width)}\n\n{table(latencies, left=(0,), width=width)}"


def _facts(info: Json) -> list[tuple[str, str]]:
    """Return the facts about a device in the order that they are shown in; those without a text are left out."""
    get = info.get
    driver = f" (driver {info['driver']})" if get("driver") else ""
    transport = get("transport", "")
    if get("api_version") is not None:
        transport += f", VDUSE API {info['api_version']}"
    if get("vduse_features"):
        transport += f" with {' '.join(info['vduse_features'])}"
    size = ""
    if "size_bytes" in info:
        size = f"{size_text(info['size_bytes'])} ({info['size_bytes']} bytes), blocks of {get('block_size_bytes')}"
        size += ", read-only" if get("read_only") else ""
    backend = f"{info['backend']}, cache {get('cache')}" if get("backend") else ""
    backend += ", discard ignore" if get("discard") == "ignore" else ""
    backend += ", write_zeroes thick" if get("write_zeroes") == "thick" else ""
    backend += f", by a relay (pid {info['relay_pid']})" if get("relay_pid") else ""
    uptime = f", up {duration_text(info['uptime_s'])}" if "uptime_s" in info else ""
    status = f"{info['status']:#x} {' '.join(get('status_names', []))}".rstrip() if "status" in info else ""
    offered, acked = get("offered_features", []), get("acked_features", [])
    limits = ""
    if get("msg_timeout_s") is not None and get("transport") == TransportKind.KERNEL:
        limits = f"messages {info['msg_timeout_s'] or 'no limit'} s"
        limits += f", bounce pages {size_text(info['bounce_size_bytes'])}" if get("bus") == Bus.VIRTIO else ""
    return [
        ("state", get("state", "")),
        ("failure", get("failure", "")),
        ("advice", get("advice", "")),
        ("upgrade", _upgrade(info)),
        ("was", _past_text(get("last_failure"))),
        ("CPUs", get("missing_cpus", "")),
        ("waiting", "; ".join(f"queue {index} waits for its storage since {for_}" for index, for_ in _waiting(info))),
        ("node", f"{get('node') or 'none'}{_elsewhere(info)}{driver}"),
        ("bus", get("bus", "")),
        ("transport", transport),
        ("server", f"pid {info['pid']}{_namespace(info)}{uptime}" if get("pid") else ""),
        ("size", size),
        ("emulates", "; ".join(get("emulated", []))),
        ("serial", get("serial", "")),
        ("backend", backend),
        ("memory", get("memory", "")),
        ("reclaim", get("reclaim", "")),
        ("ring", get("ring", "")),
        ("status", status),
        ("acked", " ".join(acked) or ("none" if offered else "")),
        ("not acked", " ".join(name for name in offered if name not in acked)),
        ("limits", limits),
        ("run dir", get("run_dir", "")),
    ]


def _elsewhere(info: Json) -> str:
    """Say so where a node is not in this /dev."""
    number = info.get("device_number")
    return "" if not number or containers.is_same_node(info["node"], number) else f" ({number}), not in this /dev"


def _namespace(info: Json) -> str:
    """Say so where the pids of a server and its workers are of another PID namespace."""
    namespace = info.get("pid_namespace", 0)
    return "" if namespace in (0, containers.pid_namespace()) else " of its own PID namespace, as those of its workers"


def _upgrade(info: Json) -> str:
    """Return what is to be done about a server whose files are of another build by now, "" for any other."""
    if not info.get("upgraded"):
        return ""
    return f"{info['upgraded']}: vdusefast restart {info['name']}"


def _past_text(past: Json | None) -> str:
    """Return a failure that has ended."""
    return f"failed until {duration_text(past['age_s'])} ago: {past['text']}" if past else ""


def _labelled(label: str, text: str, width: int | None) -> list[str]:
    """Return a label and its text, broken into lines between words."""
    line = f"  {label:{LABEL_COLUMNS}}{printable(text)}"
    return wrap(line, min(LINE_COLUMNS, width or LINE_COLUMNS), LABEL_COLUMNS + 2).split("\n")


def _queue_table(info: Json, width: int | None) -> str:
    texts = {"engine": "engine", "poll": "poll", "irq_hold": "irqs held"}
    heading = ["queue", "pid", "cpu", "irq cpu", "size", *texts.values(), "state", *MAIN_COUNTERS.values()]
    rows: list[list[object]] = [list(heading)]
    for queue in info["queues"]:
        state = queue["state"] + (f": {queue['reason']}" if queue.get("reason") else "")
        state += f", restarts {queue['restarts']}" if queue.get("restarts") else ""
        fixed = [queue["index"], *(_known(queue.get(key, -1)) for key in ("pid", "cpu", "irq_cpu", "size"))]
        rows.append([*fixed, *(queue.get(key) or "-" for key in texts), state, *_counters(queue)])
    if len(info["queues"]) > 1 and "total" in info:
        rows.append(["total", *[""] * 8, *_counters(info["total"])])
    return table(rows, left=(5, 6, 7, 8), width=width)


def _known(number: int) -> object:
    return "-" if number < 0 else number


def _counters(counted: Json) -> list[object]:
    values = [(name, counted.get(name, 0)) for name in MAIN_COUNTERS]
    return [size_text(value) if name.startswith("bytes") else value for name, value in values]
