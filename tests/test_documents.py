"""Every command that the documents print runs as it is printed: here, in other modules' tests, or in a guest."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, block_with, blocks, make_checkout, read, type_in

from vdusefast.cli.app import cli

# The first line of each block, and the test that types it.
TYPED_BY = {
    "make fio": "tests/test_documents.py::test_make_fio",
    "sudo modprobe -a": "tests/vm/guest/scenario_documents.py::from_nothing_to_a_mounted_file_system",
    "sudo .venv/bin/vdusefast list ": "tests/vm/guest/scenario_documents.py::from_nothing_to_a_mounted_file_system",
    "sudo .venv/bin/vdusefast systemd-unit vd0": "tests/vm/guest/systemd_service.py::document",
    "truncate -s 64M disk.img": "tests/unit/test_document_examples.py::test_command_example",
    "truncate --size=64M disk.img": "tests/unit/test_run.py::test_document",
    "import vdusefast": "tests/unit/test_document_examples.py::test_python_example",
    "[device]": "tests/unit/test_document_examples.py::test_configuration_example",
    ".venv/bin/python -m vdusefast.bench fio --name=try": "tests/datapath/test_documented_stores.py::test_command_runs",
    "nbdkit --unix=": "tests/datapath/test_documented_stores.py::test_command_runs_on_the_documented_nbd_server",
    "rbd create": "tests/datapath/test_documented_stores.py::test_command_runs_on_the_documented_image",
    "# disk.py": "tests/datapath/test_documented_stores.py::test_command_runs_on_what_needs_no_server",
    ".venv/bin/vdusefast add vd0 ": "tests/test_documents.py::test_dry_run",
    ".venv/bin/python -m vdusefast.bench torture": "tests/test_documents.py::test_torture",
    "bench/vm/run --kernel 7.3 --icount": "tests/vm/test_documents_vm.py::test_user_memory",
    "sudo .venv/bin/python -m vdusefast.bench peers": "tests/vm/test_documents_vm.py::test_peers",
    ".venv/bin/python -m vdusefast.bench peers --vm 6.12 --variants": "tests/vm/test_documents_vm.py::test_variants",
    "bench/vm/run -- uname -r": "tests/vm/test_documents_vm.py::test_guests",
    "modprobe -a vduse": "tests/vm/guest/scenario_container.py::recipe_of_the_document",
    "mkfs.ext4": "tests/vm/guest/scenario_container.py::recipe_of_the_document",
    "podman run --rm": "tests/vm/guest/scenario_container.py::recipe_of_the_document",
    "podman rm --force": "tests/vm/guest/scenario_container.py::recipe_of_the_document",
    "umount /mnt": "tests/vm/guest/scenario_container.py::recipe_of_the_document",
}
LANGUAGES = ("sh", "python", "toml")
MAKE_LIMIT_S = 240


def first_lines(document: str) -> list[str]:
    return [block.splitlines()[0] for language in LANGUAGES for block in blocks(document, language)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_typed_by_a_test(document: str) -> None:
    for first in first_lines(document):
        tests = [test for start, test in TYPED_BY.items() if first.startswith(start)]
        assert len(tests) == 1, f"{document}: {first}: {tests}"
        path, _, name = tests[0].partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_says_its_language_unless_it_is_a_drawing(document: str) -> None:
    """A block without a language is never typed: it must be no command."""
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in fenced} <= {*LANGUAGES, ""}
    drawn = "\n".join(text for language, text in fenced if not language)
    assert not re.search(r"^ *(sudo|vdusefast|python|make|\.venv/bin|bench/|systemctl)\b", drawn, re.MULTILINE)


def test_no_test_types_what_is_gone() -> None:
    firsts = [first for document in DOCUMENTS for first in first_lines(document)]
    assert not [start for start in TYPED_BY if not any(first.startswith(start) for first in firsts)]


def anchors(document: str) -> set[str]:
    """Return the fragments that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", read(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        there = os.path.relpath((ROOT / document).parent / path, ROOT) if path else document
        assert (ROOT / there).exists(), f"{document}: {target}"
        assert not fragment or fragment in anchors(there), f"{document}: {target}"


def test_every_document_is_linked_from_another_one() -> None:
    linked = set()
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", read(document)):
            linked.add(os.path.relpath((ROOT / document).parent / target, ROOT))
    assert not [document for document in DOCUMENTS if document.startswith("docs/") and document not in linked]


def test_every_document_that_the_program_names_exists() -> None:
    named = set()
    for path in (ROOT / "vdusefast").rglob("*.py"):
        named |= set(re.findall(r"\bdocs/[a-z/-]+\.md", path.read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_sentence_exists_with_its_options(document: str) -> None:
    spans = re.findall(r"`(?:sudo )?(?:\.venv/bin/)?vdusefast ([a-z-]+)([^`\n]*)`", read(document))
    for name, words in spans:
        assert name in cli.commands, f"{document}: vdusefast {name}"
        known = {option for parameter in cli.commands[name].params for option in parameter.opts} | {"--help"}
        options = {word.partition("=")[0] for word in words.split() if word.startswith("--")}
        assert options <= known, f"{document}: vdusefast {name}{words}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_needs_an_environment_that_is_not_active(document: str) -> None:
    """sudo has a PATH of its own, and a new shell has none of .venv; in a guest both are set."""
    typed = "\n".join(block for block in blocks(document) if not block.startswith("bench/vm/run"))
    inline = "\n".join(re.findall(r"`(python [^`\n]*)`", read(document)))
    assert not re.findall(r"(?:^|[|&(;]|sudo) *(?:python|vdusefast)\b.*", typed, re.MULTILINE)
    assert "vdusefast" not in inline


@pytest.mark.slow
@pytest.mark.timeout(MAKE_LIMIT_S + 60)
def test_make_fio() -> None:
    assert type_in(ROOT, block_with("make fio"), MAKE_LIMIT_S).count("err= 0: pid=") == 2  # one a group of jobs


@pytest.mark.parametrize("target", ["check", "test"])
def test_make_targets_install_what_they_need(target: str) -> None:
    """To run all tests from a test would not end; what matters is that what they need is installed first."""
    assert f"`make {target}`" in read("README.md")
    path = shlex.quote(os.environ["PATH"])
    lines = type_in(ROOT, f"env -i PATH={path} make --dry-run {target}", 60).splitlines()
    assert lines[-1].endswith("tests/parts.py" if target == "test" else "tests/parts.py --fast")
    assert lines.index("./bootstrap.sh test") == 0


def test_dry_run(tmp_path: Path) -> None:
    assert "queue 3" in type_in(make_checkout(tmp_path), block_with("--dry-run", "docs/configuration.md"), 60)


@pytest.mark.slow
@pytest.mark.timeout(MAKE_LIMIT_S + 60)
def test_torture(tmp_path: Path) -> None:
    command = block_with(" torture ", "docs/operate.md")
    assert "nothing was lost" in type_in(make_checkout(tmp_path), command, MAKE_LIMIT_S)
