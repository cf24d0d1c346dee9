"""Log lines about errors of a Python class.

They are printed on standard error of the process that has the class, whose output is in the device's log.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from traceback import FrameSummary
    from types import FrameType, TracebackType

REPEAT_S = 1.0
STACK_FRAMES_MAX = 12
SLOW_S = 4.0  # of a start; the supervisor says at that time that it is slow

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_COMPILED = "vdusefast" + os.sep  # our compiled modules name their source so
_ASYNCIO = f"{os.sep}asyncio{os.sep}"
_IMPORTS = "<frozen importlib"


def is_ours(path: str) -> bool:
    """Return whether a frame of that file is vdusefast's or of an import, and says nothing about the class."""
    return path.startswith((_OURS, _COMPILED, _IMPORTS))


def place_of(error: BaseException) -> str:
    """Return the origin of an exception, as " (file.py:12)", or an empty string."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({os.path.basename(error.filename)}:{error.lineno})"
    frames = _frames(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


def _frames(tb: TracebackType | None) -> list[FrameSummary]:
    """Return the frames of a traceback that are not ours."""
    import traceback

    return [frame for frame in traceback.extract_tb(tb) if not is_ours(frame.filename)]


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an exception as Python prints it, without our frames at its start."""
    import traceback

    tb = error.__traceback__
    while tb is not None and is_ours(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb))


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an exception that ends the start of a disk; the report about it has one line."""
    print_text(traceback_of(error))


def print_text(text: str) -> None:
    """Print on standard error."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except (AttributeError, OSError, ValueError):
        return  # the class has closed standard error, or put something else in its place


def describe(error: BaseException) -> str:
    """Return an exception as one line: its kind, its message, its place."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}{place_of(error)}"


@contextmanager
def placed_if_slow() -> Iterator[None]:
    """Have the place printed where the class is if the block takes long, even if it holds the interpreter's lock."""
    import faulthandler

    try:
        faulthandler.dump_traceback_later(SLOW_S, file=sys.stderr)
    except (AttributeError, OSError, RuntimeError, ValueError):  # the class's module has closed standard error
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_between_calls(frame: FrameType) -> bool:
    """Return whether the innermost frame is ours or of a waiting event loop, and not the class's."""
    path = frame.f_code.co_filename
    return is_ours(path) or _ASYNCIO in path or path.endswith("/selectors.py")


def print_stack(frame: FrameType) -> None:
    """Print where the class's code is, the innermost call last."""
    import traceback

    frames: list[FrameSummary] = traceback.extract_stack(frame)
    ours = [place for place, one in enumerate(frames) if is_ours(one.filename) or _ASYNCIO in one.filename]
    if frames := frames[ours[-1] + 1 if ours else 0 :][-STACK_FRAMES_MAX:]:
        print_text("It is here (innermost call last):\n" + "".join(traceback.format_list(frames)))


class Complaints:
    """Lines on standard error, each kind at most once a second, with a count of those left out."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._kinds: dict[str, tuple[float, int]] = {}

    def say(self, kind: str, text: str, details: str = "") -> None:
        """Print `details`, then the URI and `text`; print nothing if this kind was printed within a second."""
        now_s = time.monotonic()
        next_s, left_out = self._kinds.get(kind, (0.0, 0))
        if now_s < next_s:
            self._kinds[kind] = (next_s, left_out + 1)
            return
        self._kinds[kind] = (now_s + REPEAT_S, 0)
        more = f" ({left_out} more like this since the last line)" if left_out else ""
        print_text(f"{details}{self._uri}: {text}{more}\n")

    def say_failure(self, what: str, error: BaseException) -> None:
        """Report an exception of a method of the class: an OSError in one line, any other with its traceback."""
        text = f"{what} raised {describe(error)}; the driver got IOERR"
        if isinstance(error, OSError):
            self.say(f"OSError {error.errno}", text)
        else:
            self.say("exception", text, traceback_of(error))
