"""The job of `bench raw`: what is read, the error line for what is not, and where its clones work."""

from __future__ import annotations

import itertools

import pytest

from vdusefast.bench.common import device_options
from vdusefast.bench.common.device_options import AUTO_QUEUES
from vdusefast.bench.raw.help import option_help
from vdusefast.bench.raw.jobs import JOB_HELP, JOB_OPTIONS, REPORT_HELP, REPORT_OPTIONS, JobSpec, parse_arguments
from vdusefast.bench.raw.plan import place_job, plan_threads, required_bytes
from vdusefast.errors import ConfigError

MIB = 1 << 20


def one(*arguments: str) -> JobSpec:
    return parse_arguments(arguments).job


@pytest.mark.parametrize("equals", [True, False])
def test_options_with_equals_and_with_space(equals: bool) -> None:
    pairs = {"--name": "a", "--rw": "randrw", "--bs": "8k", "--size": "1g", "--iodepth": "7", "--runtime": "500ms"}
    arguments = [f"{k}={v}" for k, v in pairs.items()] if equals else [w for pair in pairs.items() for w in pair]
    job = one(*arguments, "--time_based", "--rwmixread=70")
    assert (job.name, job.kind, job.order, job.bs, job.size) == ("a", "mixed", "random_once", 8192, 1 << 30)
    assert (job.iodepth, job.runtime, job.time_based, job.rwmixread) == (7, 0.5, True, 70)


def test_options_of_device_and_report() -> None:
    plan = parse_arguments(["--rw=read", "--queues=auto", "--driver-cpus=0,1", "--output-format", "json", "--output=x"])
    assert (plan.device.queues, plan.device.driver_cpus) == (AUTO_QUEUES, "0,1")
    assert (plan.output_format, plan.output, plan.job.options) == ("json", "x", {"rw": "read"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rww=read"], "command line: unknown option '--rww'"),
        (["--filename=x"], "command line: unknown option '--filename'"),
        (["job.fio"], "command line: unknown option 'job.fio'"),
        (["-x"], "command line: unknown option '-x'"),
        (["--bs"], "command line: option '--bs' needs a value"),
        (["--rw=sideways"], "command line: rw: 'sideways' is not one of"),
        (["--bs=1000"], "command line: bs: '1000' is not a multiple of 512"),
        (["--iodepth=0"], "command line: iodepth: '0' is not a whole number from 1"),
        (["--runtime=soon"], "command line: runtime: 'soon' is not a time"),
        (["--name=a", "--time_based"], "job a: time_based needs runtime"),
        (["--name=a", "--rw=trim", "--verify=crc32c"], "job a: rw=trim leaves nothing to verify"),
        (["--name=a", "--size=512"], "job a: size 512 is smaller than one block"),
        (["--name=a", "--offset=5"], "job a: offset 5 is no multiple of 512"),
    ],
)
def test_one_line_says_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as raised:
        parse_arguments(arguments)
    assert str(raised.value).startswith(message)
    assert raised.value.exit_code == 2


def test_help_explains_every_option_and_no_other() -> None:
    assert set(JOB_HELP) == set(JOB_OPTIONS)
    assert set(REPORT_HELP) == set(REPORT_OPTIONS)
    assert set(device_options.HELP) == set(device_options.PARSERS)
    names = [*JOB_OPTIONS, *REPORT_OPTIONS, *device_options.PARSERS]
    assert all(f"--{name.replace('_', '-')} " in option_help() for name in names)


# -- placing


def test_clones_that_verify_get_disjoint_slices() -> None:
    job = one("--rw=randwrite", "--size=1m", "--offset=1m", "--numjobs=3", "--verify=crc32c")
    clones = place_job(job, 4 * MIB, 512)
    windows = sorted((i.offset, i.last) for i in clones)
    assert len(clones) == 3
    assert windows[0][0] == MIB
    assert windows[-1][1] < 2 * MIB
    assert all(a[1] < b[0] for a, b in itertools.pairwise(windows))
    assert len({i.seed for i in clones}) == 3


def test_clones_that_do_not_verify_share_the_window() -> None:
    clones = place_job(one("--rw=randread", "--numjobs=2"), 4 * MIB, 512)
    assert [(i.offset, i.size) for i in clones] == [(0, 4 * MIB)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--size=8m", "the device has"), ("--bs=512", "multiples of the device's block"), ("--offset=4m", "offset")],
)
def test_jobs_that_do_not_fit(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_job(one("--rw=read", arguments), 4 * MIB, 4096)


@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("queues", [1, 2, 3, 4])
def test_every_queue_and_every_job_has_one_thread(jobs: int, queues: int) -> None:
    plans = plan_threads(jobs, queues)
    assert sorted(q for plan in plans for q in plan.queues) == list(range(queues))
    assert sorted(j for plan in plans for j in plan.jobs) == list(range(jobs))


def test_required_size() -> None:
    assert required_bytes(one("--size=1m", "--offset=2m")) == 3 * MIB
    assert required_bytes(one("--offset=2m")) == 0
