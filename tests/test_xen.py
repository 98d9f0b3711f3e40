"""Xen: machine frames, foreign pages and grants; rows 71 to 73."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from dmapath import (
    Bio,
    Device,
    DmaEngine,
    DmaError,
    DmaFault,
    GrantTable,
    HostBuffer,
    PhysMemory,
    Swiotlb,
    XenDomain,
)
from dmapath.request import iterate

ErrnoOf = Callable[..., int]
PAGE = 4096


def guest(layout: str = "scattered", **kw: Any) -> tuple[PhysMemory, Swiotlb, XenDomain, Device]:
    memory = PhysMemory(1 << 20)
    pool = Swiotlb(memory, slots=512)
    xen = XenDomain(memory, pool=pool, layout=layout, **{k: kw.pop(k) for k in ("arm",) if k in kw})
    memoryview(memory)[:] = os.urandom(len(memory))
    return memory, pool, xen, Device(memory=memory, swiotlb=pool, xen=xen, **kw)


def test_row_71_two_pages_apart_in_the_machine_bounce_and_one_does_not() -> None:
    memory, pool, xen, dev = guest()
    one = dev.map_phys(memory.phys(0x200), 0x800)
    assert one == xen.machine(memory.phys(0x200))
    assert pool.used == 0
    two = dev.map_phys(memory.phys(0x200), PAGE)  # reaches into the next frame
    assert pool.used == 2
    behind = xen.phys(int(two))
    assert behind is not None
    assert behind in pool
    for n in (one, 0x800), (two, PAGE):
        assert DmaEngine(dev).read([(int(n[0]), n[1])]) == bytes(memory)[0x200 : 0x200 + n[1]]
        dev.unmap_phys(*n)
    assert pool.used == 0


def test_frames_in_order_need_no_bounce() -> None:
    memory, pool, _, dev = guest("contiguous")
    addr = dev.map_phys(memory.phys(0x200), 8 * PAGE)
    assert (pool.used, DmaEngine(dev).read([(int(addr), 8 * PAGE)])) == (0, bytes(memory)[0x200 : 0x200 + 8 * PAGE])
    dev.unmap_phys(addr, 8 * PAGE)


def test_row_72_neighbours_in_memory_that_are_none_in_the_machine_do_not_merge() -> None:
    for layout, want in (("scattered", 2), ("contiguous", 1)):
        memory, pool, _, dev = guest(layout)
        bio = Bio([(memory.phys(0), PAGE), (memory.phys(PAGE), PAGE)], op="write")
        assert len(iterate(bio, dev)) == want
        for policy in ("linux", "unified"):
            with dev.map(bio, policy) as m:
                assert (len(m), m.layout, pool.used) == (want, "direct", 0)
                assert DmaEngine(dev).read(m.segments) == bytes(memory)[: 2 * PAGE]
    inside = Bio([(memory.phys(0), 0x200), (memory.phys(0x200), 0x200)])
    assert len(iterate(inside, dev)) == 1  # one frame is always in order


def test_one_long_vector_bounces_whole_and_comes_back() -> None:
    memory, pool, _, dev = guest()
    bio = Bio([(memory.phys(0x100), 3 * PAGE)], op="read")
    with dev.map(bio) as m:
        assert (m.layout, m.case, len(m)) == ("bounced", "swiotlb-single", 1)
        DmaEngine(dev).write(m.segments, b"\x5a" * (3 * PAGE))
    assert bytes(memory)[0x100 : 0x100 + 3 * PAGE] == b"\x5a" * (3 * PAGE)
    assert pool.used == 0


def test_map_sg_maps_entry_by_entry() -> None:
    memory, pool, _, dev = guest()
    segs = dev.map_sg(Bio([(memory.phys(0), PAGE), (memory.phys(0x2200), PAGE)]))
    assert (len(segs), pool.used) == (2, 2)
    dev.unmap_sg(segs)
    assert pool.used == 0


def test_no_iova_and_no_merging() -> None:
    _, _, _, dev = guest()
    assert dev.iova_try_alloc(0, PAGE) is None
    assert dev.merge_boundary == 0
    assert repr(dev) == "Device(xen)"


def test_a_resource_keeps_its_address() -> None:
    _, _, _, dev = guest()
    assert dev.map_phys(0xFE000000, PAGE, attrs="mmio") == 0xFE000000
    dev.unmap_phys(0xFE000000, PAGE, attrs="mmio")


def test_a_device_of_32_bits_bounces_below_4_gib() -> None:
    memory, pool, _, dev = guest(dma_mask=2**32 - 1)
    with dev.map(Bio(memory.vecs(0, PAGE), op="write")) as m:
        assert (pool.used, m.segments[0].addr < 2**32) == (2, True)
        assert DmaEngine(dev).read(m.segments) == bytes(memory)[:PAGE]


def test_a_foreign_page_is_the_other_guests() -> None:
    memory, pool, xen, dev = guest()
    theirs = PhysMemory(4 * PAGE, base=1 << 33)
    other = XenDomain(theirs, base=1 << 41)
    at = memory.phys(5 * PAGE)
    with pytest.raises(DmaError, match="balloon it out"):
        xen.map_foreign(at, other, theirs.phys(0))
    xen.balloon_out(at)
    with pytest.raises(DmaError):
        dev.map_phys(at, 16)  # nothing is there
    xen.map_foreign(at, other, theirs.phys(PAGE))
    assert xen.is_foreign(at)
    with dev.map(Bio([(at, PAGE)], op="read")) as m:
        assert (m.segments[0].addr, pool.used) == (other.machine(theirs.phys(PAGE)), 0)
        DmaEngine(dev).write(m.segments, b"\x17" * PAGE)
    assert bytes(theirs)[PAGE : 2 * PAGE] == b"\x17" * PAGE
    xen.unmap_foreign(at)
    with pytest.raises(DmaError) as e:
        xen.unmap_foreign(at)
    assert e.value.errno == errno.EINVAL


def test_a_foreign_frame_with_a_pool_frames_number_is_not_un_bounced() -> None:
    memory, pool, xen, dev = guest()
    theirs = PhysMemory(PAGE, base=1 << 33)
    # the other guest's page has a number that, taken for one of ours, lies in the pool
    other = XenDomain(theirs, base=1 << 42)
    at = memory.phys(0)
    xen.balloon_out(at)
    xen.map_foreign(at, other, theirs.phys(0))
    addr = dev.map_phys(at, 64)
    dev.unmap_phys(addr, 64)  # would release a slot that nobody has
    assert pool.counters()["bounces"] == pool.used == 0


def test_on_arm_foreign_pages_bounce_for_devices_that_are_not_coherent() -> None:
    for arm, used in ((True, 1), (False, 0)):
        memory, pool, xen, dev = guest(coherent=False, arm=arm)
        theirs = PhysMemory(PAGE, base=1 << 33)
        xen.balloon_out(memory.phys(0))
        xen.map_foreign(memory.phys(0), XenDomain(theirs, base=1 << 41), theirs.phys(0))
        addr = dev.map_phys(memory.phys(0), 64)
        assert pool.used == used
        dev.unmap_phys(addr, 64)


def test_buffers_are_backed_when_asked() -> None:
    memory, _, xen, dev = guest()
    with HostBuffer(bytearray(b"q" * 3 * PAGE), memory) as buffer:
        run = buffer.vecs(0, 1)[0]
        with pytest.raises(DmaError):
            dev.map_phys(*run)
        xen.populate([(int(p) & ~(PAGE - 1), PAGE) for p, _ in buffer.vecs()])
        addr = dev.map_phys(*run)
        assert DmaEngine(dev).read([(int(addr), 1)]) == b"q"
        dev.unmap_phys(addr, 1)


# ---- grants


def granted(entries: int = 64) -> tuple[PhysMemory, GrantTable, Device]:
    memory = PhysMemory(1 << 20, layout="scattered")
    table = GrantTable(entries)
    return memory, table, Device(memory=memory, grants=table)


def test_a_granted_address_is_bit_63_and_a_reference() -> None:
    memory, table, dev = granted()
    addr = dev.map_phys(memory.phys(0x234), 16)
    assert int(addr) == 1 << 63 | 1 << 12 | 0x234
    assert table.used == 1
    more = dev.map_phys(memory.phys(0), 3 * PAGE)
    assert int(more) == 1 << 63 | 2 << 12
    dev.unmap_phys(addr, 16)
    dev.unmap_phys(more, 3 * PAGE)
    assert table.used == 0


def test_granted_bytes_both_ways_and_nothing_else() -> None:
    memory, table, dev = granted()
    memoryview(memory)[:] = os.urandom(len(memory))
    engine = DmaEngine(dev)
    bio = Bio.from_memory(memory, [(0x200, 0x600), (0x5000, PAGE)], op="write")
    with dev.map(bio) as m:
        assert engine.read(m.segments) == bytes(memory)[0x200:0x800] + bytes(memory)[0x5000:0x6000]
        with pytest.raises(DmaFault, match="no write permission"):
            engine.write(m.segments, bytes(0x1600))
    with pytest.raises(DmaFault, match="not present"):
        engine.read(m.segments)
    with pytest.raises(DmaFault):
        engine.read([(int(memory.phys(0)), 16)])  # a physical address is none of its addresses
    assert table.used == 0


def test_row_73_a_grant_that_is_still_mapped_breaks_the_device(errno_of: ErrnoOf) -> None:
    memory, table, dev = granted()
    addr = dev.map_phys(memory.phys(0), PAGE)
    table.hold(addr)
    assert errno_of(dev.unmap_phys, addr, PAGE) == errno.ENODEV
    assert table.broken
    with pytest.raises(DmaError):
        dev.map_phys(memory.phys(0), PAGE)
    assert table.used == 1  # it was not taken back


def test_what_grants_refuse(errno_of: ErrnoOf) -> None:
    memory, table, dev = granted(4)
    with pytest.raises(DmaError, match="64 bits"):
        Device(memory=memory, grants=GrantTable(), dma_mask=2**40 - 1)
    with pytest.raises(DmaError):
        dev.map_phys(memory.phys(0), PAGE, attrs="mmio")
    with pytest.raises(DmaError):
        dev.map_phys(memory.phys(0), 5 * PAGE)
    held = dev.map_phys(memory.phys(0), 2 * PAGE)
    assert errno_of(dev.map_sg, Bio([(memory.phys(0), PAGE), (memory.phys(0x2000), 2 * PAGE)])) == errno.EIO
    assert table.used == 2
    dev.unmap_phys(held, 2 * PAGE)
    with pytest.raises(DmaError):
        table.hold(held)
    with pytest.raises(DmaError, match="at most one of"):
        Device(memory=memory, grants=table, xen=XenDomain(memory))
