"""The line of a key in a TOML text, for messages about it."""

from __future__ import annotations

import re


def line_of(text: str, key: str) -> str:
    """Return ":LINE" of a key such as `device.queues` or `queue[1].cpu`, "" when it is not written as one.

    The table's header stands in for a key that is missing.
    """
    match = re.fullmatch(r"(?:([a-z_]+)(?:\[(\d+)\])?\.)?([^.]+)", key)
    if not match:
        return ""
    table, index, field = match.groups()
    table = table or field
    seen, inside, found = -1, False, ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+\s*([^\]\s]+)\s*\]+", line)
        if header:
            seen += header[1] == table
            inside = header[1] == table and seen == int(index or 0)
            found = f":{number}" if inside else found
        elif inside and re.match(rf"\s*[\"']?{re.escape(field)}[\"']?\s*=", line):
            return f":{number}"
    return found
