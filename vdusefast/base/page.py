"""The size of a page: 4 KiB on most machines, 16 or 64 KiB on others; as csrc/base/page.h has it."""

from __future__ import annotations

import mmap
import os

PAGE_MAX_BYTES = 65536


def page_bytes() -> int:
    """Return the size of a page in bytes: offsets and lengths of mappings are multiples of it.

    VDUSEFAST_TEST_PAGE_BYTES in the environment is for tests alone: a larger size than the machine's, so that it shows
    whether everything that is mapped lies where such a machine wants it.
    """
    text = os.environ.get("VDUSEFAST_TEST_PAGE_BYTES", "")
    wanted = int(text) if text.isdecimal() else 0
    if mmap.PAGESIZE < wanted <= PAGE_MAX_BYTES and wanted & (wanted - 1) == 0:
        return wanted
    return mmap.PAGESIZE


PAGE_BYTES = page_bytes()


def round_up_to_pages(size_bytes: int) -> int:
    """Return the bytes of the pages that `size_bytes` take."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
