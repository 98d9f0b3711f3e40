"""Coherent memory: rings that both sides see without a sync, on every kind of device."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from conftest import live

from dmapath import Device, DmaEngine, DmaError, GrantTable, Iommu, PhysMemory, Swiotlb, XenDomain

PAGE = 4096


def devices() -> dict[str, Device]:
    def make(**kw: Any) -> Device:
        memory = PhysMemory(1 << 20)
        if "pool" in kw:
            kw["swiotlb"] = Swiotlb(memory, slots=256, **kw.pop("pool"))
        if kw.pop("xen", False):
            kw["swiotlb"] = Swiotlb(memory, slots=256)
            kw["xen"] = XenDomain(memory, pool=kw["swiotlb"])
        return Device(memory=memory, **kw)

    return {
        "direct": make(),
        "32-bit": make(dma_mask=2**32 - 1),
        "20-bit": make(dma_mask=2**20 - 1),
        "offset": make(dma_ranges=[(1 << 50, 1 << 45, 1 << 40)]),
        "force": make(pool={"force": True}),
        "restricted": make(pool={"restricted": True}),
        "strict": make(iommu=Iommu()),
        "lazy": make(iommu=Iommu("lazy"), dma_mask=2**32 - 1),
        "untrusted": make(iommu=Iommu(), untrusted=True, pool={}, min_align_mask=0xFFF),
        "non-coherent": make(coherent=False),
        "non-coherent-iommu": make(coherent=False, iommu=Iommu()),
        "xen": make(xen=True),
        "xen-32-bit": make(xen=True, dma_mask=2**32 - 1),
        "grant": make(grants=GrantTable()),
    }


@pytest.mark.parametrize("name", sorted(devices()))
def test_both_sides_see_it_without_a_sync(name: str) -> None:
    dev = devices()[name]
    engine, before, frames = DmaEngine(dev), live(dev), dev.memory.frames
    with dev.alloc_coherent(2 * PAGE - 1) as ring:
        assert len(ring) == 2 * PAGE
        assert int(ring.addr) + len(ring) - 1 <= dev.dma_mask
        with memoryview(ring) as view:
            assert bytes(view) == bytes(2 * PAGE)
            view[PAGE - 2 : PAGE + 2] = b"ring"  # across its frames
            assert engine.read([(int(ring.addr) + PAGE - 2, 4)]) == b"ring"
            engine.write([(int(ring.addr), 4)], b"done")
            assert bytes(view[:4]) == b"done"
        assert dev.memory.read(ring.phys, 4) == b"done"
    if name == "lazy":
        dev.backend.flush()
    assert (live(dev), dev.memory.frames) == (before, frames)
    assert dev.swiotlb is None or dev.swiotlb.used == 0


def test_a_restricted_pool_gives_it_from_its_slots() -> None:
    dev = devices()["restricted"]
    with dev.alloc_coherent(PAGE) as ring:
        assert int(ring.addr) in dev.swiotlb
        assert dev.swiotlb.used == 2
    with pytest.raises(DmaError, match="no room"):
        dev.alloc_coherent(1 << 20)


def test_what_it_refuses() -> None:
    with pytest.raises(DmaError, match="with a memory"):
        Device().alloc_coherent(PAGE)
    dev = devices()["direct"]
    ring = dev.alloc_coherent(PAGE)
    view = memoryview(ring)
    with pytest.raises(DmaError, match="a view of it is held"):
        ring.free()
    view.release()
    ring.free()
    with pytest.raises(DmaError, match="freed already"):
        ring.free()
    with pytest.raises(DmaError):
        memoryview(ring)
    with pytest.raises(DmaError) as e:
        devices()["20-bit"].alloc_coherent(2 << 20)
    assert e.value.errno == errno.ENOMEM
    small = Device(memory=PhysMemory(1 << 20), grants=GrantTable(1))
    with pytest.raises(DmaError):
        small.alloc_coherent(2 * PAGE)
    assert not any(live(small).values())


def test_one_that_is_dropped_gives_everything_back() -> None:
    import gc

    dev = devices()["strict"]
    before = live(dev)
    dev.alloc_coherent(PAGE)
    gc.collect()
    assert live(dev) == before
