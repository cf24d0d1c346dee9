"""The examples of the README do what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vdusefast

README = (Path(__file__).parents[2] / "README.md").read_text()
CPUS = sorted(os.sched_getaffinity(0))


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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


def test_python_example(disk: Path) -> None:
    (example,) = [block for block in blocks("python") if "device.driver()" in block]
    lines = run([sys.executable, "-c", example], disk.parent).splitlines()
    assert lines[0] == "hello, block device"
    assert [line.split(":")[0] for line in lines[1:]] == ["queue 0", "queue 1"]
    assert disk.read_bytes()[4096:4115] == b"hello, block device"


def test_command_example(disk: Path) -> None:
    """The command that serves a file; on a machine with one CPU both workers share it."""
    (block,) = [block for block in blocks("sh") if "truncate -s 64M" in block]
    make_file, command = block.strip().splitlines()
    assert make_file.split() == ["truncate", "-s", "64M", disk.name]
    words = command.split()
    assert words[0] == "python"
    words = [word.replace("--cpus=0,1", f"--cpus={CPUS[0]},{CPUS[-1]}") for word in words[1:]]
    report = json.loads(run([sys.executable, *words, "--output-format=json"], disk.parent))
    assert report["jobs"][0]["error"] == 0
    queues = report["vdusefast"]["queues"]
    assert [queue["cpu"] for queue in queues] == [CPUS[0], CPUS[-1]]
    assert all(queue["requests"] > 0 and queue["errors"] == 0 for queue in queues)
    assert disk.read_bytes().count(0) < 64 << 20


def test_configuration_example(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("toml")
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
    rows = [line for line in README.splitlines() if line.startswith("| `--")]
    named = set(re.findall(r"`(--[a-z-]+)", "\n".join(rows)))
    shown = run([sys.executable, "-m", "vdusefast.bench", "fio", "--help"], Path.cwd())
    assert len(named) > 8
    assert not {option for option in named if option not in shown}
