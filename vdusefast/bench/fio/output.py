"""fio's output passed on as it comes; the last JSON object in it gets one more member."""

from __future__ import annotations

import json
from typing import BinaryIO

from vdusefast.base.json_types import Json

START, END = b"{\n", b"}\n"  # of an object: fio indents everything within


class JsonStream:
    """Passes bytes on, except from the end of an object on: that waits for the next object, or for our member."""

    def __init__(self, stream: BinaryIO):
        """Pass on to `stream` (borrowed)."""
        self._stream = stream
        self._line = b""  # not complete
        self._last = b""  # the line before, which gets a comma when a member follows it
        self._held = b""  # from the end of an object on

    def write(self, data: bytes) -> None:
        """Take what fio has printed."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._take(line + b"\n")
        self._stream.flush()

    def _take(self, line: bytes) -> None:
        if line == START:
            self._release()
        if self._held or (line == END and self._last.startswith(b" ")):
            self._held += line
            return
        self._stream.write(self._last)
        self._last = line

    def _release(self) -> None:
        self._stream.write(self._last + self._held)
        self._last = self._held = b""

    def finish(self, name: str, member: Json) -> bool:
        """Add the member to the last object and pass on what waits; return whether there was an object."""
        found = bool(self._held)
        if found:
            self._last = self._last.rstrip(b"\n") + b",\n" + _member(name, member)
        self.release()
        return found

    def release(self) -> None:
        """Pass on what waits, as fio has printed it."""
        self._held += self._line
        self._line = b""
        self._release()
        self._stream.flush()


def _member(name: str, member: Json) -> bytes:
    text = json.dumps(member, indent=2).replace("\n", "\n  ")
    return f'  "{name}" : {text}\n'.encode()
