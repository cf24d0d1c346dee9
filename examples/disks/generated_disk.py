"""A read-only disk of any size that is computed: the 64-bit word at byte N is a hash of N and a seed.

    vdusefast serve: uri = "python:examples/disks/generated_disk.py:GeneratedDisk?size=16T&seed=7"

A reader can check every word, and two readers of the same place get the same. It has all requests of a round in
one NumPy expression, and any number of queues, since there is nothing to share.
"""

import numpy as np

import vdusefast


def words(first: np.ndarray | int, count: int, seed: int) -> np.ndarray:
    """Return `count` words from word `first` on (splitmix64); of an array of places, a row for each."""
    with np.errstate(over="ignore"):
        z = np.add.outer(np.asarray(first, "u8"), np.arange(count, dtype="u8")) + np.uint64(seed)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class GeneratedDisk(vdusefast.Backend):
    """Nothing but reads."""

    read_only = True

    def __init__(self, size: str = "1T", seed: str = "0") -> None:
        self.size_bytes, self.seed = vdusefast.parse_size(size), int(seed)

    def submit(self, batch: vdusefast.Batch) -> None:
        reads = batch.requests[batch.requests["operation"] == self.READ]
        for length in np.unique(reads["length_bytes"]):
            same = reads[reads["length_bytes"] == length]
            made = words(same["offset_bytes"] // 8, int(length) // 8, self.seed)
            for tag, row in zip(same["tag"].tolist(), made, strict=True):
                batch.buffers[tag][:] = row.tobytes()
        batch.complete()
