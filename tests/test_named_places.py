"""Every file and function that a document names exists: a map that lies is worse than none."""

from __future__ import annotations

import re
import subprocess

import pytest
from documents import DOCUMENTS, ROOT, read

SUFFIXES = "py|pyx|pxd|pyi|c|h|sh|toml|md|fio"
# Files that a document names as examples: the reader's own, or another project's.
FOREIGN = {"disk.py", "vd0.toml", "FILE.toml", "CONFIG.toml", "NAME.toml", "ceph.conf", "Python.h"}
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
).stdout.split()


def resolve(name: str) -> list[str]:
    """Return the files of the tree that a document means: by its path, or by the end of one."""
    return [path for path in FILES if path == name or path.endswith(f"/{name}")]


@pytest.mark.skipif(not FILES, reason="no git repository")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_in_a_document_exists(document: str) -> None:
    named = set(re.findall(rf"`((?:[\w@-]+/)*[\w@-]+\.(?:{SUFFIXES}))`", read(document)))
    assert not sorted(name for name in named - FOREIGN if not resolve(name))


@pytest.mark.skipif(not FILES, reason="no git repository")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_directory_in_a_document_exists(document: str) -> None:
    spans = re.findall(r"`((?:[\w-]+/)+)`", read(document))
    tops = {path.rpartition("/")[0] + "/" for path in FILES}
    assert not [span for span in spans if not any(top.startswith(span) or f"/{span}" in top for top in tops)]


def defines(text: str, name: str) -> bool:
    """Return whether a file in Python, Cython or C defines a function, class, structure or constant."""
    word = re.escape(name)
    python = rf"^\s*(?:async )?(?:def|class|cdef|cpdef)\b[^=\n]*\b{word}\b|^{word}\b.*="
    c = rf"\b(?:struct|enum|#define) {word}\b|^[a-z][\w *]*\b{word}\("
    return re.search(f"{python}|{c}", text, re.MULTILINE) is not None


@pytest.mark.skipif(not FILES, reason="no git repository")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_function_in_a_document_is_where_it_says(document: str) -> None:
    """`path: name`, or `path: Class.name`."""
    for path, name in re.findall(rf"`([\w/@-]+\.(?:{SUFFIXES})): ([\w.]+)`", read(document)):
        (file,) = resolve(path)
        text = (ROOT / file).read_text()
        assert all(defines(text, part) for part in name.split(".")), f"{document}: {path}: {name}"
