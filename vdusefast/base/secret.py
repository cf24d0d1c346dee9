"""Secrets in the URI of a store: hide them in messages, and read them from a file.

A secret is a parameter whose name ends in one of SECRET_WORDS (`?api_key=`, `&password=`, `token=`), and the password
of `scheme://user:password@host`. The names of files with secrets (`keyring=`, `tls-psk-file=`) are none.

Only the standard library is imported here, and little of that: workers load it.
"""

from __future__ import annotations

import os
import re
import stat

SECRET_WORDS = (
    "key",
    "keys",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "token",
    "credential",
    "credentials",
)
HIDDEN = "***"
FILE_MAX_BYTES = 1 << 16

# The last character of a value is none of those that may follow a URI in a sentence.
_VALUE = r"[^&\s'\"]*[^&\s'\",:;)]"
_PARAMETER = re.compile(rf"([?&][\w.%-]*(?:{'|'.join(SECRET_WORDS)})=){_VALUE}", re.IGNORECASE)
_USERINFO = re.compile(r"(\w://[^/\s:@?#]*:)[^/\s@?#]+@")


def redact(text: str) -> str:
    """Return `text`, a URI or a message with URIs in it, with every secret replaced by HIDDEN."""
    if "=" in text:
        text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    return _USERINFO.sub(rf"\1{HIDDEN}@", text) if "://" in text else text


def find_ambiguous(uri: str) -> str:
    """Return the name of a secret that `redact` cannot tell from the text around it, "" when there is none."""
    for match in re.finditer(rf"[?&]([\w.%-]*(?:{'|'.join(SECRET_WORDS)}))=([^&]*)", uri, re.IGNORECASE):
        if re.search(r"[\s'\"]|[,:;)]$", match[2]):
            return match[1]
    return ""


def check_file(path: str) -> None:
    """Check that a file with a secret is private. Raises OSError, ValueError with the remedy."""
    _check_status(path, os.stat(path))


def read_file(path: str) -> str:
    """Return the secret in a file, without the line's end. Raises OSError, ValueError with the remedy."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        _check_status(path, os.fstat(fd))
        text = file.read(FILE_MAX_BYTES + 1)
    if len(text) > FILE_MAX_BYTES:
        raise ValueError(f"{path} has more than {FILE_MAX_BYTES} bytes: it is no secret")
    try:
        return text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _check_status(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        mode = stat.S_IMODE(status.st_mode)
        raise ValueError(f"{path} has mode {mode:04o}: others may read or change it; chmod 0600 {path}")
    # Root may read anybody's; if we are not root, only root and we ourselves may have put the secret there.
    if os.geteuid() and status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path} belongs to user {status.st_uid}; chown it to the user who serves the device")
