"""The lines of a kernel log that a good run does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The kernel, or a program, went wrong. No line of a good boot in the guest matches, so there are no exceptions.
TROUBLE = re.compile(
    "|".join(
        (
            r"\bWARNING:",
            r"\bBUG:|kernel BUG at",
            r"-\[ cut here \]-",
            r"\bCall Trace:",
            r"\bOops\b|Kernel panic",
            r"general protection fault|double fault|[Uu]nable to handle",
            r"\btraps: |\bsegfault at ",  # a program that died of its own mistake
            r"blocked for more than \d+ seconds|[Pp]ossible stuck request",
            r"soft lockup|hard LOCKUP",
            r"\brcu\w*: INFO:|self-detected stall|detected stalls",
            r"\bINFO: (possible|suspicious|trying|inconsistent|rcu|task|lockdep)",
            r"possible (circular|recursive|irq lock inversion)|inconsistent lock state|\blockdep\b",
            r"\b(UBSAN|KASAN|KFENCE|KCSAN|KMSAN):",
            r"refcount_t:|list_(add|del) corruption|use-after-free",
            r"Bad page|page allocation failure|Out of memory|oom-kill",
            r"nobody cared",
            r"scheduling while atomic|sleeping function called",
            r"messages suppressed",  # what was suppressed may have been any of these
        )
    )
)
# A block device failed a request, or a file system found itself damaged.
IO_ERRORS = re.compile(
    r"I/O error|lost (async )?page write|\b[Cc]orrupt(ed|ion)\b"
    r"|EXT4-fs (error|warning)|JBD2: .*(error|failed)|XFS \([^)]*\): .*([Ee]rror|failed|[Ss]hut)"
)


def findings(kernel_log: str, allowed: Iterable[str] = (), *, io_errors: bool = True) -> list[str]:
    """Return the lines of a kernel log that tell of a warning, crash, hang, stall, or lack of memory.

    Args:
        kernel_log: the whole log.
        allowed: regular expressions of lines that this run provokes on purpose.
        io_errors: also return failed requests and damaged file systems.
    """
    patterns = [TROUBLE, IO_ERRORS] if io_errors else [TROUBLE]
    expected = [re.compile(pattern) for pattern in allowed]
    return [
        line
        for line in kernel_log.splitlines()
        if any(pattern.search(line) for pattern in patterns) and not any(pattern.search(line) for pattern in expected)
    ]
