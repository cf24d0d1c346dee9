"""The units of a block device, as the kernel shows them in sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdusefast.backends.io_limits import discard_offset

MIB = 1 << 20


@pytest.mark.parametrize(
    ("alignment", "granularity", "offset"),
    [
        ("0", MIB, 0),
        ("3584", MIB, 3584),
        (str(5 * MIB + 512), MIB, 512),
        ("-1", MIB, 0),  # a cut at byte MIB - 1 would be no sector
        ("3584", 0, 0),
        (None, MIB, 0),
    ],
)
def test_discard_units_begin_where_sysfs_says(
    tmp_path: Path, alignment: str | None, granularity: int, offset: int
) -> None:
    if alignment is not None:
        (tmp_path / "discard_alignment").write_text(f"{alignment}\n")
    assert discard_offset(tmp_path, granularity) == offset
