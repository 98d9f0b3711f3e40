"""Every allocation made to fail, in every op, until the op succeeds: nothing stays behind. And many threads at once."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import lazy, live, strict

from dmapath import Bio, Device, DmaEngine, DmaError, Iommu, MemoryRegion, PhysMemory, wrapper

FAR = [(0x100000000 + i * 0x40000000, 0x1000) for i in range(5)]  # no two in one table
GAPPED = [(p + 0x200, 0x400) for p, _ in FAR]
LARGE = [(0x40000000, 0x201000), (0x80000000, 0x3000)]


def unmap_sg(dev: Device) -> None:
    dev.unmap_sg(dev.map_sg(Bio(FAR)))


OPS: dict[str, Callable[[Device], Any]] = {
    "two-step": lambda d: d.map(Bio(FAR), "linux").unmap(),
    "gapped": lambda d: d.map(Bio(GAPPED)).unmap(),
    "per-range": lambda d: d.map(Bio(GAPPED), "linux").unmap(),
    "large": lambda d: d.map(Bio(LARGE)).unmap(),
    "many": lambda d: d.map(Bio([(0x100000 + i * 0x3000, 0x800) for i in range(600)])).unmap(),
    "umem": lambda d: d.map(MemoryRegion(FAR, length=5 * 4096), "linux").unmap(),
    "sg": unmap_sg,
    "map_phys": lambda d: d.unmap_phys(d.map_phys(0x100200, 0x400000), 0x400000),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("make", [strict, lazy, lambda: strict(forcedac=True, dma_mask=2**57 - 1)],
                         ids=["strict", "lazy", "57-bit"])  # fmt: skip
def test_every_failed_allocation_unwinds(name: str, make: Callable[[], Device]) -> None:
    for nth in range(1, 200):
        dev = make()
        before = live(dev)
        dev.backend.fail_nth(nth)
        try:
            OPS[name](dev)
        except DmaError:
            assert live(dev) == before, nth
            assert dev.backend.fail_nth(0) == 0
            OPS[name](dev)  # and it works right after
            if make is lazy:
                dev.backend.flush()
            assert live(dev) == before
            continue
        left = dev.backend.fail_nth(0)
        if make is lazy:
            dev.backend.flush()
        assert live(dev) == before
        if left:  # fewer than nth allocations were made: all have been through
            assert nth > 1
            return
    pytest.fail("the op never ran out of allocations to fail")


@pytest.mark.parametrize("name", ["per-range", "umem"])
def test_the_wrappers_own_allocations_unwind(name: str) -> None:
    dev = strict()
    before = live(dev)
    for nth in range(1, 10):
        wrapper.fail_nth(nth)
        try:
            OPS[name](dev)
        except DmaError as e:
            assert e.errno == errno.ENOMEM
            assert live(dev) == before
            continue
        assert wrapper.fail_nth(0) > 0
        assert nth > 1
        return
    pytest.fail("the wrapper never ran out of allocations to fail")


def test_a_magazine_that_cannot_be_had_frees_to_the_tree() -> None:
    dev = strict()
    states = [dev.iova_try_alloc(0, 0x1000) for _ in range(255)]
    for st in states[:254]:
        dev.iova_free(st)
    nodes = dev.backend.stats()["iova_nodes"]
    dev.backend.fail_nth(1)
    dev.iova_free(states[254])
    assert dev.backend.stats()["iova_nodes"] == nodes - 1
    assert not any(live(dev).values())


def test_creating_a_device_unwinds() -> None:
    for size in (4096, 1 << 21):
        Device(iommu=Iommu(page_sizes=(size,), reserved=[(0xFEE00000, 0xFEEFFFFF)]))


@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_threads_map_move_and_unmap_in_parallel(mode: Any) -> None:
    """Each thread has its own slice of memory and checks every byte of it, through one shared domain."""
    rounds, count = 150, 4
    memory = PhysMemory(count * 64 * 4096, layout="scattered", seed=9)
    dev = Device(iommu=Iommu(mode, cpus=2), memory=memory)
    engine = DmaEngine(dev)
    wrong: list[BaseException] = []

    def work(k: int) -> None:
        base = k * 64 * 4096
        try:
            for i in range(rounds):
                shift = (i * 37) % 900
                ranges = [(base + (j * 5 % 16) * 4 * 4096 + shift, 4096) for j in range(16)]
                policy: Any = "linux" if i % 3 == 0 else "unified"
                with dev.map(Bio.from_memory(memory, ranges, "read"), policy) as m:
                    data = bytes([(k * 50 + i) & 255]) * (16 * 4096)
                    engine.write(m.segments, data)
                with dev.map(Bio.from_memory(memory, ranges, "write"), policy) as m:
                    assert engine.read(m.segments) == data
                if mode == "lazy" and i % 20 == 0:
                    dev.iommu.advance(10_000_000)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong
    if mode == "lazy":
        dev.backend.flush()
    assert not any(live(dev).values())
    c = dev.counters()
    assert c["iova_allocs"] == c["iova_frees"]
    assert c["ptes_4k"] > 0
    assert dev.iommu.iotlb()["entries"] == 0


def test_more_threads_than_counter_cells_still_count_exactly() -> None:
    dev = strict()

    def work() -> None:
        for _ in range(20):
            dev.map(Bio([(0x100000, 0x1000)])).unmap()

    for _ in range(10):
        threads = [threading.Thread(target=work) for _ in range(10)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    c = dev.counters()
    assert (c["iova_allocs"], c["ptes_4k"], c["invalidations"]) == (2000, 2000, 2000)
