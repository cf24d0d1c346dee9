"""The examples of the documents do what they say, and their tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
from documents import ROOT, block_with, blocks, make_checkout, read, rows, section, type_in

import vdusefast
from vdusefast import config, errors
from vdusefast.cli import app as cli
from vdusefast.control.states import DeviceState
from vdusefast.control.vq_states import VqState
from vdusefast.server import registry

CPUS = sorted(os.sched_getaffinity(0))


def run(words: list[str], cwd: Path) -> str:
    """Run a command in `cwd` and return what it printed."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The file of the examples."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


@pytest.mark.slow
def test_python_example(disk: Path) -> None:
    (example,) = [block for block in blocks("README.md", "python") if "device.driver()" in block]
    lines = run([sys.executable, "-c", example], disk.parent).splitlines()
    assert lines[0] == "hello, block device"
    assert [line.split(":")[0] for line in lines[1:]] == ["queue 0", "queue 1"]
    assert disk.read_bytes()[4096:4115] == b"hello, block device"


@pytest.mark.slow
def test_command_example(disk: Path) -> None:
    """The command that serves a file; on a machine with one CPU both workers share it."""
    block = block_with("truncate -s 64M").replace("--cpus=0,1", f"--cpus={CPUS[0]},{CPUS[-1]}")
    assert f"truncate -s 64M {disk.name}\n" in block
    report = json.loads(type_in(make_checkout(disk.parent), f"{block.rstrip()} --output-format=json", 120))
    assert [job["error"] for job in report["jobs"]] == [0]
    queues = report["vdusefast"]["queues"]
    assert [queue["cpu"] for queue in queues] == [CPUS[0], CPUS[-1]]
    assert all(queue["requests"] > 0 and queue["errors"] == 0 for queue in queues)
    assert disk.read_bytes().count(0) < 64 << 20


def test_configuration_example(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("docs/configuration.md", "toml")
    monkeypatch.chdir(disk.parent)
    Path("vd0.toml").write_text(example)
    config = vdusefast.load_config("vd0.toml")
    assert config.device.serial == "vd0-2026"
    if len(CPUS) < 2 or CPUS[:2] != [0, 1]:
        return  # the example names CPUs 0 and 1
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert driver.get_id() == "vd0-2026"
        assert [queue.cpu for queue in device.queues()] == [0, 1]


def test_options_of_the_table_exist() -> None:
    rows = [line for line in read("docs/performance.md").splitlines() if line.startswith("| `--")]
    named = set(re.findall(r"`(--[a-z-]+)", "\n".join(rows)))
    shown = run([sys.executable, "-m", "vdusefast.bench", "fio", "--help"], Path.cwd())
    assert len(named) > 8
    assert not {option for option in named if option not in shown}


def test_configuration_table_has_every_key_with_its_default() -> None:
    """A default that is computed, or depends on something, is explained in the text."""
    for heading, struct in (
        ("Device: what the driver sees", config.DeviceConfig),
        ("Backend: the store", config.BackendConfig),
        ("Queue: one worker", config.QueueConfig),
    ):
        table = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(section("docs/configuration.md", heading))}
        fields = {field.name: field for field in msgspec.structs.fields(struct)}
        assert set(table) == set(fields)
        for name, said in table.items():
            if said == "required":
                assert fields[name].required
            elif said not in ("computed", "none"):
                assert tomllib.loads(f"value = {said}")["value"] == fields[name].default, name


def test_exit_codes_of_the_table_are_those_of_the_code() -> None:
    said = {int(cells[0]) for cells in rows(section("docs/operate.md", "Exit codes"))}
    classes = [errors.VdusefastError, *errors.VdusefastError.__subclasses__()]
    assert said == {0, errors.EXIT_DELETED, cli.EXIT_INTERRUPTED} | {each.exit_code for each in classes}


def test_states_of_the_table_are_those_of_the_code() -> None:
    (devices, queues) = section("docs/operate.md", "States").split("States of a queue")
    names = [name for cells in rows(devices) for name in re.findall(r"`([a-z]+)`", cells[0])]
    without_server = {registry.DEAD, registry.BROKEN, registry.SILENT, registry.EMBEDDED, registry.HIDDEN}
    assert set(names) == set(DeviceState) | without_server | {"failed", "stopping"}
    assert len(names) == len(set(names))
    assert {cells[0].strip("`") for cells in rows(queues)} == set(VqState)


def test_qemu_is_started_as_the_readme_says() -> None:
    """tests/vm/guest/scenario_qemu.py starts a machine with these options."""
    tested = (ROOT / "tests/vm/guest/scenario_qemu.py").read_text()
    options = [cells[0].strip("`").split() for cells in rows(section("README.md", "A virtual machine"))]
    assert len(options) == 2
    for word in [word.replace("/dev/vhost-vdpa-0", "{node}") for words in options for word in words]:
        assert f'"{word}"' in tested, word
