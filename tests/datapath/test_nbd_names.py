"""A name service that does not answer keeps no worker of an NBD device from what it has to do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_rig import nbdkit_tcp

from vdusefast.api import Device
from vdusefast.config import make_config

pytestmark = pytest.mark.slow

WAIT_S = 30.0
# The limits below tell a wait for the name service, which ends with the test, from a slow machine.
PROMPT_S = 8.0

# Names are not resolved while there is a file, and other programs' are as always.
NO_NAMES_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <unistd.h>
int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r)
{
	typedef int Resolve(const char *, const char *, const struct addrinfo *, struct addrinfo **);
	Resolve *real = dlsym(RTLD_NEXT, "getaddrinfo");
	const char *down = getenv("NO_NAMES_FILE"), *asked = getenv("NAMES_ASKED_FILE");
	for (int i = 0; down && i < 3000 && access(down, F_OK) == 0; i++) {
		if (asked)
			close(creat(asked, 0600));
		usleep(20000);
	}
	return real(n, s, h, r);
}
"""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


@pytest.fixture
def no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Have workers wait for names while the first file is there; they make the second one then."""
    source, library = tmp_path / "no_names.c", tmp_path / "no_names.so"
    source.write_text("#include <fcntl.h>\n" + NO_NAMES_C)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=30)
    down, asked = tmp_path / "down", tmp_path / "asked"
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("NO_NAMES_FILE", str(down))
    monkeypatch.setenv("NAMES_ASKED_FILE", str(asked))
    return down, asked


def test_no_name_service_holds_nothing_up(no_names: tuple[Path, Path], tmp_path: Path) -> None:
    down, asked = no_names
    with nbdkit_tcp("memory", "8M") as server:
        uri = server.uri.replace("127.0.0.1", "localhost")
        config = make_config(name="d0", uri=uri, queues=1)
        with Device(config, run_dir=tmp_path / "run") as device:
            with device.driver() as driver:
                driver.write(0, b"a" * 4096)
                down.touch()
                server.stop()
                wait_until(asked.exists, "the worker asks for the name")
                pid = device.queues()[0].pid
                began_s = time.monotonic()
            # The driver is gone: it has reset the device.
            assert time.monotonic() - began_s < PROMPT_S
            assert device.queues()[0].pid == pid

            os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda: device.queues()[0].pid not in (pid, -1) and device.queues()[0].state == "stopped",
                "the next worker is ready without a name",
            )
            down.unlink()
            server.start()
            with device.driver() as driver:
                driver.write(0, b"b" * 4096)
                assert driver.read(0, 4096) == b"b" * 4096
            assert device.failure is None


def test_end_does_not_wait_for_a_name(no_names: tuple[Path, Path], tmp_path: Path) -> None:
    down, asked = no_names
    with nbdkit_tcp("memory", "8M") as server:
        uri = server.uri.replace("127.0.0.1", "localhost")
        device = Device(make_config(name="d0", uri=uri, queues=1), run_dir=tmp_path / "run")
        with device:
            with device.driver() as driver:
                driver.write(0, b"a" * 4096)
                down.touch()
                server.stop()
                wait_until(asked.exists, "the worker asks for the name")
            began_s = time.monotonic()
        assert time.monotonic() - began_s < PROMPT_S
        assert device.failure is None
        down.unlink()
