"""The state file that a server writes for the next one, and every difference that the next one refuses."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast.backends import file as file_backend
from vdusefast.backends import open_store
from vdusefast.backends.plugin import Description
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.control.device_model import BlockDevice, find_emulated
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.state import saved_state, state_file
from vdusefast.state.saved_state import SavedState
from vdusefast.transport import uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport
from vdusefast.transport.loopback import LoopbackTransport
from vdusefast.transport.virtio_blk import CONFIG_BYTES, config_fields


def configured(uri: str = "null:8M", **overrides: Any) -> Config:
    return resolve_cpus(make_config(name="vd0", uri=uri, **{"transport": "kernel", "queues": 2, **overrides}))


def model_of(config: Config) -> BlockDevice:
    with open_store(config.backend, read_only=config.device.read_only) as store:
        return BlockDevice(config, store)


def state_of(config: Config) -> SavedState:
    transport = KernelTransport(KernelOptions(api_version=1, vduse_features=3))
    return saved_state.make_state(config, model_of(config).spec(), transport)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "vd0").mkdir()
    return tmp_path / "vd0/state"


def test_what_is_saved_is_found(path: Path) -> None:
    config = configured(serial="S-1", poll_us=7)
    state = state_of(config)
    assert saved_state.load(path) is None
    path.with_suffix(".new").write_text("half")  # what a writer that was killed has left
    for _ in range(2):  # also over an older one
        saved_state.save(path, state)
    found = saved_state.load(path)
    assert found == state
    assert found is not None
    assert found.config == config
    assert (found.api_version, found.vduse_features, found.transport) == (1, 3, "kernel")
    assert found.capacity_sectors == 16384
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["state"]


def test_state_of_an_older_version_is_gone_on_with(path: Path) -> None:
    """It says less of the store and of the configuration: the rest is as it was then."""
    described = Description(size_bytes=8 << 20, shareable=False, identity="i")
    saved_state.save(path, msgspec.structs.replace(state_of(configured()), described=described))
    fields = msgspec.json.decode(state_file.read(path))
    known = Description._fields.index("identity") + 1
    fields["described"] = fields["described"][:known]
    for key in ("discard", "write_zeroes"):
        del fields["config"]["backend"][key]
    state_file.write(path, msgspec.json.encode(fields))
    found = saved_state.load(path)
    assert found is not None
    assert found.described == described
    assert (described.granule_bytes, described.min_io_size_bytes, described.rotational) == (0, 0, -1)
    assert (found.config.backend.discard, found.config.backend.write_zeroes) == ("unmap", "unmap")


def test_other_transports_have_no_version_of_vduse() -> None:
    state = saved_state.make_state(configured(), model_of(configured()).spec(), LoopbackTransport())
    assert (state.transport, state.api_version, state.vduse_features) == ("loopback", 0, 0)


def damaged(text: bytes) -> list[tuple[bytes, str]]:
    fields = msgspec.json.decode(text)
    other = {**fields, "config": {**fields["config"], "device": {**fields["config"]["device"], "name": "vd1"}}}
    return [
        (b"", "truncated"),
        (text[: len(text) // 2], "truncated"),
        (b"\0" * 100, "malformed"),
        (b"{}", "missing required field"),
        (msgspec.json.encode({**fields, "version": 99}), "version 99, expected 1"),
        (msgspec.json.encode({**fields, "config_space": "zz"}), "non-hexadecimal"),
        (msgspec.json.encode({**fields, "config_space": "00"}), f"1 bytes, expected {CONFIG_BYTES}"),
        (msgspec.json.encode(other), "it is that of 'vd1'"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_file_that_is_not_what_was_written_is_refused(path: Path, case: int) -> None:
    text, words = damaged(msgspec.json.encode(state_of(configured())))[case]
    path.write_bytes(text)
    with pytest.raises(VdusefastError, match=f"vd0: .*is not the state of this device.*{words}"):
        saved_state.load(path)


def test_file_that_leads_elsewhere_is_refused(path: Path, tmp_path: Path) -> None:
    saved_state.save(path, state_of(configured()))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VdusefastError, match="vd0: cannot read"):
        saved_state.load(path)


def test_directory_that_is_gone_is_told(path: Path) -> None:
    path.parent.rmdir()
    with pytest.raises(VdusefastError, match="vd0: cannot write"):
        saved_state.save(path, state_of(configured()))


# -- another device


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"queues": 1}, "device.queues: .* made with 2, and would now get 1"),
        ({"queue_size": 128}, "device.queue_size: .* made with 1024, and would now get 128"),
        ({"read_only": True}, "device.read_only: .* made with false, and would now get true"),
        ({"bus": "vhost"}, "device.bus: .* made with virtio, and would now get vhost"),
        ({"bounce_size_bytes": 128 << 20}, "device.bounce_size_bytes: .* made with 90177536, .* get 134217728"),
        ({"transport": "loopback"}, "device.transport: .* made with kernel, and would now get loopback"),
        ({"cache": "writethrough"}, "backend.cache: .* made with writeback, and would now get writethrough"),
        ({"uri": "null:9M"}, "backend.uri: .* made with null:8M, and would now get null:9M"),
    ],
)
def test_configuration_of_another_device_is_refused(overrides: dict[str, Any], words: str) -> None:
    config = configured(**overrides)
    with pytest.raises(ConfigError, match=f"^vd0: {words}; .*vdusefast recover vd0.*vdusefast del vd0") as caught:
        saved_state.check_config(state_of(configured()), config, config.device.transport)
    assert caught.value.exit_code == 2


def test_what_a_driver_does_not_see_may_change() -> None:
    other = configured(
        serial="other", poll_us=3, msg_timeout_s=60, attach_timeout_s=9, engine="null", cache="none", irq_delay_us=1
    )
    saved_state.check_config(state_of(configured()), other, "kernel")
    vhost = {"bus": "vhost", "bounce_size_bytes": 128 << 20}
    saved_state.check_config(state_of(configured(**vhost)), configured(bus="vhost"), "kernel")


def file_model(tmp_path: Path, size_bytes: int, **overrides: Any) -> BlockDevice:
    (tmp_path / "disk.img").write_bytes(b"")
    os.truncate(tmp_path / "disk.img", size_bytes)
    return model_of(configured(f"file:{tmp_path}/disk.img", **overrides))


def file_state(tmp_path: Path, **overrides: Any) -> SavedState:
    model = file_model(tmp_path, 1 << 20, **overrides)
    config = configured(f"file:{tmp_path}/disk.img", **overrides)
    return saved_state.make_state(config, model.spec(), LoopbackTransport())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"block_size_bytes": 4096}, "device.block_size_bytes: .* made with 512, and would now get 4096"),
        (
            {"size_max_bytes": 65536, "bounce_size_bytes": 90177536},
            "device.size_max_bytes: .* with 131072, .* get 65536",
        ),
        ({"seg_max": 5}, "device.seg_max: .* made with 126, and would now get 5"),
        ({"event_idx": False}, "device.event_idx: .* made with true, and would now get false"),
        ({"packed": False}, "device.packed: .* made with true, and would now get false"),
        ({"in_order": False}, "device.in_order: .* made with true, and would now get false"),
        ({"indirect": False}, "device.indirect: .* made with true, and would now get false"),
    ],
)
def test_key_that_the_driver_sees_is_not_changed_behind_its_back(overrides: dict[str, Any], words: str) -> None:
    offered = {"packed": True, "in_order": True, "indirect": True, "engine": "null"}
    state = state_of(configured(**offered))
    with pytest.raises(ConfigError, match=f"^vd0: {words}"):
        saved_state.check_config(state, configured(**(offered | overrides)), "kernel")


def go_on(state: SavedState, tmp_path: Path, **store: Any) -> tuple[BlockDevice, list[str]]:
    """Return the device as the next server has it, over a store that is otherwise now, and what that emulates."""
    with open_store(state.config.backend, read_only=state.config.device.read_only) as found:
        for key, value in store.items():
            setattr(found, key, value)
        model = BlockDevice(state.config, found, state.shown)
        saved_state.check_shown(state, found)
        return model, find_emulated(model.config_space, found)


def test_same_device_goes_on(tmp_path: Path) -> None:
    state = file_state(tmp_path)
    fresh = file_model(tmp_path, 1 << 20)
    model, emulated = go_on(state, tmp_path)
    assert (vars(model), emulated) == (vars(fresh), [])


def test_store_that_has_shrunk_is_refused(tmp_path: Path) -> None:
    state = file_state(tmp_path)
    os.truncate(tmp_path / "disk.img", 1 << 19)
    with pytest.raises(ConfigError, match=r"^vd0: size in sectors: .* made with 2048, and would now get 1024"):
        go_on(state, tmp_path)


def test_store_that_has_grown_is_served_as_large_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = file_state(tmp_path)
    os.truncate(tmp_path / "disk.img", 1 << 21)
    with caplog.at_level(logging.WARNING):
        model, _ = go_on(state, tmp_path)
    assert model.capacity_sectors == config_fields(model.config_space)["capacity"] == 2048
    assert "vdusefast resize vd0" in caplog.text


@pytest.mark.parametrize(
    ("today", "words"),
    [
        ({"can_discard": False}, ["discard: the store cannot do it, so that nothing is done"]),
        ({"zeroes_cheaply": False}, ["write zeroes: the store cannot do it, so that zeroes are written out"]),
        ({"block_size_bytes": 4096, "granule_bytes": 4096}, ["blocks of 512 bytes: the store's have 4096"]),
        ({"granule_bytes": 16384}, ["blocks of 512 bytes: the store's have 16384"]),
        ({"physical_block_size_bytes": 65536, "opt_io_size_bytes": 1 << 20}, []),
        ({"min_io_size_bytes": 65536, "discard_granularity_bytes": 1 << 20, "alignment_offset_bytes": 3584}, []),
    ],
)
def test_what_the_store_cannot_do_today_is_emulated(tmp_path: Path, today: dict[str, Any], words: list[str]) -> None:
    """The driver sees what it saw."""
    state = file_state(tmp_path)
    fresh = file_model(tmp_path, 1 << 20)
    model, emulated = go_on(state, tmp_path, **today)
    assert vars(model) == vars(fresh)
    assert len(emulated) == len(words)
    assert all(word in text for word, text in zip(words, emulated, strict=True))


def test_what_the_driver_was_never_shown_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_backend, "_probe_fallocate", lambda *_: False)
    state = file_state(tmp_path, event_idx=False)
    monkeypatch.undo()
    assert file_model(tmp_path, 1 << 20).limits.discard_max_sectors
    model, emulated = go_on(state, tmp_path)
    assert not model.offered_features & (uapi.VIRTIO_RING_F_EVENT_IDX | uapi.VIRTIO_BLK_F_DISCARD)
    assert (model.limits.discard_max_sectors, model.limits.write_zeroes_max_seg, emulated) == (0, 1, [])


def test_store_that_is_read_only_by_now_is_refused(tmp_path: Path) -> None:
    state = file_state(tmp_path)
    with pytest.raises(BackendError, match=r"vd0: .*disk\.img is read-only now"):
        go_on(state, tmp_path, read_only=True)


def test_feature_of_another_version_is_refused(tmp_path: Path) -> None:
    state = file_state(tmp_path)
    state = msgspec.structs.replace(state, offered_features=state.offered_features | 1 << 17)
    with pytest.raises(ConfigError, match=r"^vd0: features: .* and would now get none of it"):
        go_on(state, tmp_path)


def test_full_file_system_can_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it can again tomorrow: the next server asks once more."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))

    class Failing:
        def __init__(self, number: int) -> None:
            self.number = number

        def fallocate64(self, *_: object) -> int:
            ctypes.set_errno(self.number)
            return -1

    for number, can in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)):
        failing = Failing(number)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, made=failing, **__: made)
        with image.open("rb") as file:
            assert file_backend._probe_fallocate(file.fileno(), 1 << 20, file_backend.FALLOC_FL_ZERO_RANGE) == can


def test_device_that_is_to_be_removed_is_taken_as_it_was(tmp_path: Path) -> None:
    """With any store: its requests are failed."""
    state = file_state(tmp_path, event_idx=False)
    with open_store(configured("null:1M").backend) as store:
        model = BlockDevice(configured("null:1M"), store, state.shown)
    assert (model.offered_features, model.config_space.hex()) == (state.offered_features, state.config_space)


def test_fields_have_the_names_of_the_structure(tmp_path: Path) -> None:
    found = config_fields(file_model(tmp_path, 1 << 20, queues=3).config_space)
    assert (found["capacity"], found["num_queues"], found["blk_size"], found["size_max"]) == (2048, 3, 512, 131072)
    with pytest.raises(ValueError, match="3 bytes"):
        config_fields(b"abc")


def test_format_may_be_said_later(tmp_path: Path) -> None:
    """A configuration may be given `?format=raw` while its device waits for another server."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    state = state_of(configured(f"file:{tmp_path}/a"))
    saved_state.check_config(state, configured(f"file:{tmp_path}/a?format=raw"), "kernel")
    with pytest.raises(ConfigError, match=r"backend\.uri"):
        saved_state.check_config(state, configured(f"file:{tmp_path}/b?format=raw"), "kernel")
