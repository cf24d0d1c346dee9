"""The parts of a device are released in one order, whatever happens."""

from __future__ import annotations

import pytest

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.control.release import Part, Release


def test_order_is_that_of_the_parts_and_not_of_their_making() -> None:
    done: list[Part] = []
    release = Release()
    for part in (Part.STORE, Part.RELAY, Part.DIRECTORY, Part.LOOP):
        release.add(part, lambda part=part: done.append(part))  # type: ignore[misc]
    release.close()
    release.close()
    assert done == [Part.RELAY, Part.LOOP, Part.STORE, Part.DIRECTORY]


def test_part_that_fails_keeps_no_other_one_from_being_released() -> None:
    done: list[Part] = []

    def fail() -> None:
        raise OSError("no")

    release = Release()
    release.add(Part.LOOP, fail)
    release.add(Part.DIRECTORY, lambda: done.append(Part.DIRECTORY))
    with pytest.raises(OSError, match="no"):
        release.close()
    assert done == [Part.DIRECTORY]


def test_directory_of_a_device_is_released_last(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Part] = []
    add = Release.add

    def note(release: Release, part: Part, close: object) -> None:
        add(release, part, lambda: (parts.append(part), close()))  # type: ignore[operator]

    monkeypatch.setattr(Release, "add", note)
    with Device(make_config(name="d0", uri="null:1M")):
        pass
    assert parts == sorted(parts)
    assert parts[-2:] == [Part.STORE, Part.DIRECTORY]
    assert Part.LOOP in parts
