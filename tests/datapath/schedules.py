"""Hypothesis strategies: the driver's memory, and chains of every shape over it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from device_model import Params
from hypothesis import strategies as st
from model import (
    F_DISCARD,
    F_EVENT_IDX,
    F_FLUSH,
    F_INDIRECT,
    F_WRITE_ZEROES,
    INDIRECT,
    NEXT,
    RO,
    RW,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    U64,
    WO,
    WRITE,
    Desc,
    Region,
    header,
    ranges,
    table,
)
from rig import DATA_IOVA, Rig

CAPACITY = 64
TABLE_IOVA = 0x8000_0000
BIG_BYTES = 80_000

kinds = st.sampled_from([T_IN, T_OUT, T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES, 1, 5, 99, 0x8000_0000])
sectors = st.one_of(
    st.integers(0, CAPACITY),
    st.sampled_from([CAPACITY - 1, CAPACITY + 1, U64 - 1, U64 // 512, U64 // 512 - 1, 1 << 55]),
)
data_sizes = st.sampled_from([512, 512, 1024, 4096, 8192, 0, 1, 511, 513, 20, 32768, 33280])
range_triples = st.tuples(
    sectors,
    st.one_of(st.integers(0, 8), st.sampled_from([CAPACITY, 1 << 20, (1 << 20) + 1, 0xFFFF_FFFF])),
    st.sampled_from([0, 0, 0, 1, 2, 0x8000_0000]),
)
cuts = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 9000)), max_size=6)
region_sizes = st.sampled_from([1, 100, 512, 4096, 10_000, 40_000])
region_perms = st.sampled_from([RW, RW, RW, RO, WO])


@dataclass(frozen=True)
class Chain:
    """The parts of one request; independent of the rig, so that a failing example prints whole."""

    kind: int
    sector: int
    data_bytes: int
    pieces: tuple[tuple[int, int, int], ...]  # of discard and write zeroes
    cuts_in: tuple[int, ...]
    cuts_out: tuple[int, ...]
    in_at: int
    out_at: int
    trim_in: int = 0  # bytes more or fewer than the request should have
    trim_out: int = 0
    indirect: int = 0  # 0 none, 1 the whole chain, 2 all but the first descriptor
    table_at: int = 0
    flip: tuple[int, int] | None = None  # (descriptor, flag bits) to invert


def _cut(iova: int, size: int, at: tuple[int, ...], flags: int) -> list[Desc]:
    """Cut a range at offsets; repeated offsets make empty descriptors."""
    edges = [0, *sorted(min(a, size) for a in at), size]
    parts = [Desc((iova + a) % U64, b - a, flags) for a, b in itertools.pairwise(edges)]
    return parts if size or at else []


def put(rig: Rig, chain: Chain) -> int:
    """Write a chain into the rig's memory; its head."""
    payload = b""
    if chain.kind == T_OUT:
        payload = bytes((i * 13 + chain.sector) & 0xFF for i in range(chain.data_bytes))
    elif chain.kind in (T_DISCARD, T_WRITE_ZEROES):
        payload = ranges(*((sector % U64, count, flags) for sector, count, flags in chain.pieces))
    rig.memory.write(chain.in_at, header(chain.kind, chain.sector % U64) + payload)
    writable = chain.data_bytes if chain.kind in (T_IN, T_GET_ID) else 0
    # Without cuts of its own a chain is one as drivers make it: header, data and status apart.
    cuts_in, cuts_out = chain.cuts_in or (16,), chain.cuts_out or ((writable,) if writable else ())
    parts = _cut(chain.in_at, max(0, 16 + len(payload) + chain.trim_in), cuts_in, 0)
    parts += _cut(chain.out_at, max(0, writable + 1 + chain.trim_out), cuts_out, WRITE)
    if chain.flip and parts:
        at = chain.flip[0] % len(parts)
        parts[at] = Desc(parts[at].addr, parts[at].len, parts[at].flags ^ chain.flip[1], 0)
    if not parts:
        parts = [Desc(chain.in_at, 0)]
    direct = parts if not chain.indirect else parts[: chain.indirect - 1]
    if rig.packed and chain.indirect and not chain.flip:
        direct = []  # else the ring would be broken: a packed one does not take a table behind other descriptors
    if chain.indirect:
        rest = parts[len(direct) :] or [Desc(chain.out_at, 1, WRITE)]
        rig.memory.write(chain.table_at, table(rest))
        direct = [*direct, Desc(chain.table_at, 16 * len(rest), INDIRECT)]
    return rig.ring.put_chain(direct[: rig.ring.size])


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(start, size, perm, offset in its file) of data regions, some adjacent, one with room for the largest request."""
    at, found = DATA_IOVA, []
    specs = draw(st.lists(st.tuples(region_sizes, region_perms, st.sampled_from([0, 0, 0x1000, 8, 3])), max_size=4))
    for size, perm, gap in specs:
        found.append((at, size, perm, gap % 16))
        at += size + (gap if gap >= 0x1000 else 0)
    found.append((at, BIG_BYTES, RW, 0))
    if draw(st.booleans()):
        found.append((U64 - 2048, 2048, RW, 0))
    return found


def regions_of(layout: list[tuple[int, int, int, int]]) -> list[Region]:
    """Make the regions, and two adjacent ones for indirect tables."""
    tables = [Region(TABLE_IOVA, 100, RO), Region(TABLE_IOVA + 100, 4000, RO)]
    return [*(Region(*spec) for spec in layout), *tables]


good_sectors = st.integers(0, 7).map(lambda block: block * 8)
good_sizes = st.sampled_from([4096, 4096, 8192, 0])
good_pieces = st.lists(st.tuples(good_sectors, st.sampled_from([8, 0, 8]), st.just(0)), min_size=1, max_size=2)
good_kinds = st.sampled_from([T_IN, T_OUT, T_IN, T_OUT, T_GET_ID, T_DISCARD, T_WRITE_ZEROES, T_FLUSH])


@st.composite
def good_chains(draw: st.DrawFn, big: int, *, indirect: bool) -> Chain:
    """A request without fault, somewhere in the big region and cut in any way; most are on the device."""
    slot = draw(st.integers(0, 3))
    return Chain(
        kind=draw(good_kinds),
        sector=draw(good_sectors),
        data_bytes=draw(good_sizes),
        pieces=tuple(draw(good_pieces)),
        cuts_in=tuple(draw(cuts)),
        cuts_out=tuple(draw(cuts)),
        in_at=big + 8300 * slot,
        out_at=big + 40_000 + 8300 * slot,
        indirect=draw(st.integers(0, 2)) if indirect else 0,
        table_at=TABLE_IOVA + draw(st.sampled_from([0, 48, 96, 8, 4])) + 400 * slot,
    )


@st.composite
def chains(draw: st.DrawFn, layout: list[tuple[int, int, int, int]], what: Params, *, hostile: bool = True) -> Chain:
    """A chain over a layout. Those that are not hostile never break the ring."""
    big = next(start for start, size, *_ in layout if size == BIG_BYTES)
    indirect = bool(what.features & F_INDIRECT)
    if draw(st.booleans()):
        return draw(good_chains(big, indirect=indirect))
    anywhere = st.sampled_from([start for start, *_ in layout]).flatmap(
        lambda start: st.integers(0, 600).map(lambda more: (start + more) % U64)
    )
    flips = st.tuples(st.integers(0, 9), st.sampled_from([WRITE, INDIRECT, NEXT | INDIRECT] if hostile else [WRITE]))
    slot = draw(st.integers(0, 3))
    return Chain(
        kind=draw(kinds),
        sector=draw(st.one_of(good_sectors, sectors)),
        data_bytes=draw(st.one_of(good_sizes, data_sizes)),
        pieces=tuple(draw(st.one_of(good_pieces, st.lists(range_triples, max_size=4)))),
        cuts_in=tuple(draw(cuts)),
        cuts_out=tuple(draw(cuts)),
        in_at=draw(st.one_of(st.just(big + 8300 * slot), anywhere)),
        out_at=draw(st.one_of(st.just(big + 40_000 + 8300 * slot), anywhere)),
        trim_in=draw(st.sampled_from([0] * 9 + [-1, -16, 1, 16])),
        trim_out=draw(st.sampled_from([0] * 9 + [-1, 1])),
        indirect=draw(st.integers(0, 2)) if indirect or (hostile and draw(st.integers(0, 9)) == 0) else 0,
        table_at=TABLE_IOVA + draw(st.sampled_from([0, 0, 48, 96, 8, 4])) + 400 * slot,
        flip=draw(st.one_of(st.none(), st.none(), st.none(), flips)),
    )


@st.composite
def params(draw: st.DrawFn, *, queue_size: int, ring: int = 0) -> Params:
    """A device: features, block size, limits. ring: the features of the ring's format."""
    features = F_FLUSH | ring
    for bit in (F_EVENT_IDX, F_INDIRECT, F_DISCARD, F_WRITE_ZEROES):
        features |= bit if draw(st.sampled_from([True, True, True, False])) else 0
    return Params(
        capacity_sectors=CAPACITY,
        block_size=draw(st.sampled_from([512, 512, 512, 4096])),
        read_only=draw(st.sampled_from([False, False, False, True])),
        discard_max_sectors=draw(st.sampled_from([1 << 20, 1 << 20, 4, 0])),
        discard_max_seg=draw(st.sampled_from([32, 1])),
        write_zeroes_max_sectors=draw(st.sampled_from([1 << 20, 4])),
        write_zeroes_max_seg=draw(st.sampled_from([32, 2])),
        serial=draw(st.sampled_from(["", "abc", "x" * 20])),
        queue_size_max=queue_size,
        features=features,
    )
