"""Reading the latency histograms of the shared pages: the bounds of their buckets, and percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdusefast.state.shared_pages import HIST_BUCKET_COUNT, HIST_SUB_COUNT

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def bucket_bounds_ns() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the first and the last nanosecond that each histogram bucket counts."""
    import numpy as np

    group, sub = np.divmod(np.arange(HIST_BUCKET_COUNT, dtype=np.uint64), np.uint64(HIST_SUB_COUNT))
    # The first two groups both have buckets of 1 ns: values below 32, then 32 to 63.
    shift = np.maximum(group, np.uint64(1)) - np.uint64(1)
    base = np.where(group > 0, np.uint64(HIST_SUB_COUNT), np.uint64(0))
    first = (base + sub) << shift
    return first, first + (np.uint64(1) << shift) - np.uint64(1)


def percentile_ns(hist: npt.NDArray[np.uint64], fractions: float | Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the latencies below which the `fractions` (0 to 1) of the counts lie, in nanoseconds.

    hist: counts per bucket. Each result is the middle of its bucket, 0 where nothing was counted.
    """
    import numpy as np

    first, last = bucket_bounds_ns()
    middle = (first.astype(np.float64) + last.astype(np.float64)) / 2
    total = np.cumsum(hist, dtype=np.uint64)
    if total[-1] == 0:
        return np.zeros(np.shape(fractions))
    rank = np.maximum(1, np.ceil(np.asarray(fractions, dtype=np.float64) * float(total[-1])))
    return np.asarray(middle[np.minimum(np.searchsorted(total, rank), HIST_BUCKET_COUNT - 1)], dtype=np.float64)
