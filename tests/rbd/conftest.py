"""Devices over images of the session's cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from ceph_rig import Cluster

from vdusefast import Device, make_config

_numbers = itertools.count()


@pytest.fixture
def image(ceph: Cluster) -> str:
    """Return the name of a new image of 16 MiB in the pool rbd, with the features that Ceph gives it."""
    name = f"image{next(_numbers)}"
    ceph.make_image(name, "16M")
    return name


@pytest.fixture
def serve() -> Iterator[Callable[..., Device]]:
    """Return a function that starts a device with one queue over a URI; all end with the test."""
    with ExitStack() as stack:

        def start(uri: str, **settings: Any) -> Device:
            settings = {"name": f"rbd{next(_numbers)}", "queues": 1, "queue_size": 64, **settings}
            return stack.enter_context(Device(make_config(uri=uri, **settings)))

        yield start
