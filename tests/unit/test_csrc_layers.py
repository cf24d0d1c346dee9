"""The source tree shows the design: a layer uses only the layers below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# The folders of csrc that each folder's headers and sources may include, besides their own.
CSRC_LAYERS: dict[str, set[str]] = {
    "base": set(),
    "identity": set(),
    "memory": {"base"},
    "ring": {"base", "memory"},
    "driver": {"base", "ring"},
    "engine": {"base"},
    "queue": {"base", "memory", "ring", "engine"},
    "nbd": {"base", "engine"},
    "rbd": {"base", "engine"},
    "relay": {"base", "engine"},
    "python": {"base", "engine"},
    "board": {"base", "ring", "driver"},
    "preload": {"base", "ring", "driver", "board"},
}
INCLUDE = re.compile(r'^#include "(.*)"$', re.M)


def offences(root: Path, layers: dict[str, set[str]]) -> list[str]:
    """Return `file includes header` for every include that its folder's layer does not allow."""
    found = []
    for path in sorted(root.rglob("*.[ch]")):
        allowed = layers.get(path.parent.name, set()) | {path.parent.name}
        for header in INCLUDE.findall(path.read_text()):
            if Path(header).parent.name not in allowed or not (root / header).is_file():
                found.append(f"{path.relative_to(root)} includes {header}")
    return found


def test_c_files_include_only_lower_layers() -> None:
    assert {path.name for path in CSRC.iterdir()} == set(CSRC_LAYERS)
    assert offences(CSRC, CSRC_LAYERS) == []


@pytest.mark.parametrize(
    ("name", "header"),
    [("base/clock.h", "queue/queue.h"), ("engine/store.h", "nbd/engine_nbd.h"), ("ring/vring.h", "barrier.h")],
)
def test_an_include_of_a_higher_layer_is_found(name: str, header: str, tmp_path: Path) -> None:
    (tmp_path / header).parent.mkdir(exist_ok=True)
    (tmp_path / header).touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f'#include "{header}"\n')
    assert offences(tmp_path, CSRC_LAYERS) == [f"{name} includes {header}"]


def test_csrc_layers_have_no_cycle() -> None:
    left = dict(CSRC_LAYERS)
    while lowest := [name for name, below in left.items() if not below & set(left)]:
        for name in lowest:
            del left[name]
    assert left == {}
