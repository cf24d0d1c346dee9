"""The type of a JSON object that is read and printed as it is, such as a device's info."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
