"""Text from elsewhere in what we print: a name with a newline in it must not look like two lines of a log.

Names of files and exports, messages of servers and the output of children may hold any character. Characters with an
effect on a terminal or a log are escaped as in Python's repr(). Workers load this.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with all non-printable characters escaped: one line, without effect on a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_utf8(text: str) -> bool:
    """Return whether `text` can be encoded: a name of a file that is not UTF-8 comes with surrogates in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
