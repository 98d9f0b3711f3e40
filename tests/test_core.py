"""Of the page table and the pools: what no other test noticed when scripts/mutate changed it."""

from __future__ import annotations

import errno
import resource

import pytest

from dmapath import Device, Iommu, PhysMemory, Swiotlb

LARGE, HUGE = 1 << 21, 1 << 30


@pytest.mark.parametrize("used", [0, 0x1000, LARGE - 0x1000])
def test_a_large_page_over_a_table_in_use_is_refused(used: int) -> None:
    """A table that holds any entry, at any depth, is not replaced by a leaf (iommu_map: EADDRINUSE)."""
    base = HUGE
    for size in (LARGE, HUGE):
        back = Device(iommu=Iommu()).backend
        assert back.map_raw(base + used, 0x5000, 0x1000) == 0
        assert back.map_raw(base, HUGE, size) == -errno.EADDRINUSE
        assert int(back.iova_to_phys(base + used)) == 0x5000
        assert back.unmap_raw(base + used, 0x1000) == 0x1000
        assert back.map_raw(base, HUGE, size) == 0  # empty tables are
        assert int(back.iova_to_phys(base + used)) == HUGE + used


def test_a_huge_page_over_a_large_one_is_refused() -> None:
    back = Device(iommu=Iommu()).backend
    assert back.map_raw(HUGE + LARGE, HUGE, LARGE) == 0
    assert back.map_raw(HUGE, HUGE, HUGE) == -errno.EADDRINUSE
    assert back.counters()["ptes_2m_live"] == 1


def _full_pool() -> tuple[PhysMemory, Device, list[int]]:
    memory = PhysMemory(1 << 20)
    pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
    dev = Device(memory=memory, swiotlb=pool)
    held = [int(dev.map_phys(memory.phys(0), 2048, "to_device")) for _ in range(128)]
    assert pool.used == 128
    return memory, dev, held


def test_slots_of_pools_that_grew_are_counted() -> None:
    memory, dev, held = _full_pool()
    held += [int(dev.map_phys(memory.phys(0), 2048, "to_device")) for _ in range(5)]
    assert dev.swiotlb.used == 133
    for addr in held:
        dev.unmap_phys(addr, 2048, "to_device")
    assert dev.swiotlb.used == 0


def test_pools_of_one_mapping_give_their_memory_back() -> None:
    """A full pool that may not grow for good serves each large mapping from a pool of its own, and frees it at the unmap."""
    memory = PhysMemory(1 << 20)
    pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
    dev = Device(memory=memory, swiotlb=pool)

    def once() -> None:
        big = [int(dev.map_phys(memory.phys(0), 200 << 10, "to_device")) for _ in range(2)]
        for addr in big:
            dev.unmap_phys(addr, 200 << 10, "to_device")

    for _ in range(20):
        once()
    frames, before = memory.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        once()
    assert memory.frames == frames
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB; 300 pools would be 60 MiB
