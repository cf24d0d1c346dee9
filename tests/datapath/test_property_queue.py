"""The real queue and the model agree on every schedule: memory, store, interrupts and the reason of a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from device_model import Params
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from model import F_EVENT_IDX, F_IN_ORDER, F_PACKED, Reason
from rig import DISK_DIR, Rig, file_engines, pattern
from schedules import CAPACITY, chains, layouts, params, put, regions_of

pytestmark = pytest.mark.slow

sizes = st.sampled_from([2, 4, 16, 64, 256])
start_indices = st.sampled_from([0, 1, 65530, 65535, 32767])
FORMATS = {"split": 0, "split in order": F_IN_ORDER, "packed": F_PACKED, "packed in order": F_PACKED | F_IN_ORDER}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def ring(request: pytest.FixtureRequest) -> int:
    """The features of a ring's format."""
    return int(request.param)


def starts(ring: int, size: int) -> st.SearchStrategy[int]:
    """Where a ring may begin: an index, or a slot and its wrap counter."""
    if not ring & F_PACKED:
        return start_indices
    slots = st.sampled_from([0, 1, size - 1, size // 2])
    return st.builds(lambda slot, wrap: slot | wrap << 15, slots, st.sampled_from([1, 0]))


def relaxed(max_examples: int) -> settings:
    """No deadline: the machine may be busy."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=os.environ.get("CI") == "true",
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def set_wish(rig: Rig, distance: int, quiet: bool) -> None:
    """Have the driver wish for an interrupt `distance` from where it will go on."""
    event_at = rig.ring.avail_idx + distance
    if rig.packed:
        slot, wrap = (rig.ring.avail_idx & 0x7FFF) + distance, rig.ring.avail_idx >> 15
        event_at = slot % rig.ring.size | (wrap ^ (slot // rig.ring.size & 1)) << 15
    rig.ring.set_wish(no_interrupt=quiet, used_event=event_at & 0xFFFF)


def run_schedule(data: st.DataObject, rig: Rig, layout: list[tuple[int, int, int, int]], *, hostile: bool) -> None:
    """Make chains available and compare, step after step, until the ring fails."""
    what = rig.params
    for _ in range(data.draw(st.integers(1, 4), label="steps")):
        set_wish(rig, data.draw(st.integers(-3, 3)), data.draw(st.booleans()))
        for _ in range(data.draw(st.integers(0, min(4, rig.ring.size)), label="chains")):
            chain = data.draw(chains(layout, what, hostile=hostile))
            rig.ring.make_available(put(rig, chain))
        reason = rig.agree()
        event(reason.name)
        if reason != Reason.NONE:
            assert rig.queue.poll() == -1
            return


def test_memory_engine_agrees_with_the_model(ring: int) -> None:
    @relaxed(250)
    @given(st.data(), sizes)
    def agree(data: st.DataObject, size: int) -> None:
        layout = data.draw(layouts())
        what = data.draw(params(queue_size=size, ring=ring))
        start_idx = data.draw(starts(ring, size))
        with Rig(what, size=size, start_idx=start_idx, regions=regions_of(layout)) as rig:
            run_schedule(data, rig, layout, hostile=True)

    agree()


@pytest.mark.parametrize("engine", [*file_engines(), "cached"])
def test_file_engines_agree_with_the_model(engine: str, ring: int, tmp_path: Path) -> None:
    path = DISK_DIR / f"property-{os.getpid()}.img" if engine == "cached" else tmp_path / "store"

    @relaxed(40)
    @given(st.data(), st.sampled_from(["writeback", "writethrough", "unsafe"]))
    def agree(data: st.DataObject, cache: str) -> None:
        layout = data.draw(layouts())
        what = data.draw(params(queue_size=16, ring=ring))
        path.write_bytes(pattern(CAPACITY * 512))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with Rig(what, engine=engine, store_fd=fd, regions=regions_of(layout), cache=cache) as rig:
                for _ in range(data.draw(st.integers(1, 3))):
                    # One at a time: the order of completions, and so the used ring, is an engine's own affair.
                    rig.ring.make_available(put(rig, data.draw(chains(layout, what, hostile=False))))
                    if rig.agree() != Reason.NONE:
                        return
        finally:
            os.close(fd)

    try:
        agree()
    finally:
        path.unlink()


@pytest.mark.parametrize("size", [1024, 32768])
def test_large_queues_wrap_around(size: int, ring: int) -> None:
    @relaxed(6)
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        layout = data.draw(layouts())
        what = data.draw(params(queue_size=size, ring=ring))
        start_idx = size - 2 if ring & F_PACKED else 65534
        with Rig(what, size=size, start_idx=start_idx, regions=regions_of(layout)) as rig:
            run_schedule(data, rig, layout, hostile=False)

    agree()


def serve_burst(rig: Rig, count: int, distance: int, quiet: bool) -> None:
    """Have `count` flushes served with the driver's wish for an interrupt `distance` from where it stands."""
    parts = rig.request(4)  # FLUSH
    set_wish(rig, distance, quiet)
    for _ in range(count):
        rig.ring.make_available(rig.ring.put_chain(parts))
    rig.agree()


def features_of(ring: int, event_idx: bool) -> int:
    return ring | (Params.features if event_idx else Params.features & ~F_EVENT_IDX)


def test_interrupts_are_sent_when_the_driver_asked(ring: int) -> None:
    bursts_of_any_size = st.lists(
        st.tuples(st.integers(1, 30), st.integers(-40, 40), st.booleans()), min_size=1, max_size=8
    )

    @relaxed(60)
    @given(bursts_of_any_size, starts(ring, 64), st.booleans())
    def ask(bursts: list[tuple[int, int, bool]], start_idx: int, event_idx: bool) -> None:
        with Rig(Params(features=features_of(ring, event_idx)), size=64, start_idx=start_idx) as rig:
            for burst, distance, quiet in bursts:
                serve_burst(rig, burst, distance, quiet)
            assert rig.model.least.count <= rig.counter("irqs") <= rig.model.most.count
            assert len(bursts) <= rig.counter("irqs") + rig.counter("irqs_suppressed") <= rig.counter("batches")

    ask()


def test_interrupts_of_single_batches_are_exact(ring: int) -> None:
    bursts_of_a_batch = st.lists(
        st.tuples(st.integers(1, 8), st.integers(-10, 10), st.booleans()), min_size=1, max_size=8
    )

    @relaxed(60)
    @given(bursts_of_a_batch, starts(ring, 64), st.booleans())
    def ask(bursts: list[tuple[int, int, bool]], start_idx: int, event_idx: bool) -> None:
        with Rig(Params(features=features_of(ring, event_idx)), size=64, start_idx=start_idx) as rig:
            for burst, distance, quiet in bursts:
                serve_burst(rig, burst, distance, quiet)
                assert rig.counter("irqs") == rig.model.least.count == rig.model.most.count

    ask()


@relaxed(60)
@given(st.data())
def test_index_anywhere_is_served_or_refused(data: st.DataObject) -> None:
    """Any content of the avail ring is served as by the model, or fails for the same reason."""
    with Rig(size=8, start_idx=data.draw(start_indices)) as rig:
        parts = rig.request(0, 0, b"", 512)
        for _ in range(3):
            rig.ring.make_available(rig.ring.put_chain(parts))
        for slot in range(8):
            if data.draw(st.booleans()):
                head = data.draw(st.one_of(st.integers(0, 9), st.integers(0, 65535)))
                rig.ring.put_u16(rig.ring.avail + 4 + 2 * slot, head)
        rig.ring.put_u16(rig.ring.avail + 2, rig.ring.start_idx + data.draw(st.integers(-3, 11)))
        event(rig.agree().name)
