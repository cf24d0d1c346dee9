"""Secrets in the URI of a store: no command line, environment, message or table shows one; files can hold them."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from vdusefast import Device, config, errors, make_config
from vdusefast.backends import absolute_uri, probe, python
from vdusefast.backends.plugin import StoreSpec
from vdusefast.base import secret
from vdusefast.server import launch

SECRET = "hunter2-secret"

# The code that makes a disk notes what everybody can read about its process, and whether it was given the secret.
DISK = f"""
import os
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20
    shareable = SHAREABLE

    def __init__(self, api_key="", token="", wrong=""):
        seen = b"".join(open("/proc/self/" + name, "rb").read() for name in ("cmdline", "environ"))
        ok = (api_key or token) == {SECRET!r} and {SECRET.encode()!r} not in seen
        with open(os.path.dirname(__file__) + "/seen", "a") as file:
            file.write("ok " if ok else "BAD " + repr((api_key, token, seen)))
        self.data = bytearray(1 << 20)

    def pread(self, buffer, offset_bytes):
        raise RuntimeError("cannot read python:x.py:Disk?api_key={SECRET}: no")

    def pwrite(self, buffer, offset_bytes):
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
"""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("python:d.py:D?key=s3cret", "python:d.py:D?key=***"),
        ("python:d.py:D?size=1M&api_key=s3c%20ret&x=1: cannot", "python:d.py:D?size=1M&api_key=***&x=1: cannot"),
        ("'python:d.py:D?PassWord=s3cret', then", "'python:d.py:D?PassWord=***', then"),
        ("faulty:op=read,delay=1s:python:m:D?token=s", "faulty:op=read,delay=1s:python:m:D?token=***"),
        ("nbds://alice:s3cret@host:1/export", "nbds://alice:***@host:1/export"),
        ("nbds+unix://alice@/?socket=/a&tls-psk-file=/k", "nbds+unix://alice@/?socket=/a&tls-psk-file=/k"),
        ("rbd:p/i@s?keyring=/k&id=me", "rbd:p/i@s?keyring=/k&id=me"),
        ("python:d.py:D?token@=/run/token", "python:d.py:D?token@=/run/token"),
        ("two: ?key=a, ?token=b; end", "two: ?key=***, ?token=***; end"),
        ("file:/srv/key=1.img at nbd://host:10809/x", "file:/srv/key=1.img at nbd://host:10809/x"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert secret.redact(text) == shown
    assert str(errors.BackendError(text)) == shown


def test_log_hides_them_in_messages_and_arguments(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vdusefast"):
        logging.getLogger("vdusefast").warning("%s: lost, as was %s", f"python:m:D?key={SECRET}", f"a://b:{SECRET}@c")
    assert caplog.messages == ["python:m:D?key=***: lost, as was a://b:***@c"]


@pytest.mark.parametrize("value", ["two words", 'quo"te', "ends:"])
def test_secret_that_messages_could_not_hide_is_refused(value: str) -> None:
    with pytest.raises(errors.ConfigError, match="password has a space, a quote or a punctuation") as caught:
        make_config(name="vd0", uri=f"python:m:D?password={value}&size=1")
    assert value not in str(caught.value)


@pytest.mark.parametrize("shareable", [True, False])
def test_no_process_shows_the_secret(tmp_path: Path, shareable: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The probe, workers and the relay: their command lines, their environments, and what is said of a failure."""
    path = tmp_path / "disk.py"
    path.write_text(DISK.replace("SHAREABLE", str(shareable)))
    made = make_config(name="vd0", uri=f"python:{path}:Disk?api_key={SECRET}", queues=2)
    with caplog.at_level(logging.INFO, "vdusefast"), Device(made) as device, device.driver() as driver:
        driver.write(0, b"x" * 4096)
        with pytest.raises(OSError, match=r"IOERR|Input/output"):
            driver.read(0, 4096)
        info = device.info()
    assert info["backend"] == f"python:{path}:Disk?api_key=***"
    assert SECRET not in repr(info)
    assert SECRET not in caplog.text
    seen = (tmp_path / "seen").read_text().split()
    assert seen == ["ok"] * (3 if shareable else 2)


def test_server_in_the_background_does_not_show_it(tmp_path: Path) -> None:
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); open('config', 'w').write(sys.stdin.read()); "
        "open('seen', 'wb').write(b''.join(open('/proc/self/' + name, 'rb').read() for name in ('cmdline', 'environ')))"
    )
    made = make_config(name="vd0", uri=f"python:m:D?key={SECRET}")
    with pytest.raises(errors.VdusefastError, match="ended with status 0 before"):
        launch.start(made, 20, [sys.executable, "-c", code])
    assert SECRET in (tmp_path / "config").read_text()
    assert SECRET.encode() not in (tmp_path / "seen").read_bytes()


def test_class_is_given_what_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.py"
    path.write_text(DISK.replace("SHAREABLE", "True"))
    (tmp_path / "my token").write_text(f"{SECRET}\n")
    (tmp_path / "my token").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    uri = absolute_uri("python:disk.py:Disk?token@=my%20token")
    assert uri == f"python:{path}:Disk?token@={tmp_path}/my%20token"
    probe.describe(StoreSpec(uri))
    assert (tmp_path / "seen").read_text() == "ok "


@pytest.mark.parametrize(
    ("mode", "content", "said"),
    [
        (0o644, b"x", r"has mode 0644: others may read or change it; chmod 0600 "),
        (0o620, b"x", r"has mode 0620"),
        (0o600, b"x" * 70000, "is no secret"),
        (0o600, b"\xff", "is not UTF-8"),
        (0o600, None, "cannot be read: No such file"),
    ],
)
def test_file_that_holds_no_secret_is_refused(tmp_path: Path, mode: int, content: bytes | None, said: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(errors.BackendError, match=said):
        python.arguments_of(f"python:m:D?token@={path}")


def test_group_may_read_it_and_no_device_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a b\r\n")
    path.chmod(0o640)
    assert secret.read_file(str(path)) == "a b"
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ValueError, match="no regular file"):
        secret.read_file(str(tmp_path / "pipe"))


def test_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_text("x")
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1234)
    assert os.access(path, os.R_OK)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(ValueError, match="belongs to user"):
        secret.read_file(str(path))


def test_configuration_file_may_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "vd0.toml"
    path.write_text(f'[device]\nname = "vd0"\n[backend]\nuri = "python:m:D?key={SECRET}"\n')
    assert config.load_config(path).backend.uri.endswith(SECRET)
