"""Sizes and counts as fio reads them; fio itself is asked where they are more than digits and a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vdusefast.bench.fio.arguments import Knowledge
from vdusefast.errors import ConfigError

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}  # of fio: k is 1024, unless kb_base is 1000
NO_LIMIT = 1 << 63  # fio keeps percentages, and "no size", above


@dataclass(frozen=True)
class Amount:
    """So many bytes, or a share of what there is, in per cent."""

    count: int = 0
    percent: int = 0

    def of(self, whole: int) -> int:
        """Return the amount in bytes of `whole`."""
        return whole * self.percent // 100 if self.percent else self.count


class Numbers:
    """Reads numbers of one run."""

    def __init__(self, know: Knowledge):
        self._know = know
        self._known: dict[tuple[str, str, str], Amount] = {}

    def amount(self, name: str, text: str, kb_base: str = "1024") -> Amount:
        """Return the value of option `name`. Raises ConfigError when fio does not understand it."""
        match = re.fullmatch(r"(\d+)([kmgt]?)", text.lower())
        if match and kb_base == "1024":
            return Amount(int(match[1]) * UNITS[match[2]])
        if match := re.fullmatch(r"(\d+)%", text):
            return Amount(percent=int(match[1]))
        key = name, text, kb_base
        if key not in self._known:
            self._known[key] = self._ask(*key)
        return self._known[key]

    def _ask(self, name: str, text: str, kb_base: str) -> Amount:
        """Let fio parse it: its debug output has what every option came to. Of a range the end counts."""
        said = self._know.ask(
            "--parse-only", "--debug=parse", "-", text=f"[q]\nkb_base={kb_base}\n{name}={text}\n"
        ).splitlines()
        values = [
            int(match[1])
            for place, line in enumerate(said[:-1])
            if f"handle_option={name}," in line and (match := re.search(r"ret=0, out=(\d+)", said[place + 1]))
        ]
        if not values or values[-1] >= NO_LIMIT:
            raise ConfigError(f"{name}={text}: fio does not understand this")
        return Amount(values[-1])
