"""What a server leaves written for the next one: the state file, and every difference that it refuses to go on with."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import saved_state
from vdusefast.backends import open_store
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.device import CONFIG_BYTES, BlockDevice, config_fields
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.saved_state import SavedState
from vdusefast.transport import uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport
from vdusefast.transport.loopback import LoopbackTransport


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
    for _ in range(2):  # over an older one, and over what a writer that was killed has left
        path.with_suffix(".new").write_text("half")
        saved_state.save(path, state)
    found = saved_state.load(path)
    assert found == state
    assert found is not None
    assert found.config == config
    assert (found.api_version, found.vduse_features, found.transport) == (1, 3, "kernel")
    assert found.capacity_sectors == 16384
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["state"]


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
    return saved_state.make_state(configured(**overrides), model.spec(), LoopbackTransport())


@pytest.mark.parametrize(
    ("size_bytes", "overrides", "words"),
    [
        (1 << 19, {}, "size in sectors: .* made with 2048, and would now get 1024"),
        (1 << 20, {"block_size_bytes": 4096}, "device.block_size_bytes: .* made with 512, and would now get 4096"),
        (1 << 20, {"size_max_bytes": 65536}, "device.size_max_bytes: .* made with 131072, and would now get 65536"),
        (1 << 20, {"seg_max": 5}, "device.seg_max: .* made with 126, and would now get 5"),
        (1 << 20, {"queues": 3}, "device.queues: .* made with 2, and would now get 3"),
        (1 << 20, {"queue_size": 512}, "device.queue_size: .* made with 1024, and would now get 512"),
        (1 << 20, {"event_idx": False}, "features: .* made with EVENT_IDX, and would now get none of it"),
        (1 << 20, {"packed": False}, "features: .* made with RING_PACKED, and would now get none of it"),
        (1 << 20, {"engine": "uring"}, "features: .* made with IN_ORDER, and would now get none of it"),
    ],
)
def test_another_device_over_the_store_is_refused(
    tmp_path: Path, size_bytes: int, overrides: dict[str, Any], words: str
) -> None:
    offered = {"packed": True, "in_order": True, "engine": "sync"}
    state = file_state(tmp_path, **offered)
    model = file_model(tmp_path, size_bytes, **(offered | overrides))
    before = (model.offered_features, model.config_space)
    with pytest.raises(ConfigError, match=f"^vd0: {words}"):
        saved_state.adopt(state, model)
    assert (model.offered_features, model.config_space) == before


def test_same_device_goes_on(tmp_path: Path) -> None:
    state = file_state(tmp_path)
    model = file_model(tmp_path, 1 << 20)
    spec = model.spec()
    saved_state.adopt(state, model)
    assert model.spec() == spec


def test_store_that_has_grown_is_served_as_large_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = file_state(tmp_path)
    model = file_model(tmp_path, 1 << 21)
    with caplog.at_level(logging.WARNING):
        saved_state.adopt(state, model)
    assert model.capacity_sectors == config_fields(model.config_space)["capacity"] == 2048
    assert "vdusefast resize vd0" in caplog.text


def test_feature_that_was_not_offered_then_is_not_offered_now(tmp_path: Path) -> None:
    """Newer code may know more than that which made the device: its driver was never asked."""
    state = file_state(tmp_path, event_idx=False)
    model = file_model(tmp_path, 1 << 20)
    assert model.offered_features & uapi.VIRTIO_RING_F_EVENT_IDX
    saved_state.adopt(state, model)
    assert not model.offered_features & uapi.VIRTIO_RING_F_EVENT_IDX


def test_device_that_is_to_be_removed_is_taken_as_it_was(tmp_path: Path) -> None:
    """Whatever store it has for that: its requests are failed."""
    state = file_state(tmp_path, event_idx=False)
    model = model_of(configured("null:1M"))
    assert model.offered_features != state.offered_features
    saved_state.adopt(state, model, checked=False)
    assert (model.offered_features, model.config_space.hex()) == (state.offered_features, state.config_space)


def test_fields_have_the_names_of_the_structure(tmp_path: Path) -> None:
    found = config_fields(file_model(tmp_path, 1 << 20, queues=3).config_space)
    assert (found["capacity"], found["num_queues"], found["blk_size"], found["size_max"]) == (2048, 3, 512, 131072)
    with pytest.raises(ValueError, match="3 bytes"):
        config_fields(b"abc")
