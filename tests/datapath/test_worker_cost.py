"""The cost of a worker: modules at its start, and page faults while it serves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import vdusefast
from vdusefast.control.worker_process import default_command

MIB = 1 << 20
MODULE_COUNT_MAX = 90  # 74 with Python 3.11
# Modules that a start which searches site-packages, or a careless import, would bring.
HEAVY = {
    *("asyncio", "concurrent.futures", "importlib.util", "inspect", "json", "logging", "pathlib", "platform", "random"),
    *("shutil", "site", "subprocess", "tempfile", "threading", "tomllib", "traceback", "unittest", "urllib.parse"),
    *("click", "msgspec", "numpy", "psutil", "rich"),
    *("vdusefast.config", "vdusefast.control", "vdusefast.state", "vdusefast.transport"),
}

pytestmark = pytest.mark.timeout(60)


def test_worker_imports_little() -> None:
    *words, code = default_command()
    serve = "sys.exit(run(sys.argv[1:]))"
    assert serve in code
    code = code.replace(serve, "import vdusefast.worker._datapath; print(*sys.modules)")
    done = subprocess.run([*words, code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "vdusefast.worker._datapath" in modules
    assert not modules & HEAVY
    assert len(modules) <= MODULE_COUNT_MAX, sorted(modules)


def minor_faults(pid: int) -> int:
    """Return how often a process has needed a page that was not in its table (proc(5), minflt)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["null:1M", "memory:1M", "file"])
def test_no_page_faults_in_steady_state(uri: str, tmp_path: Path) -> None:
    if uri == "file":
        path = tmp_path / "disk.img"
        path.write_bytes(bytes(MIB))
        uri = f"file:{path}"
    config = vdusefast.make_config(name="faults", uri=uri, queue_size=64)
    with vdusefast.Device(config) as device, device.driver() as driver:
        pid = device.queues()[0].pid

        def load(rounds: int) -> int:
            """Use every page of store and buffers; returns the faults."""
            before = minor_faults(pid)
            for _ in range(rounds):
                for offset in range(0, MIB, 65536):
                    driver.write(offset, b"x" * 65536)
                    driver.read(offset, 65536)
            return minor_faults(pid) - before

        first = load(2)  # rings, tables and buffers are met for the first time
        assert first > 0, "the faults of this process are not counted here"
        assert load(20) <= 2
        assert device.stats().errors == 0
