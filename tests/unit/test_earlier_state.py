"""This release adopts the devices of earlier ones: the files in `releases/` were written by them.

`VERSION/*.json` are saved states of devices, most of them of the kernel's; their file is /srv/disk.img.
`VERSION/killed.json` and `killed.pages.gz` are those of a loopback device whose server was killed as in
test_previous_release.py: after 64 writes, with one more in flight in each of two queues.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from held_writes import HeldWrites, check_blocks, wait_until, write_blocks

from vdusefast.api import Device
from vdusefast.backends import open_store, plugin_store
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.control.device_model import BlockDevice
from vdusefast.driver.loopback_driver import LoopbackDriver, area_sizes
from vdusefast.state import saved_state
from vdusefast.state.saved_state import SavedState
from vdusefast.transport.loopback_bus import LoopbackBus

RELEASES = Path(__file__).with_name("releases")
NAME = "vd0"
STATES = sorted(RELEASES.glob("*/*.json"))
NO_HEAD = 0xFFFF  # a queue that pops this from its avail ring fails


def load(path: Path, image: Path, directory: Path) -> SavedState:
    """Return a state as a server finds it in the run directory `directory`, which exists."""
    (directory / "state").write_text(path.read_text().replace("/srv/disk.img", str(image)))
    state = saved_state.load(directory / "state")
    assert state is not None
    return state


def spoil_last_avail_entry(driver: LoopbackDriver, bus: LoopbackBus, queue: int) -> None:
    """Overwrite the last entry of an avail ring: then only the in-flight log names that request."""
    ring, info = driver.ring(queue), bus.vq_info(queue)
    area = driver.memory_at(info.driver_addr, area_sizes(info.size)[1])
    wait_until(lambda: avail_idx(area) != ring.last_used_idx)
    struct.pack_into("<H", area, 4 + 2 * ((avail_idx(area) - 1) % info.size), NO_HEAD)


def avail_idx(area: memoryview) -> int:
    """Return the index that the driver has published in the area of an avail ring."""
    return int(struct.unpack_from("<H", area, 2)[0])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("path", STATES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_device_is_served_as_its_driver_knows_it(path: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    state = load(path, image, tmp_path / NAME)
    config = saved_state.as_made(state, state.config)
    saved_state.check_config(state, config, state.transport)
    described, read_only = state.described, config.device.read_only
    with (
        open_store(config.backend, read_only=read_only)
        if described is None
        else plugin_store(config.backend, read_only=read_only, described=described)
    ) as store:
        saved_state.check_shown(state, store)
        spec = BlockDevice(config, store, state.shown).spec()
    assert (spec.offered_features, spec.config.hex()) == (state.offered_features, state.config_space)
    assert (spec.queue_count, spec.queue_size_max) == (state.queue_count, state.queue_size_max)


@pytest.mark.slow
@pytest.mark.timeout(300)  # a write that is not answered ends after held_writes.WAIT_S, with its reason
@pytest.mark.parametrize("release", sorted(RELEASES.iterdir()), ids=lambda path: path.name)
def test_device_of_a_killed_server_is_adopted(release: Path, image: Path, tmp_path: Path) -> None:
    """A server of ours stands in for the killed one until its files are those of that release.

    The requests in flight are replayed from its log: they are no longer in the avail rings.
    """
    base = tmp_path / "run"
    (tmp_path / NAME).mkdir()
    config = load(release / "killed.json", image, tmp_path / NAME).config
    with LoopbackHost(tmp_path / "bus") as host:
        first = Device(config, run_dir=base, transport=RemoteLoopbackTransport(host.path))
        first.start()
        with LoopbackDriver(host.bus) as driver:
            write_blocks(driver)
            first.hand_over()
            with HeldWrites(driver) as held:
                held.wait_sent()
                for queue in range(driver.queue_count):
                    spoil_last_avail_entry(driver, host.bus, queue)
                (base / NAME / "pages").write_bytes(gzip.decompress((release / "killed.pages.gz").read_bytes()))
                load(release / "killed.json", image, base / NAME)
                second = Device(config, run_dir=base, transport=RemoteLoopbackTransport(host.path))
                second.start(recover=True)
            assert held.errors == []
            check_blocks(driver)
        assert second.failure is None
        second.stop()
