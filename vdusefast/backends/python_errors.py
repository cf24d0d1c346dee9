"""What is said of a Python class that does wrong."""

from __future__ import annotations

import os
import sys
import time

REPEAT_S = 1.0


def place_of(error: BaseException) -> str:
    """Return where an exception comes from, as " (file.py:12)", or an empty string."""
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
    """Lines on standard error, each kind once a second at most, with a count of what was left out."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._kinds: dict[str, tuple[float, int]] = {}

    def say(self, kind: str, text: str, details: str = "") -> None:
        """Say `text` with the URI before it, and `details`, lines that go ahead; nothing if it was said just now."""
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
            return  # the class has closed it: there is nobody to say it to

    def say_failure(self, what: str, error: BaseException) -> None:
        """Say that a method of the class has raised: an OSError in a line, anything else with its traceback."""
        import traceback

        text = f"{what} raised {describe(error)}; the driver got IOERR"
        if isinstance(error, OSError):
            self.say(f"OSError {error.errno}", text)
        else:
            self.say("exception", text, "".join(traceback.format_exception(error)))
