"""Imports follow the order of packages in the table of ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from documents import ROOT, rows, section

PACKAGE = ROOT / "vdusefast"


def order() -> dict[str, int]:
    """Return the place of each package in the table, the highest first."""
    table = section("ARCHITECTURE.md", "Packages").strip().split("\n\n")[0]
    lines = [re.findall(r"`(\w+)(?:/|\.py)?`", cells[0]) for cells in rows(table)]
    return {name: place for place, names in enumerate(lines) for name in names}


def imported(path: Path) -> Iterator[str]:
    """Return the modules of ours that a module imports, except those that only a type checker sees."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "vdusefast":
            yield from (f"vdusefast.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def upward(package: Path, places: dict[str, int]) -> list[str]:
    """Return `module imports module` for every import of a higher package."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").parts
        for name in imported(path):
            top = name.split(".")[1] if name.startswith("vdusefast.") else ""
            if module[0] in places and top in places and places[top] < places[module[0]]:
                found.append(f"{'.'.join(module)} imports {name}")
    return found


def test_imports_follow_the_order_of_packages() -> None:
    places = order()
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(places)
    assert upward(PACKAGE, places) == []


def test_an_import_of_a_higher_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/run_dir.py").write_text("def f():\n    from vdusefast.server import registry\n")
    assert upward(tmp_path, order()) == ["state.run_dir imports vdusefast.server"]
