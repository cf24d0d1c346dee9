"""How far the torture has come: a line that is drawn again on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from vdusefast.base.columns import terminal_width
from vdusefast.units import duration_text

DRAW_EVERY_S = 0.2
PRINT_EVERY_S = 5.0
CLEAR_LINE = "\r\x1b[K"


class ProgressLine:
    """The progress of one run; `done` is called after each cycle, `end` once."""

    def __init__(self, stream: TextIO, total: int, duration_s: float) -> None:
        """Begin. total: cycles, if duration_s is 0; else there are as many as there is time for."""
        self._stream = stream
        self._total = total
        self._duration_s = duration_s
        self._began_s = time.monotonic()
        self._next_s = self._began_s
        self._is_drawn = False
        if terminal_width(stream) is None:
            self._next_s += PRINT_EVERY_S

    def done(self, cycles: int, lost: int) -> None:
        """Show how many cycles are done, and how many requests or blocks were lost, unless that was shown just now."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        text = self.text(cycles, lost, now_s - self._began_s)
        width = terminal_width(self._stream)
        if width is None:
            self._next_s = now_s + PRINT_EVERY_S
            print(text, file=self._stream, flush=True)
            return
        self._next_s = now_s + DRAW_EVERY_S
        self._is_drawn = True
        self._stream.write(f"{CLEAR_LINE}{text[: width - 1]}")
        self._stream.flush()

    def text(self, cycles: int, lost: int, elapsed_s: float) -> str:
        """Return what is done, of how much, and the time left."""
        if self._duration_s:
            left_s = max(0.0, self._duration_s - elapsed_s)
            total = f"{duration_text(elapsed_s)} of {duration_text(self._duration_s)}"
            return f"{cycles} cycles, {lost} lost; {total}, {duration_text(left_s)} left"
        left = f", about {duration_text(elapsed_s / cycles * (self._total - cycles))} left" if cycles else ""
        return f"{cycles} of {self._total} cycles, {lost} lost; {duration_text(elapsed_s)}{left}"

    def end(self) -> None:
        """Remove the line from a terminal: the report follows."""
        if self._is_drawn:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()
