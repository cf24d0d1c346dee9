"""The structures of linux/vduse.h and what they carry."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from vdusefast.transport import uapi

HEADER_CHECK = """
#include <linux/vduse.h>
#include <linux/virtio_blk.h>
#include <stddef.h>
#include <stdio.h>
int main(void)
{
    printf("%zu %zu %zu %zu %zu %zu %zu %zu %zu %zu\\n", sizeof(struct vduse_dev_request),
           sizeof(struct vduse_dev_response), sizeof(struct vduse_iotlb_entry), sizeof(struct vduse_vq_info),
           sizeof(struct vduse_vq_eventfd), offsetof(struct vduse_dev_request, iova),
           offsetof(struct vduse_dev_response, vq_state.split.avail_index), offsetof(struct vduse_vq_info, ready),
           offsetof(struct vduse_vq_info, split), offsetof(struct vduse_iotlb_entry, perm));
    return 0;
}
"""


def test_layouts_are_the_system_headers(tmp_path: Path) -> None:
    source = tmp_path / "sizes.c"
    source.write_text(HEADER_CHECK)
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    sizes = [int(n) for n in subprocess.run([tmp_path / "sizes"], check=True, capture_output=True).stdout.split()]
    structs = (uapi.REQUEST, uapi.RESPONSE, uapi.IOTLB_ENTRY, uapi.VQ_INFO, uapi.VQ_EVENTFD)
    assert sizes[:5] == [struct.size for struct in structs] == [152, 152, 32, 48, 8]
    assert sizes[5:] == [24, 28, 40, 32, 24]


def test_feature_bits_of_the_c_code_are_ours() -> None:
    text = (Path(__file__).parents[2] / "csrc" / "base" / "virtio_blk.h").read_text()
    bits = re.findall(r"^#define VF_((?:BLK_|RING_)?F_\w+) (\d+)u$", text, re.M)
    assert len(bits) == 9
    for name, bit in bits:
        assert getattr(uapi, f"VIRTIO_{name}") == 1 << int(bit), name


@pytest.mark.parametrize(
    "request_",
    [
        uapi.GetVqState(7, 3),
        uapi.SetStatus(2**32 - 1, 0xCF),
        uapi.UpdateIotlb(1, 0x1000, uapi.IOVA_LAST),
        uapi.SetVqGroupAsid(9, 1, 2),
        uapi.SetVqReady(10, 63, True),
        uapi.SetVqReady(11, 0, False),
        uapi.Suspend(12),
        uapi.UnknownRequest(13, 99),
    ],
)
def test_requests_survive_packing(request_: uapi.Request) -> None:
    packet = uapi.pack_request(request_)
    assert len(packet) == 152
    assert uapi.unpack_request(packet) == request_


def test_responses_survive_packing() -> None:
    response = uapi.Response(5, True, 2, 0xFFFF)
    packet = uapi.pack_response(response)
    assert len(packet) == 152
    assert uapi.unpack_response(packet) == response
    assert not uapi.unpack_response(uapi.pack_response(uapi.Response(5, False))).ok


@pytest.mark.parametrize(
    ("state", "members"),
    [
        (uapi.PACKED_FRESH, (1, 0, 1, 0)),
        (0, (0, 0, 0, 0)),
        (0x0003_8005, (1, 5, 0, 3)),
        (0xFFFF_7FFF, (0, 0x7FFF, 1, 0x7FFF)),
    ],
)
def test_state_of_a_packed_queue_is_one_integer(state: int, members: tuple[int, ...]) -> None:
    packed = uapi.pack_vq_state(state, packed=True)
    assert struct.unpack("=4H", packed) == members  # struct vduse_vq_state_packed
    assert uapi.unpack_vq_state(packed, packed=True) == state
    response = uapi.Response(5, True, 2, state, packed=True)
    packet = uapi.pack_response(response)
    assert packet[24:36] == struct.pack("=I4H", 2, *members)
    assert uapi.unpack_response(packet, packed=True) == response


def test_what_a_kernel_should_not_say_of_a_packed_queue_stays_within_its_bits() -> None:
    state = struct.pack("=4H", 2, 0x8001, 0xFFFF, 0x8002)
    assert uapi.unpack_vq_state(state, packed=True) == 0x8002_8001


def test_features_tell_the_format_and_where_a_fresh_queue_stands() -> None:
    assert not uapi.is_packed(uapi.VIRTIO_F_IN_ORDER)
    assert uapi.is_packed(uapi.VIRTIO_F_RING_PACKED)
    assert uapi.fresh_vq_state(uapi.VIRTIO_F_IN_ORDER) == 0
    assert uapi.fresh_vq_state(uapi.VIRTIO_F_RING_PACKED) == 0x8000_8000
    assert uapi.feature_names(uapi.VIRTIO_F_RING_PACKED | uapi.VIRTIO_F_IN_ORDER) == "RING_PACKED, IN_ORDER"


def test_packets_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="151 bytes"):
        uapi.unpack_request(bytes(151))
    with pytest.raises(ValueError, match="153 bytes"):
        uapi.unpack_response(bytes(153))


def test_response_with_reserved_words_set_is_refused() -> None:
    packet = bytearray(uapi.pack_response(uapi.Response(5, True)))
    packet[8] = 1
    with pytest.raises(ValueError, match="reserved"):
        uapi.unpack_response(bytes(packet))


def test_feature_names_name_every_bit() -> None:
    assert uapi.feature_names(uapi.VIRTIO_BLK_F_RO | uapi.VIRTIO_F_VERSION_1 | 1 << 60) == "RO, VERSION_1, bit 60"
