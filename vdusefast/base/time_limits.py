"""Time limits of a server's operations, in seconds. A client derives its own limit from these.

If a client gave up before the server, it would report a failure of an operation that then succeeds.
"""

from __future__ import annotations

START_TIMEOUT_S = 30.0  # for the workers to be ready: milliseconds, but a busy machine may take its time
STOP_TIMEOUT_S = 30.0  # for requests in flight to end, unless a caller names another limit
LETTING_GO_S = 10.0  # for the driver's side to release the device once none of its requests is pending
RESIZE_TIMEOUT_S = 40.0  # the workers' own limit, plus the time of a busy machine
PROBE_LIMIT_S = 30  # for a plugin's store to be described
MARGIN_S = 30.0  # beyond what the supervisor bounds by itself: killing, reaping and closing
ANSWER_MARGIN_S = 15.0  # for a client, beyond the server's limit
EXTEND_S = 90.0  # that a service manager grants each time it is asked: for a stop, or for the start of the workers
EXTEND_EVERY_S = 10.0  # how often it is asked
TAKE_BACK_LIMIT_S = 60.0  # for an old server to get its device back when the new one has failed
TAKEN_BACK_TIMEOUT_S = 60.0  # for a command to see that it has


def stop_s(timeout_s: float) -> float:
    """Return the longest that a device takes to stop that gives its requests `timeout_s`."""
    return timeout_s + LETTING_GO_S + MARGIN_S


def hand_over_s(timeout_s: float) -> float:
    """Return the longest that a hand-over takes."""
    return timeout_s + MARGIN_S


def resize_s() -> float:
    """Return the longest that a resize takes: the store is opened, then the workers get the new size."""
    return PROBE_LIMIT_S + RESIZE_TIMEOUT_S


def start_s(attach_timeout_s: float) -> float:
    """Return the longest that a start takes whose driver may take `attach_timeout_s`."""
    return PROBE_LIMIT_S + START_TIMEOUT_S + attach_timeout_s + MARGIN_S


def undo_s() -> float:
    """Return the longest that it takes to undo a start."""
    return stop_s(STOP_TIMEOUT_S)


def prove_s() -> float:
    """Return the longest that the proof takes that a new server can take over."""
    return PROBE_LIMIT_S + START_TIMEOUT_S + STOP_TIMEOUT_S


def take_over_s(attach_timeout_s: float) -> float:
    """Return the longest that it takes to replace a server: proof, hand-over, end of the old one, start."""
    return prove_s() + client_s(hand_over_s(STOP_TIMEOUT_S)) + MARGIN_S + start_s(attach_timeout_s)


def client_s(server_s: float) -> float:
    """Return how long a client waits for an answer that takes its server up to `server_s`."""
    return server_s + ANSWER_MARGIN_S
