"""Names with characters in them that mean something elsewhere: they are served, or one line says why not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbd_rig import nbdkit
from served import BASE, ended, vdusefast

import vdusefast as package
from vdusefast import errors
from vdusefast.backends import URI_MAX_CHARACTERS, absolute_uri
from vdusefast.base import logs
from vdusefast.cli import app as cli
from vdusefast.cli import render
from vdusefast.config import load_config, make_config
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.server.systemd import unit

STRANGE = "a b\n<0>c\r\x1b[31m\t%41%s?x=y#&;'\"\\$HOME{} \u202e\u00e9\u65e5"
NO_UTF8 = os.fsdecode(b"b\xe9\xff.img")
CONFIG = '[device]\nname = "vd0"\ntransport = "loopback"\n[backend]\nuri = "null:8M"\n'


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "vd0.toml"
    path.write_text(CONFIG)
    return str(path)


def image(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(1 << 20))
    return path


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.removesuffix("\n").isprintable()


@pytest.mark.slow
def test_strange_path_is_served_shown_and_written_down(tmp_path: Path, config: str) -> None:
    path = image(tmp_path / STRANGE / (STRANGE[:40] * 3))
    done = vdusefast("add", config, "--backend", f"file:{path}", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    added = json.loads(done.stdout)
    assert added["backend"] == f"file:{path}"
    try:
        shown = vdusefast("show", "vd0")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "\x1b" not in shown.stdout
        assert "\n<0>c" not in shown.stdout
        assert r"a b\n<0>c\r\x1b[31m" in " ".join(shown.stdout.split())
        assert json.loads(vdusefast("show", "vd0", "--json").stdout)["backend"] == f"file:{path}"
        listed = vdusefast("list").stdout
        assert len(listed.splitlines()) == 2
        assert "\x1b" not in listed
        again = vdusefast("add", config, "--backend", f"file:{path}")
        assert again.returncode == 4
        assert is_one_line(again.stderr)
    finally:
        assert vdusefast("del", "vd0").returncode == 0
        assert ended(added["pid"])
    assert not list(BASE.iterdir())


def test_strange_path_in_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "vd0.toml"
    path.write_text(CONFIG.replace('"null:8M"', json.dumps(f"file:{STRANGE}", ensure_ascii=False)))
    assert load_config(path).backend.uri == f"file:{STRANGE}"


@pytest.mark.parametrize("command", ["add", "serve"])
@pytest.mark.parametrize("relative", [False, True])
def test_path_that_is_no_utf8_is_one_line(
    tmp_path: Path,
    config: str,
    command: str,
    relative: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = image(tmp_path / NO_UTF8)
    monkeypatch.chdir(tmp_path)
    uri = f"file:{NO_UTF8}" if relative else f"file:{path}"
    assert cli.run([command, config, "--backend", uri]) == 2
    said = capsys.readouterr().err
    assert is_one_line(said)
    assert r"b\udce9\udcff.img: not UTF-8; rename the file" in said


@pytest.mark.slow
def test_process_that_is_given_a_path_that_is_no_utf8_ends_in_order(tmp_path: Path, config: str) -> None:
    path = image(tmp_path / NO_UTF8)
    done = vdusefast("add", config, "--backend", f"file:{path}")
    assert (done.returncode, is_one_line(done.stderr)) == (2, True), done.stderr
    link = tmp_path / "link.img"
    link.symlink_to(path)  # as the message says
    with package.Device(make_config(name="t0", uri=f"file:{link}")) as device:
        assert device.info()["size_bytes"] == 1 << 20


def test_directory_that_is_no_utf8_counts_for_relative_paths(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / NO_UTF8
    image(directory / "disk.img")
    for uri in ("file:disk.img", "faulty:op=read,error=EIO:file:disk.img", "python:disk.py:Disk"):
        monkeypatch.chdir(directory)
        assert cli.run(["add", config, "--backend", uri]) == 2
        said = capsys.readouterr().err
        assert is_one_line(said)
        assert "not UTF-8" in said


@pytest.mark.parametrize("command", [["add", "CONFIG"], ["list"], ["show", "vd0"], ["del", "vd0"]])
def test_run_directory_that_is_no_utf8_is_one_line(
    tmp_path: Path,
    config: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path / NO_UTF8))
    assert cli.run([config if word == "CONFIG" else word for word in command]) == 1
    said = capsys.readouterr().err
    assert is_one_line(said)
    assert "set VDUSEFAST_RUN_DIR to another directory" in said


@pytest.mark.slow
def test_strange_run_directory_is_used(tmp_path: Path, config: str) -> None:
    environment = {**os.environ, "VDUSEFAST_RUN_DIR": str(tmp_path / "r\n 1%i")}
    done = vdusefast("add", config, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert vdusefast("list", env=environment).stdout.count("\n") == 2
    assert vdusefast("del", "vd0", env=environment).returncode == 0
    assert ended(json.loads(done.stdout)["pid"])


@pytest.mark.parametrize(
    "words",
    [["add", NO_UTF8], ["add", f"{NO_UTF8}.toml"], ["show", NO_UTF8], ["del", STRANGE], ["resize", STRANGE, "1G"]],
)
def test_names_of_devices_that_cannot_be_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) in (2, 3)
    assert is_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("field", ["name", "serial"])
@pytest.mark.parametrize("value", ["a\nb", "a b\x1b", NO_UTF8, "\u65e5", "a/b", "%i", "vd0\n"])
def test_name_and_serial_take_no_control_characters(field: str, value: str) -> None:
    if field == "serial" and value in ("a/b", "%i"):
        assert make_config(name="vd0", uri="null:1M", serial=value).device.serial == value
        return
    with pytest.raises(ConfigError) as caught:
        make_config(**{"name": "vd0", "uri": "null:1M", field: value})
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, config: str) -> None:
    path = image(tmp_path / "\u65e5.img")
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = vdusefast("add", config, "--backend", f"file:{path}", "--json", env=latin)
    assert done.returncode == 0, done.stderr
    try:
        for command in ("show", "list"):
            shown = vdusefast(*((command, "vd0") if command == "show" else (command,)), env=latin)
            assert (shown.returncode, shown.stderr) == (0, "")
            assert r"\u65e5.img" in shown.stdout
    finally:
        assert vdusefast("del", "vd0").returncode == 0
        assert ended(json.loads(done.stdout)["pid"])


@pytest.mark.slow
def test_long_path_is_one_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["add", config, "--backend", f"file:/{'a/' * 2500}b"]) == 1
    said = capsys.readouterr().err
    assert is_one_line(said)
    assert "File name too long" in said
    assert cli.run(["add", config, "--backend", f"file:/{'a' * URI_MAX_CHARACTERS}"]) == 2
    said = capsys.readouterr().err
    assert is_one_line(said)
    assert len(said) < 300


def test_longest_uri_is_served_and_written_down(tmp_path: Path) -> None:
    (tmp_path / "disk.py").write_text(
        "import vdusefast\nclass Disk(vdusefast.Backend):\n    size_bytes = 1 << 20\n"
        "    def __init__(self, text): pass\n    def pread(self, buffer, offset): pass\n"
    )
    uri = f"python:{tmp_path}/disk.py:Disk?text="
    uri += "x" * (URI_MAX_CHARACTERS - len(uri))
    with package.Device(make_config(name="t0", uri=uri, queues=2)) as device, device.driver() as driver:
        assert driver.capacity_bytes == 1 << 20


@pytest.mark.parametrize("uri", ["file:/a\0b", "nbd://localhost/\0", "python:a\0.py:Disk", "rbd:a/b\0"])
def test_zero_byte_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"zero byte|does not name an image"):
        make_config(name="vd0", uri=uri)


# -- bytes that are no UTF-8, percent-encoded, in URIs that have that


def test_server_behind_a_socket_that_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / NO_UTF8
    directory.mkdir()
    monkeypatch.chdir(directory)
    with nbdkit(Path("s"), "memory", "1M"):
        uri = absolute_uri("nbd+unix:///?socket=s")
        assert uri == f"nbd+unix:///?socket={tmp_path}/b%E9%FF.img/s"
        assert absolute_uri(uri) == uri
        with package.Device(make_config(name="t0", uri=uri)) as device:
            assert device.info()["size_bytes"] == 1 << 20


def test_secret_and_configuration_files_that_are_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / NO_UTF8
    directory.mkdir()
    monkeypatch.chdir(directory)
    for uri, path in (("python:/d.py:Disk?key@=", "s"), ("rbd:a/b?conf=", "ceph.conf")):
        assert absolute_uri(f"{uri}{path}") == f"{uri}{tmp_path}/b%E9%FF.img/{path}"


# -- messages


def test_message_and_log_line_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    error = BackendError(f"file:{STRANGE}: no such file{NO_UTF8}")
    assert str(error).isprintable()
    assert str(errors.from_exit_code(str(error), 1)) == str(error)
    logs.make_safe()
    with caplog.at_level(logging.WARNING, "vdusefast"):
        logging.getLogger("vdusefast").warning("device %s: %s", STRANGE, NO_UTF8)
    assert caplog.messages[-1].isprintable()


def test_tables_are_not_broken_by_what_is_in_them() -> None:
    info = {"name": "vd0", "state": "dead", "backend": STRANGE, "failure": f"x {STRANGE}", "node": ""}
    assert len(render.list_text([info]).splitlines()) == 2
    assert all(line.isprintable() for line in render.show_text(info).splitlines())


@pytest.mark.parametrize("path", ["/opt/a\nb/python", "/opt/a;b/python", "/opt/50%/python", f"/opt/{NO_UTF8}/python"])
def test_unit_does_not_take_a_path_that_would_mean_something_else(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(VdusefastError) as caught:
        unit.installed_command()
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_benchmark_says_it_in_one_line(tmp_path: Path) -> None:
    image(tmp_path / NO_UTF8)
    words = [sys.executable, "-m", "vdusefast.bench", "fio", "--name=x", "--size=1M", "--rw=read"]
    words.append(f"--backend=file:{tmp_path / NO_UTF8}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert is_one_line(done.stderr), done.stderr
    assert "not UTF-8" in done.stderr
