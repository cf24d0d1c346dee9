"""Configuration: what is accepted, and what each mistake says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vdusefast.config import (
    POLL_ALWAYS,
    BackendConfig,
    Config,
    QueueConfig,
    load_config,
    make_config,
    override,
    parse_size,
    resolve_cpus,
    validate,
)
from vdusefast.errors import ConfigError
from vdusefast.host import cpu_topology

EXAMPLE = """\
[device]
name = "vd0"
serial = "vd0-2026"
queues = 2
queue_size = 256
[backend]
uri = "file:/srv/vd0.img"
cache = "none"
engine = "uring"
[[queue]]
cpu = 0
irq_cpu = 0
poll_us = 20
"""


def topology(count: int) -> cpu_topology.Topology:
    """Return a machine of `count` CPUs, each a core, all allowed."""
    cpus = tuple(cpu_topology.Cpu(index, 0, index, (index,)) for index in range(count))
    return cpu_topology.Topology(cpus, frozenset(range(count)))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "vd0.toml"
    path.write_text(text)
    return path


def load(tmp_path: Path, text: str) -> Config:
    return load_config(write(tmp_path, text))


def test_file_is_loaded_and_missing_queues_get_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, EXAMPLE)
    assert (config.device.name, config.device.serial, config.device.queues) == ("vd0", "vd0-2026", 2)
    assert (config.backend.uri, config.backend.cache, config.backend.engine) == ("file:/srv/vd0.img", "none", "uring")
    assert config.queue == [QueueConfig(cpu=0, irq_cpu=0, poll_us=20), QueueConfig()]


def test_smallest_file_has_sensible_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, '[device]\nname = "a"\n[backend]\nuri = "null:1G"\n')
    device = config.device
    assert (device.queues, device.effective_queue_size, device.effective_seg_max) == (1, 256, 126)
    assert (device.transport, config.backend.cache, config.backend.engine) == ("auto", "writeback", "auto")
    assert config.queue == [QueueConfig(cpu=None, irq_cpu=None, poll_us=200)]


@pytest.mark.parametrize(("queue_size", "seg_max"), [(2, 1), (4, 2), (128, 126), (256, 126), (32768, 126)])
def test_seg_max_leaves_room_for_header_and_status(queue_size: int, seg_max: int) -> None:
    assert make_config(name="a", uri="null:1M", queue_size=queue_size).device.effective_seg_max == seg_max


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("queues = 2", "quues = 2", ":4: device.quues: unknown key; known here: name, serial, "),
        ("cache =", "caches =", ":8: backend.caches: unknown key; known here: uri, cache, engine"),
        ("irq_cpu =", "irqcpu =", ":12: queue[0].irqcpu: unknown key; known here: cpu, irq_cpu, poll, poll_us"),
        ("[backend]", "[store]\n[backend]", ":6: store: unknown key; known here: device, backend, queue"),
        ('name = "vd0"\n', "", ":1: device.name: missing"),
        ('uri = "file:/srv/vd0.img"\n', "", ":6: backend.uri: missing"),
        ("queues = 2", 'queues = "2"', ":4: device.queues: expected `int`, got `str`"),
        ('"uring"', '"turbo"', ":9: backend.engine: invalid enum value 'turbo'"),
        ("poll_us = 20", "poll_us = -1", ":13: queue[0].poll_us: -1 is not between 0 and 1000000"),
        ("poll_us = 20", 'poll = "often"', ":13: queue[0].poll: invalid enum value 'often'"),
        ("poll_us = 20", "irq_delay_us = 10001", ":13: queue[0].irq_delay_us: 10001 is not between 0 and 10000"),
        ("queues = 2", "queues = 65", ":4: device.queues: 65 is not between 1 and 64"),
        ("queues = 2", "queues = 0", ":4: device.queues: 0 is not between 1 and 64"),
        ("= 256", "= 100", ":5: device.queue_size: 100 is no power of two"),
        ("= 256", "= 65536", ":5: device.queue_size: 65536 is not between 2 and 32768"),
        ("= 256", "= 256\nblock_size_bytes = 1000", ":6: device.block_size_bytes: 1000 is no power of two"),
        ("= 256", "= 256\nblock_size_bytes = 8192", ":6: device.block_size_bytes: 8192 is not between 512 and 4096"),
        ("= 256", "= 256\nsize_max_bytes = 5000", ":6: device.size_max_bytes: 5000 is no multiple of 4096"),
        ("= 256", "= 128\nseg_max = 127", ":6: device.seg_max: 127 is not between 1 and 126"),
        ('"vd0-2026"', '"a-serial-of-21-bytes-"', ":3: device.serial: 'a-serial-of-21-bytes-'; a serial is at most 20"),
        ('"vd0"', '"a/b"', ":2: device.name: 'a/b'; a name is"),
        ('"vd0"', '"control"', ":2: device.name: 'control' is the name of the kernel's own node"),
        ('"file:/srv/vd0.img"', '""', ":7: backend.uri: empty"),
        ("cpu = 0\n", "cpu = 9999\n", ":11: queue[0].cpu: CPU 9999 does not exist; this machine has "),
        ("irq_cpu = 0", "irq_cpu = 9999", ":12: queue[0].irq_cpu: CPU 9999 does not exist; this machine has "),
        ("[[queue]]", "[[queue]]\n[[queue]]\n[[queue]]", ": queue: 3 [[queue]] entries, but device.queues is 2"),
        ("queues = 2", "queues = 2\ncpus = [0]", ":5: device.cpus: 1 CPUs for 2 queues; name one a queue"),
        ("queues = 2", 'queues = 2\ncpus = "all"', ":5: device.cpus: 'all' is not a list of CPUs"),
        ("queues = 2", "queues = 2\nqueues = 3", ": not TOML: "),
    ],
)
def test_mistake_is_named_with_its_key_and_place(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = write(tmp_path, EXAMPLE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_second_queues_key_is_placed_in_the_second_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":15: queue\[1\]\.cpux: unknown key"):
        load(tmp_path, EXAMPLE + "[[queue]]\ncpux = 0\n")


def test_file_that_is_missing_unreadable_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such configuration file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[device]\nname = '\xe9'\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 17"):
        load_config(tmp_path / "latin.toml")


def test_kernel_transport_keeps_requests_well_below_the_bounce_size() -> None:
    device = make_config(name="a", uri="null:1M", transport="kernel", bounce_size_bytes=1 << 20).device
    assert device.effective_seg_max == 4
    with pytest.raises(ConfigError, match=r"device\.bounce_size_bytes: 1048576 does not hold 2 requests of .* 1310720"):
        make_config(name="a", uri="null:1M", transport="kernel", bounce_size_bytes=1 << 20, seg_max=10)
    with pytest.raises(ConfigError, match=r"device\.bounce_size_bytes: .* no multiple of 4096"):
        make_config(name="a", uri="null:1M", bounce_size_bytes=(1 << 20) + 512)
    with pytest.raises(ConfigError, match=r'device\.user_memory: only bus "virtio" copies data'):
        make_config(name="a", uri="null:1M", bus="vhost", user_memory="on")


@pytest.mark.parametrize(
    ("settings", "queue_size", "indirect"),
    [
        ({}, 256, True),
        ({"transport": "kernel", "bus": "vhost"}, 1024, True),
        ({"transport": "kernel"}, 1024, False),
        ({"transport": "kernel", "queue_size": 256}, 256, True),  # too small without tables
        ({"transport": "kernel", "queue_size": 4096}, 4096, False),
        ({"transport": "kernel", "indirect": True}, 1024, True),
        ({"queue_size": 8, "indirect": False}, 8, False),
    ],
)
def test_rings_are_large_and_direct_where_the_driver_maps_each_descriptor(
    settings: dict[str, object], queue_size: int, indirect: bool
) -> None:
    device = make_config(name="a", uri="null:1M", **settings).device
    assert (device.effective_queue_size, device.effective_indirect) == (queue_size, indirect)


@pytest.mark.parametrize(
    ("settings", "size_bytes"),
    [
        ({"queues": 1}, 64 << 20),  # as the kernel has it: 341 requests of 128 KiB take less
        ({"queues": 2}, 86 << 20),
        ({"queues": 4, "queue_size": 256}, 64 << 20),
        ({"queues": 64}, 1 << 30),  # the kernel's limit
        ({"queues": 2, "size_max_bytes": 262144}, 171 << 20),
        ({"queues": 2, "bounce_size_bytes": 32 << 20}, 32 << 20),
    ],
)
def test_bounce_pages_suffice_for_what_the_rings_hold(settings: dict[str, object], size_bytes: int) -> None:
    config = make_config(name="a", uri="null:1M", transport="kernel", **settings)
    assert config.device.effective_bounce_size_bytes == size_bytes


def test_a_message_timeout_leaves_time_for_answers() -> None:
    assert make_config(name="a", uri="null:1M", msg_timeout_s=0).device.msg_timeout_s == 0
    with pytest.raises(ConfigError, match=r"device\.msg_timeout_s: 5 is below the 30 s"):
        make_config(name="a", uri="null:1M", msg_timeout_s=5)


def test_make_config_takes_fields_of_every_section() -> None:
    config = make_config(name="a", uri="memory:1M", queues=3, engine="sync", poll_us=0, read_only=True)
    assert config.device.queues == 3
    assert config.device.read_only
    assert config.backend.engine == "sync"
    assert [queue.poll_us for queue in config.queue] == [0, 0, 0]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"colour": 1, "shape": 2}, "no such option: colour, shape"),
        ({"queues": "2"}, "device.queues: expected `int`, got `str`"),
        ({"cache": "fast"}, "backend.cache: invalid enum value 'fast'"),
        ({"queues": 1000}, "device.queues: 1000 is not between 1 and 64"),
        ({"queues": -1}, "device.queues: -1 is not between 1 and 64"),
    ],
)
def test_make_config_names_what_is_wrong(overrides: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        make_config(name="a", uri="null:1M", **overrides)


def test_override_keeps_what_it_does_not_name() -> None:
    config = make_config(name="a", uri="null:1M", queues=2, poll_us=7, cache="unsafe")
    changed = override(config, queues=3, cache="none")
    assert (changed.device.name, changed.backend.uri, changed.backend.cache) == ("a", "null:1M", "none")
    assert [queue.poll_us for queue in changed.queue] == [7, 7, 200]
    assert len(override(changed, queues=1).queue) == 1


def test_overriding_cpus_replaces_what_the_queues_said() -> None:
    config = override(make_config(name="a", uri="null:1M", cpu=0, poll_us=7), cpus="auto")
    assert config.queue == [QueueConfig(cpu=None, poll_us=7)]


def test_two_queues_on_one_cpu_are_allowed_and_warned_of() -> None:
    config = make_config(name="a", uri="null:1M", queues=2, cpu=0)
    assert validate(config) == ["a: queues 0, 1 share CPU 0; they will slow each other down"]
    assert validate(make_config(name="a", uri="null:1M", queues=2)) == []


@pytest.mark.parametrize(("poll", "limit_us"), [("adaptive", 7), ("always", POLL_ALWAYS), ("never", 0)])
def test_mode_of_polling_becomes_a_limit(poll: str, limit_us: int) -> None:
    assert make_config(name="a", uri="null:1M", poll=poll, poll_us=7).queue[0].spin_limit_us == limit_us


@pytest.mark.parametrize(
    ("queues", "problems"),
    [
        ([QueueConfig(poll="always")], []),
        ([QueueConfig(poll="always", cpu=0, irq_cpu=1)], []),
        (
            [QueueConfig(poll="always"), QueueConfig(poll="always")],
            ["a: 2 queues have poll .* none is left to the driver"],
        ),
        (
            [QueueConfig(poll="always", cpu=0), QueueConfig(cpu=0)],
            ["a: queues 0, 1 share CPU 0", "a: queue 0 has .* all of CPU 0, and the worker of queue 1 needs it, too"],
        ),
        (
            [QueueConfig(poll="always", cpu=0), QueueConfig(cpu=1, irq_cpu=0)],
            ["a: queue 0 has .* all of CPU 0, and interrupts of the device are to go there"],
        ),
    ],
)
def test_worker_that_never_sleeps_is_warned_of_where_others_need_its_cpu(
    queues: list[QueueConfig], problems: list[str]
) -> None:
    device = make_config(name="a", uri="null:1M", queues=len(queues)).device
    config = Config(device=device, backend=BackendConfig(uri="null:1M"), queue=queues)
    warnings = validate(config, topology(2))
    assert len(warnings) == len(problems)
    for warning, problem in zip(warnings, problems, strict=True):
        assert re.match(problem, warning)


def test_auto_gives_each_queue_a_cpu_and_keeps_those_named() -> None:
    config = make_config(name="a", uri="null:1M", queues=3, cpus="auto")
    assert [queue.cpu for queue in resolve_cpus(config, topology(4)).queue] == [0, 1, 2]
    fixed = Config(device=config.device, backend=config.backend, queue=[QueueConfig(cpu=1), QueueConfig()])
    resolved = resolve_cpus(fixed, topology(4))
    assert [queue.cpu for queue in resolved.queue] == [1, 0, 2]
    assert resolved.device.cpus == ""
    assert resolve_cpus(resolved, topology(4)) == resolved


def test_auto_of_a_kernel_disk_waits_for_the_disk() -> None:
    """Its workers are placed by who submits to which queue; a virtual machine's by the machine alone."""
    config = make_config(name="a", uri="null:1M", queues=2, cpus="auto", transport="kernel")
    resolved = resolve_cpus(config, topology(4))
    assert (resolved.device.cpus, [queue.cpu for queue in resolved.queue]) == ("auto", [None, None])
    with_vhost = resolve_cpus(override(config, bus="vhost"), topology(4))
    assert (with_vhost.device.cpus, [queue.cpu for queue in with_vhost.queue]) == ("", [0, 1])


def test_auto_with_more_queues_than_cpus_warns() -> None:
    config = make_config(name="a", uri="null:1M", queues=3, cpus="auto")
    assert validate(config, topology(2)) == ["a: queues 0, 2 share CPU 0; they will slow each other down"]


@pytest.mark.parametrize("cpus", [[1, 0], "1,0"])
def test_list_of_cpus_goes_to_the_queues_in_order(cpus: object) -> None:
    config = override(make_config(name="a", uri="null:1M"), queues=2)
    listed = Config(device=type(config.device)(name="a", queues=2, cpus=cpus), backend=config.backend)  # type: ignore[arg-type]
    assert [queue.cpu for queue in resolve_cpus(listed, topology(2)).queue] == [1, 0]
    clash = Config(device=listed.device, backend=listed.backend, queue=[QueueConfig(cpu=0)])
    with pytest.raises(ConfigError, match="gives CPU 1 to queue 0, which has cpu = 0"):
        resolve_cpus(clash, topology(2))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("4096", 4096), ("512B", 512), ("64k", 65536), ("64M", 64 << 20), ("1GiB", 1 << 30), (" 2 T ", 2 << 40)],
)
def test_size_is_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "64MB", "1X", "0x10", "9" * 30, "8192P", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)
