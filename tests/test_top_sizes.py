"""Vectors and sizes near 2**63 and 2**64: cut, joined, refused or done, at once, with nothing left."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from conftest import live
from hypothesis import example, given, settings
from hypothesis import strategies as st
from top import HIGH, KINDS, LAST, PAGE, TOP, all_gone, device

from dmapath import (
    Adversary,
    Bio,
    Device,
    DmaEngine,
    DmaError,
    DmaValueError,
    Fabric,
    GrantTable,
    Iommu,
    MappingError,
    PhysMemory,
    Swiotlb,
)
from dmapath.request import iterate

# ---- vectors of a world of addresses alone


places = st.sampled_from([0, PAGE, 1 << 32, 1 << 52, 1 << 63, TOP]).flatmap(
    lambda at: st.integers(-3, 3).map(lambda k: (at + k * PAGE) % TOP))  # fmt: skip


@example(vecs=[(0xFFFFD000, PAGE), (0xFFFFE000, 3 * PAGE)], most=None, boundary=(1 << 32) - 1)
@settings(max_examples=400, deadline=None)
@given(vecs=st.lists(st.tuples(places, st.sampled_from([1, 0x200, PAGE, 2 * PAGE, 3 * PAGE])), min_size=1, max_size=8),
       most=st.sampled_from([None, 1, 0x200, PAGE, (1 << 63) - 1]),
       boundary=st.sampled_from([0x1FF, 0xFFF, (1 << 32) - 1, (1 << 63) - 1, LAST]))  # fmt: skip
def test_vectors_are_cut_and_joined_inside_64_bits(vecs: list[tuple[int, int]], most: int | None, boundary: int) -> None:
    vecs = [(p, min(n, TOP - p)) for p, n in vecs]
    dev = Device(max_segment_size=most, seg_boundary_mask=boundary, max_segments=2**32 - 1)
    got = [(int(p), n) for p, n in iterate(Bio.from_phys(vecs), dev)]
    assert all(n > 0 and p + n <= TOP for p, n in got)
    assert all(n <= (most or 2**32 - 1) and p & ~boundary == p + n - 1 & ~boundary for p, n in got)
    assert flat(got) == flat(vecs)
    if any(p == LAST for p, _ in got):  # the address that means none
        with pytest.raises(DmaError):
            dev.map(Bio.from_phys(vecs))
        return
    with dev.map(Bio.from_phys(vecs), "linux") as m:  # without an IOMMU these are the DMA addresses
        assert [(int(s.addr), s.length) for s in m] == got
    with dev.map(Bio.from_phys(vecs)) as m:  # vectors join before they are cut: never more segments, of the same bytes
        ours = [(int(s.addr), s.length) for s in m]
        assert flat(ours) == flat(vecs)
        assert len(ours) <= len(got)
        assert all(n <= (most or LAST) and p & ~boundary == p + n - 1 & ~boundary for p, n in ours)


def flat(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of bytes in order: the same list for the same bytes, however they are cut."""
    out: list[tuple[int, int]] = []
    for p, n in ranges:
        if out and sum(out[-1]) == p:
            out[-1] = (out[-1][0], out[-1][1] + n)
        else:
            out.append((p, n))
    return out


# ---- sizes near 2**63: refused or done, at once, with nothing left


BACK_ENDS: dict[str, Any] = {
    "direct": lambda m: Device(memory=m),
    "direct, non-coherent": lambda m: Device(memory=m, coherent=False),
    "pool": lambda m: Device(memory=m, swiotlb=Swiotlb(m, slots=128, force=True)),
    "grant": lambda m: Device(memory=m, grants=GrantTable(16)),
    "adversary": lambda m: Device(memory=m, backend=Adversary(1)),
    **{name: lambda m, name=name: device(name)[0] for name in KINDS},
}
SIZES = [2**64 - 1, 2**63 - 1, 2**63 - PAGE, 2**62, 2**62 - 1, 2**52, 2**44 + PAGE]


@pytest.mark.parametrize("name", BACK_ENDS)
def test_huge_sizes(name: str) -> None:
    dev = BACK_ENDS[name](PhysMemory(1 << 20))
    for coherent in (0, "skip_cpu_sync"):
        for size in SIZES:
            before = live(dev)
            try:
                addr = dev.map_phys(1 << 40, size, "to_device", coherent)
            except DmaError:
                assert live(dev) == before
            else:
                dev.unmap_phys(addr, size, "to_device", coherent)
    for size in SIZES:
        state = dev.iova_try_alloc(0, size)
        if state is not None:
            dev.iova_free(state)
    at = int(dev.memory.phys(0))
    for size in SIZES[1:] if name != "grant" else SIZES[1:2]:  # which breaks it for good (xen_grant_dma_unmap_page)
        addr = dev.map_phys(at, 64, "bidirectional")
        for call in (dev.sync_for_cpu, dev.sync_for_device, dev.unmap_phys):
            with contextlib.suppress(DmaError):
                call(addr, size, "bidirectional")  # a driver's mistake: it must end
        for n in dev.counters().values():
            assert n >= 0


def test_sizes_of_an_access_do_not_wrap() -> None:
    memory = PhysMemory(PAGE)
    engine = DmaEngine(Device(memory=memory))
    huge = [(0, 2**63 - 1), (0, 2**63 - 1), (0, 2), (int(memory.phys(0)), 16)]
    with pytest.raises(DmaValueError, match="as long as"):
        engine.write(huge, b"x" * 16)
    with pytest.raises(DmaValueError, match="as long as"):
        engine.read_into(huge, bytearray(16))


@pytest.mark.parametrize("unit", [None, Iommu()])
def test_coherent_memory_of_any_size(unit: Iommu | None) -> None:
    memory = PhysMemory(PAGE)
    dev = Device(memory=memory, iommu=unit)
    for size in (*SIZES[:-1], 2**52 + 1, 2**51, 2**50):  # more than a process has addresses for
        with pytest.raises(DmaError):
            dev.alloc_coherent(size)
    with dev.alloc_coherent(PAGE) as small:  # and what was refused took no place
        assert int(small.phys) < 2**51
    assert not any(live(dev).values())


def test_unmapping_ends_at_the_top() -> None:
    dev = Device(iommu=Iommu())
    assert dev.backend.map_raw(HIGH, 1 << 40, PAGE) == 0
    assert dev.backend.map_raw(0, 1 << 41, PAGE) == 0
    assert dev.backend.unmap_raw(HIGH, 2 * PAGE) == PAGE
    assert dev.backend.iova_to_phys(0) == 1 << 41
    assert dev.backend.unmap_raw(0, PAGE) == PAGE
    assert dev.counters()["mapped_bytes"] == 0


def test_physical_address_0_is_one() -> None:
    dev = Device(iommu=Iommu())
    addr = dev.map_phys(0, PAGE)
    assert dev.backend.iova_to_phys(addr) == 0
    dev.unmap_phys(addr, PAGE)
    all_gone(dev)
    granted = Device(grants=GrantTable(4))
    pages = [granted.map_phys(0, PAGE) for _ in range(4)]
    assert len(set(pages)) == 4
    for addr in pages:
        granted.unmap_phys(addr, PAGE)
    assert not any(live(granted).values())


def test_what_cannot_be_stated_up_there() -> None:
    with pytest.raises(DmaValueError, match="ends at 2"):
        Device(dma_ranges=[(1 << 32, TOP - PAGE, 2 * PAGE)])
    with pytest.raises(DmaValueError, match="ends at 2"):
        Device(dma_ranges=[(TOP - PAGE, 0, 2 * PAGE)])
    Device(dma_ranges=[(1 << 32, TOP - PAGE, PAGE)])
    with pytest.raises(DmaValueError, match="ends at 2"):
        Fabric().root_complex(window=(1 << 40, 1 << 30), bus_offset=-(1 << 40) - PAGE)
    assert Fabric().root_complex(window=(1 << 40, 1 << 30), bus_offset=-(1 << 40) - (1 << 30)).bus_window[1] == LAST
    with pytest.raises(DmaValueError):
        PhysMemory(2**62)
    unit = Iommu()
    unit.advance(2**62)  # at once, whatever could have happened meanwhile
    with pytest.raises(DmaValueError, match="simulated time"):
        unit.advance(2**62)
    raw = Device(iommu=unit).backend
    for pages, limit in ((0, 1), (2**52 + 1, 1), (1, 2**52), (1, TOP)):
        with pytest.raises(DmaValueError):
            raw.alloc_raw(pages, limit)
    with pytest.raises(MappingError):
        Device(dma_ranges=[(1 << 32, TOP - PAGE, PAGE)]).map_phys((1 << 32) + 0xFFF, 1)  # all ones
