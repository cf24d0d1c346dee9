"""fio's command line and job files as `bench fio` reads them, and as it writes them for fio."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from fio_rig import JOBS, know, script

from vdusefast.bench.fio.arguments import Argument, read_arguments
from vdusefast.bench.fio.options import FLAGS, NAMES, option_help, read_options
from vdusefast.bench.raw import help as raw_help
from vdusefast.errors import ConfigError


def read(*arguments: str) -> list[Argument]:
    return read_arguments(arguments, NAMES, FLAGS, know())


def names(*arguments: str) -> list[str]:
    return [job.name for job in script(*arguments).jobs()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rw=read"], [Argument("rw", "read")]),
        (["-rw=read"], [Argument("rw", "read")]),
        (["--size", "4k"], [Argument("size", "4k")]),
        (["-size", "4k", "x.fio"], [Argument("size", "4k"), Argument("", "x.fio")]),
        (["--thread", "x.fio"], [Argument("thread", None), Argument("", "x.fio")]),
        (["--minimal", "-"], [Argument("minimal", None), Argument("", "-")]),
        (["--", "--odd"], [Argument("", "--odd")]),
        (["--output-form=json"], [Argument("output-format", "json")]),
        (["--numjo", "2"], [Argument("numjobs", "2")]),
        (["--queue-size=64", "--explain"], [Argument("queue_size", "64"), Argument("explain", "1")]),
        (["--driver-cpus", "0"], [Argument("driver_cpus", "0")]),
    ],
)
def test_words_are_read_as_getopt_reads_them(arguments: list[str], expected: list[Argument]) -> None:
    assert read(*arguments) == expected


@pytest.mark.parametrize("argument", ["--queues", "--bs"])
def test_missing_value_is_named(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"'{argument}' needs a value"):
        read("--name=a", argument)


def test_options_before_a_name_apply_to_all_jobs() -> None:
    jobs = script("--bs=8k", "--name=a", "--rw=read", "--name=b", "--bs=512").jobs()
    assert [(job.name, job.get("bs"), job.get("rw")) for job in jobs] == [("a", "8k", "read"), ("b", "512", None)]
    assert names("--rw=read", "--size=4k") == ["job"]


def test_sections_names_and_globals_are_fios() -> None:
    assert names(str(JOBS / "k8s.fio")) == ["read_iops", "write_bw"]
    jobs = script(str(JOBS / "included.fio")).jobs()
    assert [(job.name, job.get("rw"), job.get("numjobs")) for job in jobs] == [
        ("random", "randread", "8"),
        ("sequential", "read", "4"),
    ]
    assert all(job.get("runtime") == "1s" for job in jobs)


def test_globals_of_one_file_do_not_reach_the_next(tmp_path: Path) -> None:
    one, other = tmp_path / "one.fio", tmp_path / "other.fio"
    one.write_text("[global]\nbs=8k\n[a]\nrw=read\n")
    other.write_text("[b]\nrw=write\n")
    jobs = script("--iodepth=3", str(one), str(other)).jobs()
    assert [(job.get("bs"), job.get("iodepth")) for job in jobs] == [("8k", "3"), (None, None)]


def test_variables_comments_and_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/dev/from-environment")
    monkeypatch.delenv("NOTHING", raising=False)
    path = tmp_path / "v.fio"
    path.write_text(
        "; one\n[a]  ; two\n  blocksize = 4k # three\nfilename=${WHERE}${NOTHING}\nnumjobs=$ncpus\nthread\n"
    )
    (job,) = script(str(path)).jobs()
    assert job.options == {"bs": "4k", "filename": "/dev/from-environment", "numjobs": "$ncpus", "thread": None}


def test_standard_input_is_a_job_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("[piped]\nrw=read\n"))
    read_in = script("-")
    assert [job.name for job in read_in.jobs()] == ["piped"]
    (path,) = read_in.arguments(tmp_path)
    assert Path(path).read_text() == "[piped]\nrw=read\n"


def test_only_wanted_sections_are_jobs() -> None:
    assert names("--section=sequential", str(JOBS / "included.fio")) == ["sequential"]


def test_options_of_our_own_are_taken_out_of_both(tmp_path: Path) -> None:
    path = tmp_path / "o.fio"
    path.write_text("[global]\nqueues=2\nexplain\nqueue-size=64\n[a]\nrw=read\n")
    read_in = script("--cache=none", str(path), "--queues=3")
    options = read_options(read_in)
    assert (options.device.queues, options.device.cache, options.device.queue_size) == (3, "none", 64)
    assert options.explain
    (written,) = read_in.arguments(tmp_path)
    assert Path(written).read_text() == "[global]\n[a]\nrw=read\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nqueues=2\n", "2: option 'queues' describes the whole run; put it into \\[global\\]"),
        ("rw=read\n", "1: option 'rw=read' before the first section"),
        ("[global]\ncache\n", "2: option 'cache' needs a value"),
        ("[global]\ncache=hot\n", "2: cache: 'hot' is not one of"),
        ("[global]\ninclude missing.inc\n", "missing.inc: cannot read the job file"),
    ],
)
def test_errors_in_a_job_file_name_it_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.fio"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_options(script(str(path)))


def test_file_that_includes_itself_ends_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "loop.fio"
    path.write_text("[a]\ninclude loop.inc\n")
    (tmp_path / "loop.inc").write_text("include loop.inc\n")
    with pytest.raises(ConfigError, match="include itself"):
        script(str(path))


@pytest.mark.slow
def test_files_that_are_not_touched_mean_the_same_to_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--debug=parse` has what every option came to; the file names in it differ."""
    monkeypatch.setenv("BS", "4k")
    for place, job in enumerate(sorted(JOBS.glob("*.fio"))):
        (tmp_path / str(place)).mkdir()
        arguments = script(str(job)).arguments(tmp_path / str(place))
        assert _parsed([str(job)]) == _parsed(arguments), job.name


def _parsed(arguments: list[str]) -> list[str]:
    command = ["fio", "--parse-only", "--debug=parse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    lines = [line.split(maxsplit=2)[-1] for line in done.stdout.splitlines()]
    return [line for line in lines if line.startswith(("handle_option", "ret=", "Parsing section"))]


def test_help_names_every_option_of_our_own() -> None:
    text = option_help()
    assert all(f"--{name.replace('_', '-')} " in text for name in NAMES)


@pytest.mark.parametrize("text", [option_help(), raw_help.option_help()])
def test_help_breaks_no_word_on_a_terminal_of_80_columns(text: str) -> None:
    assert max(len(line) for line in text.splitlines()) <= 80
