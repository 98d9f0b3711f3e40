"""Devices whose IOVA ends at 2**64, in every kind of domain."""

from __future__ import annotations

from typing import Any

from conftest import live

from dmapath import Device, Iommu, PhysMemory, Swiotlb

PAGE = 4096
TOP = 2**64
LAST = TOP - 1
HIGH = TOP - PAGE

KINDS: dict[str, dict[str, Any]] = {
    "strict": {},
    "lazy": {"mode": "lazy"},
    "caching": {"caching_mode": True},
    "non-coherent": {"coherent": False},
    "untrusted": {"untrusted": True},
    "untrusted, non-coherent, caching": {"untrusted": True, "coherent": False, "caching_mode": True},
    "2 MiB granule": {"page_sizes": (1 << 21, 1 << 30)},
    "arm": {"format": "arm"},
}


def device(kind: str, aperture: tuple[int, int] = (0, LAST), size: int = 1 << 20) -> tuple[Device, PhysMemory]:
    how = dict(KINDS[kind])
    memory = PhysMemory(size, layout="huge" if "page_sizes" in how else "contiguous")
    pool = Swiotlb(memory, slots=512) if "untrusted" in how else None
    unit = Iommu(how.pop("mode", "strict"), aperture=aperture,
                 **{k: how.pop(k) for k in ("caching_mode", "page_sizes", "format") if k in how})  # fmt: skip
    return Device(iommu=unit, memory=memory, forcedac=True, swiotlb=pool, min_align_mask=0xFFF, **how), memory


def all_gone(dev: Device) -> None:
    assert dev.iommu is not None
    dev.iommu.advance(10_000_000)
    assert not any(live(dev).values())
    assert all(n >= 0 for n in dev.counters().values())
    assert dev.swiotlb is None or dev.swiotlb.used == 0
