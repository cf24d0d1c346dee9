"""Log lines about errors of a Python class.

They are printed on standard error of the process that has the class, whose output is in the device's log.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traceback import FrameSummary
    from types import TracebackType

REPEAT_S = 1.0

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_COMPILED = "vdusefast" + os.sep  # our compiled modules name their source so
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
