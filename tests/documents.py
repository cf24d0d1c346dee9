"""The commands that the documents print, and a directory in which they can be typed and leave nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "bench/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it tells what was, too
)


def read(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text()


def blocks(document: str, language: str = "sh") -> list[str]:
    """Return the code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)


def block_with(text: str, document: str = "README.md", language: str = "sh") -> str:
    """Return the one block that has `text` in it."""
    (found,) = [block for block in blocks(document, language) if text in block]
    return found


def section(document: str, heading: str) -> str:
    """Return the text between a heading of a document and the next one of whatever level."""
    (text,) = re.split(rf"^##+ {re.escape(heading)}$", read(document), flags=re.MULTILINE)[1:]
    return re.split(r"^##+ ", text, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of all tables in a text, without headings and rulers."""
    lines = text.splitlines()
    found = [number for number, line in enumerate(lines) if line.startswith("| ")]
    headings = {number - 1 for number, line in enumerate(lines) if re.fullmatch(r"\|[-:| ]+\|", line)}
    return [
        [cell.strip() for cell in lines[number].strip("|").split("|")] for number in found if number not in headings
    ]


def make_checkout(directory: Path) -> Path:
    """Make a directory look like the checkout after `make build`, for commands that name `.venv` and `bench`."""
    (directory / ".venv").symlink_to(sys.prefix)
    (directory / "bench").symlink_to(ROOT / "bench")
    return directory


def type_in(directory: Path, commands: str, limit_s: float) -> str:
    """Have a shell run commands, and return what they printed. Raises AssertionError when one fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
