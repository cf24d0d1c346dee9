"""The errors of a guest itself, apart from those of its command."""

from __future__ import annotations


class GuestError(Exception):
    """No guest can be had, or it ended without saying how its command did; the message says why and what to do."""

    exit_status = 125
    kernel_log = ""  # as far as there was one
    died_booting = False  # a kernel started, and ended before the command did


class GuestTimeoutError(GuestError):
    """The guest did not end in time."""

    exit_status = 124
