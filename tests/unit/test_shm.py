"""The shared pages: the same layout as the C headers, and what is refused. The run directory: one device a name."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vdusefast.base.page import PAGE_BYTES
from vdusefast.errors import DeviceBusyError, VdusefastError
from vdusefast.host import run_dirs
from vdusefast.state import histogram, shared_pages
from vdusefast.state.run_dir import RunDirectory
from vdusefast.state.shared_pages import SharedPages
from vdusefast.worker import _datapath

CSRC = Path(__file__).parents[2] / "csrc"

STRUCTS = {
    "vf_shm_header": shared_pages.header_dtype,
    "vf_shm_status": shared_pages.status_dtype,
    "vf_counters": shared_pages.counters_dtype,
    "vf_inflight_header": shared_pages.inflight_header_dtype,
}
CONSTANTS = {
    "VF_SHM_VERSION": shared_pages.VERSION,
    "VF_HIST_SUB_BITS": shared_pages.HIST_SUB_BITS,
    "VF_HIST_MAX_BITS": shared_pages.HIST_MAX_BITS,
    "VF_HIST_BUCKET_COUNT": shared_pages.HIST_BUCKET_COUNT,
    "VF_OP_COUNT": len(shared_pages.OPS),
    "VF_LOG_VERSION": shared_pages.INFLIGHT_VERSION,
    **{f"VF_OP_{op.upper()}": index for index, op in enumerate(shared_pages.OPS)},
    **{f"VF_QUEUE_{state.name}": int(state) for state in shared_pages.QueueState},
}
SIZES = {
    "vf_shm_ctl": shared_pages.LINE_BYTES,
    "vf_shm_status": shared_pages.LINE_BYTES,
    "vf_op_counters": 8 * len(shared_pages.OP_FIELDS),
    "vf_counters": shared_pages.COUNTERS_BYTES,
    "vf_hist": shared_pages.HIST_BYTES,
    "vf_inflight_header": shared_pages.INFLIGHT_HEADER_BYTES,
    "vf_inflight_entry": shared_pages.INFLIGHT_ENTRY_BYTES,
}


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what the C compiler says about the headers: lines "what value" and "bucket ns index"."""
    directory = tmp_path_factory.mktemp("layout")
    lines = [f'printf("{name} %lld\\n", (long long)({name}));' for name in CONSTANTS]
    lines += [f'printf("sizeof {name} %zu\\n", sizeof(struct {name}));' for name in SIZES]
    for name, dtype in STRUCTS.items():
        for field in dtype().names or ():
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof(struct {name}, {field}), '
                f"sizeof(((struct {name} *)0)->{field}));"
            )
    lines.append('printf("magic %s\\n", VF_SHM_MAGIC);')
    lines.append("for (uint64_t i = 0; i < 64; i++) for (int64_t d = -1; d <= 1; d++) {")
    lines.append("uint64_t ns = (1ull << i) + (uint64_t)d;")
    lines.append('printf("bucket %llu %u\\n", (unsigned long long)ns, vf_hist_bucket(ns)); }')
    body = "\n".join(lines)
    source = directory / "layout.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "base/counters.h"\n#include "ring/inflight.h"\n'
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    program = directory / "layout"
    subprocess.run(["cc", "-std=gnu11", f"-I{CSRC}", "-o", program, source], check=True, timeout=30)
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=10).stdout


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_is_the_headers(name: str, c_program: str) -> None:
    assert f"{name} {CONSTANTS[name]}" in c_program.splitlines()


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_headers(name: str, c_program: str) -> None:
    assert f"sizeof {name} {SIZES[name]}" in c_program.splitlines()


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_are_where_the_headers_put_them(name: str, c_program: str) -> None:
    dtype = STRUCTS[name]()
    assert dtype.fields
    expected = [f"{name}.{field} {place[1]} {place[0].itemsize}" for field, place in dtype.fields.items()]
    assert [line for line in c_program.splitlines() if line.startswith(f"{name}.")] == expected


@pytest.mark.parametrize("name", ["vf_shm_header", "vf_shm_status", "vf_counters", "vf_op_counters"])
def test_no_field_of_the_headers_is_missing(name: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", (CSRC / "base" / "counters.h").read_text(), flags=re.DOTALL)
    body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
    assert body
    fields = re.findall(r"(\w+)(?:\[\w+\])?;", body[1])
    dtype = shared_pages.counters_dtype()["op"].base if name == "vf_op_counters" else STRUCTS[name]()
    assert list(dtype.names or ()) == fields


def test_magic_is_the_headers(c_program: str) -> None:
    assert f"magic {shared_pages.MAGIC.decode()}" in c_program.splitlines()


def test_every_value_falls_into_the_bucket_whose_bounds_hold_it(c_program: str) -> None:
    first, last = histogram.bucket_bounds_ns()
    seen = re.findall(r"bucket (\d+) (\d+)", c_program)
    assert len(seen) == 192
    for ns, bucket in ((int(a), int(b)) for a, b in seen):
        if ns < 1 << shared_pages.HIST_MAX_BITS:
            assert first[bucket] <= ns <= last[bucket]
        else:
            assert bucket == shared_pages.HIST_BUCKET_COUNT - 1


def test_buckets_follow_each_other_without_a_gap() -> None:
    first, last = histogram.bucket_bounds_ns()
    assert first[0] == 0
    assert (first[1:] == last[:-1] + 1).all()
    assert last[-1] == (1 << shared_pages.HIST_MAX_BITS) - 1


def test_workers_compute_the_same_offsets() -> None:
    layout = _datapath.layout()
    assert layout["offsets"] == {
        "header": shared_pages.HEADER_BYTES,
        "counters": shared_pages.COUNTERS_OFFSET,
        "hist": shared_pages.HIST_OFFSET,
        "inflight": shared_pages.INFLIGHT_OFFSET,
        "stride": shared_pages.QUEUE_STRIDE_BYTES,
    }
    for size in (1, 2, 256, 1000, 32768):
        assert _datapath.block_used_bytes(size) == shared_pages.block_used_bytes(size)
    assert layout["sizes"].items() <= SIZES.items()
    for name, value in layout["constants"].items():
        prefix = "VF_" if name.startswith(("hist", "op")) else "VF_SHM_"
        assert CONSTANTS[prefix + name.upper()] == value


def test_blocks_are_apart_and_aligned() -> None:
    stride = shared_pages.QUEUE_STRIDE_BYTES
    assert stride % PAGE_BYTES == shared_pages.HEADER_BYTES % PAGE_BYTES == 0
    assert (
        stride
        >= shared_pages.INFLIGHT_OFFSET
        + shared_pages.INFLIGHT_HEADER_BYTES
        + shared_pages.INFLIGHT_ENTRY_BYTES * shared_pages.RING_SIZE_MAX
    )
    assert shared_pages.queue_offset(3) == shared_pages.HEADER_BYTES + 3 * stride
    assert shared_pages.pages_bytes(2) == shared_pages.queue_offset(2)
    assert {shared_pages.HIST_OFFSET % 64, shared_pages.INFLIGHT_OFFSET % 64, shared_pages.COUNTERS_OFFSET % 64} == {0}


def test_percentile_is_the_middle_of_its_bucket() -> None:
    hist = np.zeros(shared_pages.HIST_BUCKET_COUNT, np.uint64)
    assert histogram.percentile_ns(hist, [0.5, 0.99]).tolist() == [0, 0]
    hist[10], hist[20], hist[64] = 50, 49, 1  # 10 ns, 20 ns, 64 to 65 ns
    assert histogram.percentile_ns(hist, [0, 0.5, 0.51, 0.99, 0.995, 1]).tolist() == [10, 10, 20, 20, 64.5, 64.5]
    assert histogram.percentile_ns(hist, 0.5) == 10


def test_counters_status_and_histograms_are_read(tmp_path: Path) -> None:
    with SharedPages.create(tmp_path / "pages", "vd0", 2, 8) as pages:
        base = shared_pages.queue_offset(1)
        struct.pack_into("=IIiIIIII", pages.map, base + shared_pages.STATUS_OFFSET, 1, 4711, -1, 3, 10, 9, 1, 2)
        struct.pack_into("=Q", pages.map, base + shared_pages.COUNTERS_OFFSET, 12)
        struct.pack_into(
            "=QQQ", pages.map, base + shared_pages.COUNTERS_OFFSET + 8 * (len(shared_pages.COUNTERS) + 3), 5, 6, 7
        )
        struct.pack_into(
            "=Q", pages.map, base + shared_pages.HIST_OFFSET + 8 * (shared_pages.HIST_BUCKET_COUNT + 2), 99
        )
        assert pages.status(1) == shared_pages.StatusView(1, 4711, -1, 3, 10, 9, 1, 2)
        counters = pages.counters(1)
        assert counters["requests"] == 12
        assert counters["op"][shared_pages.OPS.index("write")].tolist() == (5, 6, 7)
        assert pages.hist(1, "write")[2] == pages.hist(1, 1)[2] == 99
        assert pages.counters(0)["requests"] == 0
        assert pages.hist(0, "write").sum() == 0
        struct.pack_into("=Q", pages.map, base + shared_pages.COUNTERS_OFFSET, 13)
        assert counters["requests"] == 12  # a copy
        with pytest.raises(IndexError, match="queue 2 of 2"):
            pages.status(2)
        with pytest.raises(IndexError):
            pages.hist(0, len(shared_pages.OPS))


def test_ring_ctl_adds_one_to_its_queues_word_alone() -> None:
    with SharedPages.create(None, "vd0", 2, 8) as pages:
        for _ in range(3):
            pages.ring_ctl(1)
        assert struct.unpack_from("=I", pages.map, shared_pages.queue_offset(1) + shared_pages.CTL_SEQ) == (3,)
        assert struct.unpack_from("=I", pages.map, shared_pages.queue_offset(0) + shared_pages.CTL_SEQ) == (0,)
        struct.pack_into("=I", pages.map, shared_pages.queue_offset(0), 0xFFFFFFFF)
        pages.ring_ctl(0)
        assert struct.unpack_from("=I", pages.map, shared_pages.queue_offset(0)) == (0,)


def test_pages_are_private_replace_old_ones_and_open_again(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_text("old")
    with SharedPages.create(path, "vd0", 3, 16) as pages:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_size == shared_pages.pages_bytes(3)
        pages.ring_ctl(2)
        with SharedPages.open(path) as again:
            assert (again.name, again.queue_count, again.queue_size) == ("vd0", 3, 16)
            assert again.created_ns == np.frombuffer(pages.map, shared_pages.header_dtype(), 1)["created_ns"][0]
            with pytest.raises(TypeError):
                again.ring_ctl(0)
        with SharedPages.open(path, writable=True) as again:
            again.ring_ctl(2)
            assert struct.unpack_from("=I", pages.map, shared_pages.queue_offset(2)) == (2,)
        pages.close()
        pages.close()


@pytest.mark.parametrize(
    ("offset", "data", "problem"),
    [
        (0, b"X", "wrong magic"),
        (8, b"\x02", "layout version 2, expected 3"),
        (12, b"\x00\x20", "another geometry"),
        (16, b"\x03", "another geometry|bytes, expected"),
        (16, b"\x00", "0 queues"),
        (20, b"\x11", "queues of 17 entries"),
        (24, b"\x01", "another geometry"),
        (28, b"\x01", "another geometry"),
        (40, b"\x01", "another geometry"),
    ],
)
def test_pages_of_another_layout_are_refused(tmp_path: Path, offset: int, data: bytes, problem: str) -> None:
    path = tmp_path / "pages"
    SharedPages.create(path, "vd0", 2, 16).close()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(VdusefastError, match=problem):
        SharedPages.open(path)


@pytest.mark.parametrize("size", [0, 100, 4096, shared_pages.pages_bytes(1) - 1, shared_pages.pages_bytes(1) + 1])
def test_pages_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "pages"
    SharedPages.create(path, "vd0", 1, 16).close()
    os.truncate(path, size)
    with pytest.raises(VdusefastError, match="not shared pages of this version"):
        SharedPages.open(path)


def test_pages_that_cannot_be_made_or_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(VdusefastError, match=r"vd0: cannot make .*absent/pages: No such file"):
        SharedPages.create(tmp_path / "absent/pages", "vd0", 1, 16)
    with pytest.raises(VdusefastError, match="pages: cannot open the shared pages: No such file"):
        SharedPages.open(tmp_path / "pages")
    with pytest.raises(VdusefastError, match="a name is at most 63 bytes"):
        SharedPages.create(None, "n" * 64, 1, 16)


def test_making_pages_does_not_import_numpy() -> None:
    code = (
        "import sys; from vdusefast.state.shared_pages import SharedPages\n"
        "with SharedPages.create(None, 'a', 1, 16) as p: p.ring_ctl(0); p.status(0)\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_run_directory_is_private_and_removed(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path) as run:
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
        run.pages_path.write_text("x")
        assert run.path == tmp_path / "vd0"
    assert os.listdir(tmp_path) == []
    run.close()


def test_second_device_of_a_name_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path) as run:
        with pytest.raises(DeviceBusyError, match="vd0: a device of this name is being served already") as caught:
            RunDirectory("vd0", tmp_path)
        assert caught.value.exit_code == 4
        assert run.lock_path.exists()
        RunDirectory("vd1", tmp_path).close()
    RunDirectory("vd0", tmp_path).close()


def test_directory_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vdusefast.state.run_dir import RunDirectory\n"
        "RunDirectory('vd0', Path(sys.argv[1])).pages_path.touch()\n"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False, timeout=20).returncode == 9
    assert (tmp_path / "vd0/pages").exists()
    RunDirectory("vd0", tmp_path).close()
    assert os.listdir(tmp_path) == []


def test_directory_of_others_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(VdusefastError, match="not a directory of this user with mode 0700"):
            RunDirectory(name, tmp_path)


def test_directory_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VdusefastError, match=r"cannot make the run directory .*; set VDUSEFAST_RUN_DIR"):
        RunDirectory("vd0", tmp_path / "file")


def test_base_directory_is_chosen_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path))
    assert run_dirs.base_directory() == tmp_path
    monkeypatch.delenv("VDUSEFAST_RUN_DIR")
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert run_dirs.base_directory() == Path("/run/vdusefast")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_dirs.base_directory() == tmp_path / "vdusefast"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert run_dirs.base_directory() is None


def test_relative_base_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", "rr")
    assert run_dirs.base_directory() == tmp_path / "rr"
    with RunDirectory("vd0"), RunDirectory("vd1", Path("other")):
        assert [(tmp_path / path).is_dir() for path in ("rr/vd0", "other/vd1")] == [True, True]
        os.chdir("/")
    assert [os.listdir(tmp_path / base) for base in ("rr", "other")] == [[], []]
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(VdusefastError, match="rr: the working directory is unknown"):
        run_dirs.base_directory()


def test_directory_that_was_moved_is_told_and_what_is_there_now_stays(tmp_path: Path) -> None:
    run = RunDirectory("vd0", tmp_path)
    run.path.rename(tmp_path / "moved")
    run.path.mkdir()
    (run.path / "lock").write_text("another's")
    with pytest.raises(VdusefastError, match="is not the run directory that was made there"):
        run.close()
    assert (run.path / "lock").read_text() == "another's"
    run.close()


def test_base_can_be_looked_at_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with RunDirectory("vd0", tmp_path / "base"):
            assert stat.S_IMODE((tmp_path / "base").stat().st_mode) == 0o755
    finally:
        os.umask(before)


def test_transport_is_noted_and_kept_by_whoever_cleans_up(tmp_path: Path) -> None:
    first = RunDirectory("vd0", tmp_path, "kernel")
    assert (run_dirs.holder_pid(first.path), run_dirs.holder_transport(first.path)) == (os.getpid(), "kernel")
    first.release()
    second = RunDirectory("vd0", tmp_path)
    assert second.transport == "kernel"
    second.release()
    assert run_dirs.holder_transport(first.path) == "kernel"
    with RunDirectory("vd0", tmp_path, "loopback") as third:
        assert run_dirs.holder_transport(third.path) == "loopback"
    assert run_dirs.holder_transport(third.path) == ""


def test_without_a_base_a_private_directory_is_made_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dirs, "base_directory", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RunDirectory("vd0") as run:
        assert run.path.parent.parent == tmp_path
    assert os.listdir(tmp_path) == []


def test_a_log_that_begins_is_one_queues_empty_and_notes_where_it_stands() -> None:
    size = shared_pages.INFLIGHT_HEADER_BYTES + 16 * shared_pages.INFLIGHT_ENTRY_BYTES
    with SharedPages.create(None, "a", 2, 16) as pages:
        for queue in (0, 1):
            at = shared_pages.queue_offset(queue) + shared_pages.INFLIGHT_OFFSET
            pages.map[at : at + size] = b"\xff" * size
        pages.begin_log(1, 0xFFFE)
        at = shared_pages.queue_offset(1) + shared_pages.INFLIGHT_OFFSET
        header = np.frombuffer(pages.map, shared_pages.inflight_header_dtype(), 1, at)[0].copy()
        assert (header["magic"], header["version"], header["entry_count"]) == (b"VDUSELOG", 2, 16)
        assert (header["last_avail_idx"], header["last_used_idx"], header["working"]) == (0xFFFE, 0xFFFE, 0)
        assert pages.map[at + shared_pages.INFLIGHT_HEADER_BYTES : at + size] == bytes(
            16 * shared_pages.INFLIGHT_ENTRY_BYTES
        )
        other = shared_pages.queue_offset(0) + shared_pages.INFLIGHT_OFFSET
        assert pages.map[other : other + size] == b"\xff" * size
        assert header["state"] == shared_pages.LogState.VALID
        pages.void_log(1)
        state = np.frombuffer(pages.map, shared_pages.inflight_header_dtype(), 1, at)[0]["state"]
        assert state == shared_pages.LogState.VOID


def test_a_log_of_a_packed_queue_says_so_and_where_both_sides_stand() -> None:
    with SharedPages.create(None, "a", 1, 16) as pages:
        pages.begin_log(0, 0x8003_0005, shared_pages.INFLIGHT_PACKED)
        header = np.frombuffer(
            pages.map,
            shared_pages.inflight_header_dtype(),
            1,
            shared_pages.queue_offset(0) + shared_pages.INFLIGHT_OFFSET,
        )[0].copy()
        assert header["ring_format"] == shared_pages.INFLIGHT_PACKED
        assert (header["last_avail_idx"], header["last_used_idx"]) == (0x0005, 0x8003)


def test_pages_are_taken_over_once_the_last_storage_io_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pages"
    SharedPages.create(path, "a", 1, 16).close()
    monkeypatch.setattr(shared_pages, "LAST_IO_S", 0.05)
    worker_fd = os.open(path, os.O_RDONLY)
    fcntl.flock(worker_fd, fcntl.LOCK_SH)
    with pytest.raises(DeviceBusyError, match="a: storage I/O of its last server's workers has not ended"):
        SharedPages.reopen(path, "a", 1, 16)
    monkeypatch.setattr(shared_pages, "LAST_IO_S", 10.0)
    threading.Timer(0.1, os.close, [worker_fd]).start()
    began = time.monotonic()
    with SharedPages.reopen(path, "a", 1, 16) as pages:
        assert 0.05 < time.monotonic() - began < 5
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the next workers can lock them
        assert pages.name == "a"
