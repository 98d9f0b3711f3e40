"""Pages by index into a long-lived range: rows 69 and 70, and memory that moves."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import lazy, live, strict

from dmapath import (
    Device,
    DmaDebug,
    DmaEngine,
    DmaError,
    DmaFault,
    Fabric,
    HmmMap,
    Iommu,
    OdpRegion,
    PhysMemory,
    Swiotlb,
    hmm,
)

ErrnoOf = Callable[..., int]
PAGE = 4096


def test_one_allocation_and_a_link_for_each_page() -> None:
    dev = strict()
    before = live(dev)
    with HmmMap(dev, 1024) as pages:
        assert pages.has_iova
        assert (len(pages), pages.state_bytes) == (1024, 16)
        first = pages.map_pfn(0, 0x100000)
        assert pages.map_pfn(7, 0x555000) == first + 7 * PAGE
        c = dev.counters()
        assert (c["iova_allocs"], c["links"], c["syncs"], c["ptes_4k_live"]) == (1, 2, 2, 2)
        assert dev.backend.iova_to_phys(first + 7 * PAGE + 5) == 0x555005
        assert pages.flags(7) == hmm.VALID | hmm.WRITE | hmm.DMA_MAPPED
        assert (pages.unmap_pfn(7), pages.unmap_pfn(7), pages.unmap_pfn(3)) == (True, False, False)
        assert pages.flags(7) == hmm.VALID | hmm.WRITE
    assert live(dev) == before


def test_row_70_a_page_twice_is_one_link() -> None:
    dev = strict()
    with HmmMap(dev, 4) as pages:
        first = pages.map_pfn(1, 0x100000, write=False)
        assert not pages.flags(1) & hmm.WRITE
        assert pages.map_pfn(1, 0x100000) == first
        assert pages.flags(1) & hmm.WRITE  # more rights, no second link
        assert dev.counters()["links"] == 1


def test_row_69_a_device_that_once_bounced_and_others_that_may(errno_of: ErrnoOf) -> None:
    memory = PhysMemory(1 << 20)
    pool = Swiotlb(memory, slots=128)
    dev = strict(memory=memory, swiotlb=pool, untrusted=True)
    HmmMap(dev, 1).free()
    dev.unmap_phys(dev.map_phys(memory.phys(0x10), 16), 16)  # bounces
    assert errno_of(HmmMap, dev, 1) == errno.EOPNOTSUPP
    assert errno_of(HmmMap, strict(coherent=False), 1) == errno.EOPNOTSUPP
    assert errno_of(HmmMap, Device(memory=memory, dma_mask=2**32 - 1), 1) == errno.EOPNOTSUPP
    HmmMap(Device(memory=memory), 1).free()
    assert errno_of(HmmMap, dev.fresh(untrusted=False), 4, entry_size=3000) == errno.EINVAL


def test_without_an_iova_range_each_page_is_mapped_by_itself() -> None:
    full = strict(dma_mask=0xFFFF)
    with HmmMap(full, 64) as pages:  # 64 pages do not fit under the mask
        assert (pages.has_iova, pages.state_bytes) == (False, 64 * 8)
        a, b = pages.map_pfn(0, 0x100000), pages.map_pfn(1, 0x101000)
        assert full.counters()["maps"] == 2
        assert (pages.map_pfn(0, 0x100000), a == b) == (a, False)
    assert not any(live(full).values())
    direct = Device()
    with HmmMap(direct, 4) as pages:
        assert pages.map_pfn(2, 0x777000) == 0x777000
        assert (pages.state_bytes, pages.map_pfn(2, 0x777000)) == (0, 0x777000)


def test_failures_leave_the_page_unmapped() -> None:
    for nth in range(1, 20):
        dev = strict()
        pages = HmmMap(dev, 4)
        dev.backend.fail_nth(nth)
        try:
            pages.map_pfn(0, 0x100000)
        except DmaError as e:
            assert e.errno == errno.ENOMEM
            assert not pages.flags(0)
            pages.free()
            assert not any(live(dev).values())
            continue
        assert dev.backend.fail_nth(0) > 0
        assert nth > 1
        pages.free()
        return
    pytest.fail("never ran out of allocations")


def test_peers_give_their_bus_address_and_use_no_iova() -> None:
    memory = PhysMemory(1 << 20)
    switch = Fabric().root_complex(bus_offset=0x100000).port().switch()
    bar = switch.port().function("gpu").bar(memory, 4 * PAGE)
    dev = Device(iommu=Iommu(), memory=memory, pci=switch.port().function("nic"))
    with HmmMap(dev, 4) as pages:
        assert pages.map_pfn(1, bar.phys(PAGE)) == bar.bus(PAGE)
        assert pages.flags(1) & hmm.P2PDMA_BUS
        assert dev.counters()["links"] == 0
        assert pages.unmap_pfn(1)
    through = Device(iommu=Iommu(), memory=memory, pci=switch.port(acs=4).function("nic"))
    with HmmMap(through, 4) as pages:
        addr = pages.map_pfn(1, bar.phys(PAGE))
        assert pages.flags(1) & hmm.P2PDMA
        assert through.backend.prot_of(addr) & 0x10
    with HmmMap(Device(iommu=Iommu(), memory=memory), 4) as pages, pytest.raises(DmaError) as e:
        pages.map_pfn(0, bar.phys(0))
    assert e.value.errno == errno.EREMOTEIO


def test_bad_indices_and_dead_maps(errno_of: ErrnoOf) -> None:
    pages = HmmMap(strict(), 2)
    with pytest.raises(DmaError, match="0 to 1"):
        pages.map_pfn(2, 0)
    assert errno_of(pages.map_pfn, 0, 0x1234) == errno.EINVAL
    pages.free()
    with pytest.raises(DmaError, match="freed already"):
        pages.map_pfn(0, 0x1000)
    with pytest.raises(DmaError, match="freed already"):
        pages.free()


# ---- on-demand paging


@pytest.mark.parametrize("make", [strict, lazy, Device])
def test_pages_come_by_fault_and_go_when_the_memory_moves_them(make: Any) -> None:
    memory = PhysMemory(1 << 20, layout="scattered")
    memoryview(memory)[:] = os.urandom(len(memory))
    dev = make(memory=memory)
    engine = DmaEngine(dev)
    debug = dev.attach(DmaDebug())
    with OdpRegion(dev, memory, 0x10200, 8 * PAGE) as region:
        assert len(region.pages) == 9
        addrs = region.fault(0x10200, 2 * PAGE)
        assert len(addrs) == 3
        assert engine.read([(int(addrs[1]), PAGE)]) == bytes(memory)[0x11000:0x12000]
        old = memory.phys(0x11000)
        memory.migrate(0x11000, PAGE)
        assert memory.phys(0x11000) != old
        assert (region.invalidations, region.is_mapped(0x11000), region.is_mapped(0x10200)) == (1, False, True)
        with pytest.raises(DmaFault):
            engine.read([(int(addrs[1]), 1)])
        [again] = region.fault(0x11000)
        assert engine.read([(int(again), PAGE)]) == bytes(memory)[0x11000:0x12000]
        engine.write([(int(again), 4)], b"odp!")
        assert bytes(memory)[0x11000:0x11004] == b"odp!"
    dev.detach(debug)
    assert [r.check for r in debug.reports] == ["use-after-unmap"]  # the access above that faulted
    assert not any(v for k, v in live(dev).items() if k != "queued")


def test_a_device_without_a_notifier_is_left_with_nothing() -> None:
    """Why pages of an ordinary mapping must not move: this is what pinning prevents."""
    memory = PhysMemory(1 << 20)
    dev = strict(memory=memory)
    addr = dev.map_phys(memory.phys(0), PAGE)
    memory.migrate(0, PAGE)
    with pytest.raises(DmaFault, match="no memory behind"):
        DmaEngine(dev).read([(int(addr), 1)])
    dev.unmap_phys(addr, PAGE)


def test_outside_the_region_is_efault(errno_of: ErrnoOf) -> None:
    memory = PhysMemory(1 << 20)
    with OdpRegion(strict(memory=memory), memory, 0x4000, PAGE) as region:
        assert errno_of(region.fault, 0x5000) == errno.EFAULT
        assert errno_of(region.fault, 0x4FFF, 2) == errno.EFAULT
    with pytest.raises(DmaError):
        OdpRegion(strict(memory=memory), memory, len(memory), 1)
    with pytest.raises(DmaError):
        PhysMemory(1 << 21, layout="huge").migrate(0, PAGE)


def test_faults_and_invalidations_at_once() -> None:
    memory = PhysMemory(64 * PAGE, layout="scattered")
    dev = strict(memory=memory)
    wrong: list[BaseException] = []
    region = OdpRegion(dev, memory, 0, 64 * PAGE)

    def device() -> None:
        try:
            for i in range(400):
                region.fault(i * 5 % 64 * PAGE)
        except BaseException as e:
            wrong.append(e)

    def mover() -> None:
        try:
            for i in range(100):
                memory.migrate(i * 7 % 64 * PAGE, PAGE)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=f) for f in (device, device, mover)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong
    for i in range(64):  # every page that is mapped now is where the memory says
        if region.is_mapped(i * PAGE):
            addr = region.fault(i * PAGE)[0]
            assert dev.backend.iova_to_phys(addr) == memory.phys(i * PAGE)
    region.close()
    assert not any(live(dev).values())
