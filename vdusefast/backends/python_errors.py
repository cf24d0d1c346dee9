"""Log lines about errors of a Python class."""

from __future__ import annotations

import os
import sys
import time

REPEAT_S = 1.0


def place_of(error: BaseException) -> str:
    """Return the origin of an exception, as " (file.py:12)", or an empty string."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({os.path.basename(error.filename)}:{error.lineno})"
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


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
        try:
            print(f"{details}{self._uri}: {text}{more}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            return  # the class has closed standard error

    def say_failure(self, what: str, error: BaseException) -> None:
        """Report an exception of a method of the class: an OSError in one line, any other with its traceback."""
        import traceback

        text = f"{what} raised {describe(error)}; the driver got IOERR"
        if isinstance(error, OSError):
            self.say(f"OSError {error.errno}", text)
        else:
            self.say("exception", text, "".join(traceback.format_exception(error)))
