"""The ways to start a device: as a new one, or as an orphan that is adopted.

The values are words of command lines. A server of one build starts a server of another build with them, so they stay.
"""

from __future__ import annotations

from enum import StrEnum


class StartMode(StrEnum):
    """The first step of a server."""

    ADD = "add"  # create the device, or adopt an orphan of that name
    NEW = "new"  # create the device; an orphan of that name that is in use is an error
    ADOPT = "adopt"  # adopt an orphan; without one it is an error
    RECOVER = "recover"  # as ADD, and flush the store again although it has lost data
    FAIL = "fail"  # adopt an orphan, without its store: answer its requests with errors until it is removed
    CLAIM = "claim"  # adopt a device of the kernel whose run directory is lost
    CLAIM_FAIL = "claim to fail"  # the same, without its store: answer its requests with errors until it is removed
    TAKE_OVER = "take over"  # prove that this server can serve the device, then have its server hand it over
    TAKE_OVER_UNSEEN = "take over unseen"  # the same, but the proof leaves out a plugin's store

    @property
    def takes_over(self) -> bool:
        """Whether there is a server already, which serves until the new one does."""
        return self in (StartMode.TAKE_OVER, StartMode.TAKE_OVER_UNSEEN)

    @property
    def proves_store(self) -> bool:
        """Whether the proof probes a plugin's store, which may allow one client only, or be unreachable."""
        return self != StartMode.TAKE_OVER_UNSEEN

    @property
    def must_adopt(self) -> bool:
        """Whether a device without a saved state is an error."""
        return self.takes_over or self in (StartMode.ADOPT, StartMode.FAIL)

    @property
    def may_adopt(self) -> bool:
        """Whether an orphan is adopted, if there is one."""
        return self.must_adopt or self in (StartMode.ADD, StartMode.RECOVER)

    @property
    def claims(self) -> bool:
        """Whether the device is one of the kernel whose run directory is lost."""
        return self in (StartMode.CLAIM, StartMode.CLAIM_FAIL)

    @property
    def fails_requests(self) -> bool:
        """Whether the store is left alone, and all requests are answered with errors."""
        return self in (StartMode.FAIL, StartMode.CLAIM_FAIL)

    @property
    def forgives(self) -> bool:
        """Whether a store that has lost data is flushed again."""
        return self == StartMode.RECOVER

    @property
    def may_be_service(self) -> bool:
        """Whether the server gets a service of its own. One that takes over stays in the service of the old server."""
        return self in (StartMode.ADD, StartMode.CLAIM, StartMode.RECOVER)


def of_flags(*, recover: bool | None, fail_requests: bool, claim: bool) -> StartMode:
    """Return the mode that older keywords of `Device.start` stand for."""
    if claim:
        return StartMode.CLAIM_FAIL if fail_requests else StartMode.CLAIM
    if fail_requests:
        return StartMode.FAIL
    return {None: StartMode.ADD, True: StartMode.ADOPT, False: StartMode.NEW}[recover]
