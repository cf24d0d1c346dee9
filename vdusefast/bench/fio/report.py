"""Our part of the report, after fio's: the queues, what failed, and what the figures mean."""

from __future__ import annotations

from collections.abc import Sequence

from vdusefast.base.columns import wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common.tables import QUEUE_HEADINGS, count_text, latency_text, plain_table, queue_rows
from vdusefast.errors import VdusefastError

INTRODUCTION = """\
This starts a block device and lets fio, the usual load generator for disks,
write and read it for a while. fio reads back the blocks that it wrote and
compares them. At the end you see how fast the device was.
"""
EXPLANATION = """\
What this was: each queue of the device is served by a worker process of its
own, which moves data straight between the store and the memory of fio. The
load came through the rings that a virtual machine or the kernel would use.
fio's part: IOPS: requests finished in a second; BW: bytes moved in a second;
clat percentiles: 99.00th=[N]: 99 of 100 requests took at most N.
err= 0: no request failed, and no block was wrong.
The table: busy: how much of its time the worker used its CPU. /kick and /irq:
requests for each wake-up of the worker and of the driver; the more, the
better: a wake-up costs more than a request. errors: requests that the device
failed.\
"""


def device_text(queues: Sequence[Json], ended: str, width: int | None, *, explain: bool) -> str:
    """Return what stands after fio's text. ended: why it was early, "" when it was not. width: of the terminal."""
    lines = ["", plain_table(QUEUE_HEADINGS, queue_rows(queues), width)]
    if ended:
        lines.append(wrap(ended, width, 2))
    if explain:
        lines += [EXPLANATION]
    return "\n".join(lines) + "\n"


def baseline_text(baselines: Sequence[Json], width: int | None) -> str:
    """Return a line for each comparison with fio alone. width: of the terminal."""
    lines = []
    for one in baselines:
        ours, theirs, ratio = one["ours"], one["fio"], one["ratio"]
        lines.append(
            f"fio alone, ioengine {one['engine']}: {_spread(theirs['iops'])} IOPS, "
            f"mean {latency_text(theirs['clat_mean_ns'])}; with vdusefast {_spread(ours['iops'])} IOPS, mean "
            f"{latency_text(ours['clat_mean_ns'])}: {ratio['median']:.2f} times (+-{ratio['spread'] * 100:.0f} %, "
            f"{one['rounds']} rounds)"
        )
    return "".join(f"{wrap(line, width, 2)}\n" for line in lines)


def _spread(figure: Json) -> str:
    return f"{count_text(figure['median'])} (+-{figure['spread'] * 100:.0f} %)"


def unseen_errors(queues: Sequence[Json], *, tolerated: bool) -> VdusefastError | None:
    """Return the error of a device that failed requests while fio ended well. tolerated: the jobs accept errors."""
    failed = sum(queue["errors"] for queue in queues)
    if not failed or tolerated:
        return None
    return VdusefastError(f"the device failed {failed} request(s), which fio did not count as errors")
