"""Each wait is longer than the operation it waits for may take: the limits of one operation nest."""

from __future__ import annotations

import re
from importlib import resources

from vdusefast.base import time_limits
from vdusefast.server import launch
from vdusefast.server.systemd import transient_unit

ATTACH_S = 7.0
STOP_S = time_limits.STOP_TIMEOUT_S


def unit_limit_s(name: str) -> float:
    """Return a limit of vdusefast@.service, which the service of `add` has too."""
    text = resources.files("vdusefast.server.systemd").joinpath("vdusefast@.service").read_text(encoding="utf-8")
    found = re.search(rf"^{name}=(\d+)$", text, re.MULTILINE)
    assert found is not None
    assert f"{name}={found[1]}" in transient_unit.PROPERTIES
    return float(found[1])


def test_client_waits_longer_than_its_server() -> None:
    for server_s in (time_limits.stop_s(STOP_S), time_limits.resize_s(), time_limits.take_over_s(ATTACH_S)):
        assert time_limits.client_s(server_s) > server_s


def test_parts_of_a_stop_and_of_a_start_fit_into_it() -> None:
    assert time_limits.stop_s(STOP_S) > STOP_S + time_limits.LETTING_GO_S
    assert time_limits.stop_s(STOP_S) > time_limits.hand_over_s(STOP_S)
    assert time_limits.start_s(ATTACH_S) > time_limits.PROBE_LIMIT_S + time_limits.START_TIMEOUT_S + ATTACH_S
    assert time_limits.resize_s() > time_limits.PROBE_LIMIT_S


def test_replacing_a_server_has_time_for_each_of_its_steps() -> None:
    steps_s = time_limits.prove_s() + time_limits.hand_over_s(STOP_S) + time_limits.start_s(ATTACH_S)
    assert time_limits.take_over_s(ATTACH_S) > steps_s
    assert time_limits.TAKEN_BACK_TIMEOUT_S >= time_limits.TAKE_BACK_LIMIT_S


def test_start_that_is_undone_is_not_killed_before() -> None:
    assert time_limits.stop_s(STOP_S) <= launch.END_TIMEOUT_S


def test_service_manager_waits_longer_than_a_stop() -> None:
    assert time_limits.stop_s(STOP_S) + time_limits.EXTEND_EVERY_S < time_limits.EXTEND_S
    assert unit_limit_s("TimeoutStopSec") > time_limits.stop_s(STOP_S)
    assert unit_limit_s("TimeoutStartSec") > time_limits.START_TIMEOUT_S + time_limits.PROBE_LIMIT_S
    assert unit_limit_s("WatchdogSec") > 2 * unit_limit_s("TimeoutAbortSec")
