"""The recipe of docs/adding.md for a transport: a file of its own, and two others."""

from __future__ import annotations

from pathlib import Path

import recipes

EDITS = {
    "vdusefast/base/kinds.py": [('    KERNEL = "kernel"', '    DUMMY = "dummy"\n')],
    "vdusefast/control/assembly.py": [
        (
            "    if not device.is_in_kernel:\n",
            '    if device.transport == "dummy":\n'
            "        from vdusefast.transport.dummy import DummyTransport\n\n"
            "        return DummyTransport()\n",
        ),
    ],
}
# It notes what it is asked, and has the port of the loopback bus: one of its own in C is a branch in worker/main.py.
DUMMY = """
from vdusefast.base.kinds import TransportKind
from vdusefast.transport.loopback import LoopbackTransport

created = []


class DummyTransport(LoopbackTransport):
    kind = TransportKind.DUMMY
    memory_text = "a dummy's"

    def create(self, spec):
        created.append(spec.name)
        super().create(spec)
"""
USE = """
import sys
import vdusefast

config = vdusefast.make_config(name="vd0", uri="memory:1M", transport="dummy")
with vdusefast.Device(config, run_dir=sys.argv[1]) as device, device.driver() as driver:
    driver.write(4096, b"d" * 4096)
    assert driver.read(0, 8192) == bytes(4096) + b"d" * 4096
    info = device.info()
    assert (info["transport"], info["memory"]) == ("dummy", "a dummy's"), info
    from vdusefast.transport.dummy import created

    assert created == ["vd0"]
"""


def test_a_transport_is_a_file_and_two_edits(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    recipes.copy_package(tree, built=True)
    (tree / "vdusefast" / "transport" / "dummy.py").write_text(DUMMY)
    recipes.follow(tree, EDITS)
    recipes.use(tree, USE, tmp_path / "run")
