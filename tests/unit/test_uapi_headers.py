"""vdusefast.transport.uapi against <linux/vduse.h> of both kernels: we pack what the compiler makes of them."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from bench.vm import cache
from vdusefast.transport import uapi

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]  # the first time, the headers have to be fetched

# The C structure of each struct.Struct, and the members that its fields are, in their order.
STRUCTURES = {
    "REQUEST": ("vduse_dev_request", "type request_id padding"),
    "RESPONSE": ("vduse_dev_response", "request_id result reserved padding"),
    "DEV_CONFIG": (
        "vduse_dev_config",
        "name vendor_id device_id features vq_num vq_align ngroups nas config_size",
    ),
    "CONFIG_DATA": ("vduse_config_data", "offset length"),
    "IOTLB_ENTRY": ("vduse_iotlb_entry", "offset start last perm"),
    "IOTLB_ENTRY_V2": ("vduse_iotlb_entry_v2", "offset start last perm asid"),
    "IOVA_UMEM": ("vduse_iova_umem", "uaddr iova size asid"),
    "IOVA_INFO": ("vduse_iova_info", "start last capability asid"),
    "VQ_CONFIG": ("vduse_vq_config", "index max_size reserved1 group"),
    "VQ_INFO": ("vduse_vq_info", "index num desc_addr driver_addr device_addr packed ready"),
    "VQ_EVENTFD": ("vduse_vq_eventfd", "index fd"),
    # Read from and written to the beginning of a message's body, which is larger.
    "_VQ_STATE": ("vduse_vq_state", "index packed"),
    "_SPLIT_STATE": ("vduse_vq_state_split", "avail_index"),
    "_PACKED_STATE": (
        "vduse_vq_state_packed",
        "last_avail_counter last_avail_idx last_used_counter last_used_idx",
    ),
    "_STATUS": ("vduse_dev_status", "status"),
    "_IOVA_RANGE": ("vduse_iova_range", "start last"),
    "_VQ_GROUP_ASID": ("vduse_vq_group_asid", "group asid"),
    "_VQ_READY": ("vduse_vq_ready", "num ready"),
}
NAMED_OTHERWISE = {"VDUSE_NAME_MAX_BYTES": "VDUSE_NAME_MAX"}
NOT_IN_THE_HEADER = {"VDUSE_CONFIG_MAX_BYTES"}  # a limit inside of the kernel

# The names that 7.3 has and 6.12 lacks: version 1 of the interface.
LACKS: dict[str, set[str]] = {
    "6.12": {
        *("VDUSE_API_VERSION_1", "VDUSE_F_QUEUE_READY", "VDUSE_F_SUSPEND", "VDUSE_GET_FEATURES", "VDUSE_SET_FEATURES"),
        *("VDUSE_IOTLB_GET_FD2", "VDUSE_SET_VQ_GROUP_ASID", "VDUSE_SET_VQ_READY", "VDUSE_SUSPEND"),
        *("vduse_iotlb_entry_v2", "vduse_vq_group_asid", "vduse_vq_ready"),
        *("vduse_dev_config.ngroups", "vduse_dev_config.nas", "vduse_vq_config.reserved1", "vduse_vq_config.group"),
        *("vduse_iova_umem.asid", "vduse_iova_info.asid"),
    },
    "7.3": set(),
}


def numbers() -> dict[str, int]:
    """Return our numbers by their names in the header."""
    ours = {name: value for name, value in vars(uapi).items() if name.startswith("VDUSE_")}
    return {NAMED_OTHERWISE.get(name, name): value for name, value in ours.items() if name not in NOT_IN_THE_HEADER}


def fields(packer: struct.Struct) -> list[tuple[int, int]]:
    """Return (offset, size) of each field of a struct.Struct without alignment, padding left out."""
    found, offset = [], 0
    assert packer.format.startswith("=")
    for count, code in re.findall(r"(\d*)([a-zA-Z])", packer.format):
        size = struct.calcsize(f"={count}{code}")
        if code in "xs":
            found += [(offset, size)] if code == "s" else []
        else:
            one = struct.calcsize(f"={code}")
            found += [(at, one) for at in range(offset, offset + size, one)]
        offset += size
    return found


def layouts() -> dict[str, tuple[int, int]]:
    """Return our (offset, size) of every member by its name in C."""
    found = {}
    for name, (structure, members) in STRUCTURES.items():
        places = fields(getattr(uapi, name))
        assert len(places) == len(members.split()), name
        found |= {f"{structure}.{m}": place for m, place in zip(members.split(), places, strict=True)}
    return found


class Header:
    """One kernel's <linux/vduse.h>."""

    def __init__(self, kernel: str) -> None:
        self.directory = cache.headers(kernel)
        text = (self.directory / "linux/vduse.h").read_text()
        self._code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        self.numbers = set(re.findall(r"^#define\s+(VDUSE_\w+)\s", self._code, re.MULTILINE))
        for body in re.findall(r"\benum \w+ \{(.*?)\n\};", self._code, re.DOTALL):
            self.numbers |= set(re.findall(r"VDUSE_\w+", body))

    def has(self, name: str) -> bool:
        """Return whether it has a number, a structure, or a member STRUCTURE.MEMBER."""
        if name.startswith("VDUSE_"):
            return name in self.numbers
        structure, _, member = name.partition(".")
        body = re.search(rf"\bstruct {structure} \{{(.*?)\n\}};", self._code, re.DOTALL)
        return bool(body and re.search(rf"\b{member.partition('.')[0]}\b", body[1]))

    def values(self, expressions: list[str], directory: Path) -> list[int]:
        """Return what the compiler makes of integer expressions after including this header."""
        prints = "".join(f'\tprintf("%lld\\n", (long long)({expression}));\n' for expression in expressions)
        source, program = directory / "values.c", directory / "values"
        includes = "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/vduse.h>\n"
        source.write_text(f"{includes}int main(void)\n{{\n{prints}\treturn 0;\n}}\n")
        subprocess.run(["cc", "-I", self.directory, source, "-o", program], check=True, timeout=30)
        return [
            int(line) for line in subprocess.run([program], check=True, capture_output=True, timeout=10).stdout.split()
        ]


@pytest.fixture(scope="module", params=cache.KERNELS)
def header(request: pytest.FixtureRequest) -> Header:
    return Header(request.param)


@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_header_has_all_names_but_those_that_came_later(kernel: str) -> None:
    header = Header(kernel)
    names = {*numbers(), *layouts(), *(structure for structure, _ in STRUCTURES.values())}
    missing = {name for name in names if not header.has(name)}
    # A member of a structure that is not there is not there either.
    assert {name for name in missing if name.partition(".")[0] not in missing - {name}} == LACKS[kernel]


def test_every_number_of_the_newest_header_is_here() -> None:
    assert Header("7.3").numbers - set(numbers()) == set()


def test_numbers(header: Header, tmp_path: Path) -> None:
    ours = {name: value for name, value in numbers().items() if header.has(name)}
    assert dict(zip(ours, header.values([*ours], tmp_path), strict=True)) == ours


def test_sizes(header: Header, tmp_path: Path) -> None:
    known = {name: structure for name, (structure, _) in STRUCTURES.items() if header.has(structure)}
    sizes = header.values([f"sizeof(struct {structure})" for structure in known.values()], tmp_path)
    for name, size in zip(known, sizes, strict=True):
        packer = getattr(uapi, name)
        assert packer.size <= size if name.startswith("_") else packer.size == size, name


def test_places_and_sizes_of_members(header: Header, tmp_path: Path) -> None:
    ours = {name: place for name, place in layouts().items() if header.has(name)}
    expressions = []
    for name in ours:
        structure, _, member = name.partition(".")
        expressions.append(f"offsetof(struct {structure}, {member})")
        expressions.append(f"sizeof(((struct {structure} *)0)->{member})")
    values = header.values(expressions, tmp_path)
    assert dict(zip(ours, zip(values[::2], values[1::2], strict=True), strict=True)) == ours


def test_body_of_a_message_is_all_of_its_union(header: Header, tmp_path: Path) -> None:
    values = header.values(["sizeof(struct vduse_dev_request)", "sizeof(struct vduse_dev_response)"], tmp_path)
    assert values == [uapi.REQUEST.size, uapi.RESPONSE.size] == [152, 152]
