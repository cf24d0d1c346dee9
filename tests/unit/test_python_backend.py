"""`python:` URIs, and what is said of a class that cannot be served. Each line names the URI and what to do."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vdusefast
from vdusefast.backends import absolute_uri, probe, python
from vdusefast.backends.plugin import Description, StoreSpec
from vdusefast.errors import BackendError, ConfigError, VdusefastError

GOOD = """
    import vdusefast

    class Disk(vdusefast.Backend):
        size_bytes = 1 << 20

        def __init__(self, colour="red"):
            self.colour = colour

        def pread(self, buffer, offset_bytes):
            buffer[:] = bytes(len(buffer))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a file with a class and returns its URI."""

    def write(text: str = GOOD, *, changed: str = "", query: str = "", name: str = "disk.py") -> str:
        body = textwrap.dedent(text) + textwrap.indent(textwrap.dedent(changed), "    ")
        (tmp_path / name).write_text(body)
        return f"python:{tmp_path / name}:Disk{query}"

    return write


def look(uri: str, limit_s: float = 20) -> Description:
    return probe.describe(StoreSpec(uri), limit_s)


def refused(uri: str, *words: str, limit_s: float = 20, kind: type[Exception] = BackendError) -> str:
    """Expect one line that names the URI and has all these words."""
    with pytest.raises(kind) as caught:
        look(uri, limit_s)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(uri)
    for word in words:
        assert word in text, text
    return text


def test_class_is_described_by_what_it_overrides(disk: Callable[..., str]) -> None:
    assert look(disk()) == Description(1 << 20, 512, 512, read_only=True) or look(disk()).read_only
    whole = """
        block_size_bytes = 4096

        def pwrite(self, buffer, offset_bytes): ...
        def discard(self, offset_bytes, length_bytes): ...
        def write_zeroes(self, offset_bytes, length_bytes, unmap): ...
    """
    found = look(disk(changed=whole))
    assert found.block_size_bytes == 4096
    assert (found.read_only, found.can_discard, found.can_write_zeroes, found.zeroes_cheaply) == (
        False,
        True,
        True,
        True,
    )
    found = look(disk(changed="def pwrite(self, buffer, offset_bytes): ..."))
    assert (found.can_discard, found.can_write_zeroes, found.zeroes_cheaply) == (False, True, False)


def test_class_with_submit_says_itself_what_it_can(disk: Callable[..., str]) -> None:
    found = look(disk(changed="can_discard = True\ndef submit(self, batch): ..."))
    assert (found.read_only, found.can_discard, found.zeroes_cheaply) == (False, True, False)
    assert look(disk(changed="read_only = True\ndef submit(self, batch): ...")).read_only


def test_sizes_may_be_known_only_after_open_which_may_be_a_coroutine(disk: Callable[..., str]) -> None:
    assert look(disk(changed="async def open(self): self.size_bytes = 4096")).size_bytes == 4096


def test_words_of_the_uri_reach_the_constructor_decoded(disk: Callable[..., str]) -> None:
    raising = "def open(self): raise ValueError(self.colour)"
    assert "sea green" in refused(disk(changed=raising, query="?colour=sea%20green"), "open() raised ValueError")


def test_class_finds_what_lies_beside_it_and_its_module_by_name(
    disk: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text("SIZE = 8192")
    assert look(disk(changed="from beside import SIZE as size_bytes")).size_bytes == 8192
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert look("python:disk:Disk").size_bytes == 8192


def test_what_a_class_prints_disturbs_nobody(disk: Callable[..., str]) -> None:
    assert (
        look(disk(changed="print('x' * 100000); import sys; print('y' * 100000, file=sys.stderr)")).size_bytes
        == 1 << 20
    )


def test_paths_become_absolute_and_modules_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("python:disk.py:Disk?a=./b") == f"python:{tmp_path}/disk.py:Disk?a=./b"
    assert absolute_uri("python:sub/disk.py:Disk") == f"python:{tmp_path}/sub/disk.py:Disk"
    assert absolute_uri("python:my.module:Disk?x=1") == "python:my.module:Disk?x=1"


@pytest.mark.parametrize("uri", ["python:disk.py", "python:disk.py:", "python::Disk", "python:disk.py:No-Class"])
def test_uri_without_a_class_is_refused(uri: str) -> None:
    refused(uri, "names no class", "PATH_OR_MODULE:Class", kind=ConfigError)


@pytest.mark.parametrize("query", ["?size", "?1=2", "?a=1&a=2", "?=x"])
def test_words_that_are_no_key_and_value_are_refused(disk: Callable[..., str], query: str) -> None:
    refused(disk(query=query), "write", kind=ConfigError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_this_name", ["cannot be imported", "ModuleNotFoundError", "disk.py:1", "install"]),
        ("x = 1\nx = 1 / 0", ["cannot be imported", "ZeroDivisionError", "disk.py:2"]),
        ("def broken(:", ["cannot be imported", "SyntaxError", "disk.py:1"]),
        ("import sys; sys.exit(3)", ["cannot be imported", "SystemExit"]),
        ("Other = 1", ["has no class Disk", "none that is derived"]),
        ("class Disk: pass", ["is no Backend", "class Disk(vdusefast.Backend)"]),
        ("Disk = 3", ["is no Backend"]),
        ("import vdusefast\nclass Disk(vdusefast.Backend): size_bytes = 512", ["neither pread nor submit"]),
        ("import vdusefast\nclass Dosk(vdusefast.Backend): pass", ["has no class Disk", "it has Dosk"]),
        ("import os; os.abort()", ["SIGABRT|signal 6"]),
        ("import os; os._exit(0)", ["has ended with status 0"]),
    ],
)
def test_file_that_has_no_such_class(disk: Callable[..., str], text: str, words: list[str]) -> None:
    said = refused(disk(text))
    for word in words:
        assert any(one in said for one in word.split("|")), said


def test_file_and_module_that_are_not_there(tmp_path: Path) -> None:
    refused(f"python:{tmp_path}/none.py:Disk", "there is no file", "write its path")
    refused(f"python:{tmp_path}:Disk", "there is no file")
    refused("python:no_such_module_anywhere:Disk", "there is no module no_such_module_anywhere", "PYTHONPATH")
    refused("python:vdusefast.no_such:Disk", "no module", "vdusefast.no_such")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "query", "words"),
    [
        ("", "?size=1G", ["Disk() raised TypeError", "size"]),
        ("def __init__(self): raise OSError(13, 'no entry')", "", ["Disk() raised", "no entry", "disk.py:"]),
        ("def open(self): raise RuntimeError('not today')", "", ["open() raised RuntimeError: not today", "disk.py:"]),
        ("async def open(self): raise RuntimeError('later')", "", ["open() raised RuntimeError: later"]),
        ("def open(self): raise SystemExit(0)", "", ["open() raised SystemExit"]),
        ("size_bytes = -512", "", ["size_bytes is -512", "whole number"]),
        ("size_bytes = 1000", "", ["size_bytes is 1000", "multiple of block_size_bytes (512)"]),
        ("size_bytes = 0", "", ["size_bytes is 0; set it in the class"]),
        ("size_bytes = '1G'", "", ["size_bytes is '1G'", "whole number"]),
        ("size_bytes = 1e9", "", ["size_bytes is 1000000000.0"]),
        ("size_bytes = 1 << 70", "", ["size_bytes is"]),
        ("size_bytes = True", "", ["size_bytes is True"]),
        ("size_bytes = None", "", ["size_bytes is None"]),
        ("size_bytes = property(lambda self: 1 / 0)", "", ["size_bytes raised ZeroDivisionError"]),
        ("block_size_bytes = 768", "", ["block_size_bytes is 768", "power of two"]),
        ("block_size_bytes = 8192", "", ["block_size_bytes is 8192", "512 to 4096"]),
        ("block_size_bytes = 0", "", ["block_size_bytes is 0"]),
        (
            "def pread(self, offset): pass",
            "",
            ["pread cannot be called", "write def pread(self, buffer, offset_bytes)"],
        ),
        ("def pread(self, buffer, at, flags): pass", "", ["missing a required argument: 'flags'"]),
        ("def flush(self, all): pass", "", ["flush cannot be called with 0 arguments", "write def flush(self)"]),
        ("def pread(self, buffer, at): yield", "", ["pread is a generator"]),
    ],
)
def test_class_that_lies_or_raises(disk: Callable[..., str], changed: str, query: str, words: list[str]) -> None:
    refused(disk(changed=changed, query=query), *words)


def test_class_that_hangs_is_given_up_after_the_limit(disk: Callable[..., str]) -> None:
    started_s = time.monotonic()
    refused(disk(changed="def open(self):\n    import time; time.sleep(60)"), "no answer to the probe", limit_s=1)
    assert time.monotonic() - started_s < 10


def test_device_of_a_bad_class_leaves_nothing_behind(disk: Callable[..., str]) -> None:
    config = vdusefast.make_config(name="bad", uri=disk("import nothing_of_this_name"))
    with pytest.raises(BackendError, match="cannot be imported"):
        vdusefast.Device(config).start()


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        ("self.size_bytes = 4096 if __import__('sys').flags.no_site else 8192", "every process must find the same"),
        ("__import__('sys').flags.no_site and 1 / 0", "open() raised ZeroDivisionError"),
    ],
)
def test_class_that_is_another_one_in_its_worker(disk: Callable[..., str], opening: str, words: str) -> None:
    """A worker is started without site-packages, which tells it from the process that looks at the class first."""
    uri = disk(changed=f"def open(self): {opening}")
    with pytest.raises(VdusefastError) as caught:
        vdusefast.Device(vdusefast.make_config(name="liar", uri=uri)).start()
    assert uri in str(caught.value)
    assert words in str(caught.value)


def test_engine_and_cache_that_are_for_files_are_refused(disk: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="has its own engine"):
        vdusefast.open_store(vdusefast.BackendConfig(uri=disk(), engine="sync"))
    with pytest.raises(ConfigError, match="O_DIRECT"):
        vdusefast.open_store(vdusefast.BackendConfig(uri=disk(), cache="none"))


def test_backend_is_usable_here() -> None:
    assert python.usability().ok
