"""The life of a Mapping: only ``next`` and iteration map, ``unmap`` takes back what was mapped, what is unknown says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import live, strict

from dmapath import (
    Bio,
    Device,
    DmaDebug,
    DmaError,
    FaultInjector,
    Iommu,
    Mapping,
    NoMemoryError,
    PhysMemory,
    StateError,
    Swiotlb,
)

UNALIGNED = [((1 << 32) + 0x200 + i * 0x3000, 0x600) for i in range(8)]
LOOKS: dict[str, Callable[[Mapping], Any]] = {
    "segments": lambda m: m.segments,
    "len": len,
    "bool": bool,
    "case": lambda m: m.case,
    "layout": lambda m: m.layout,
    "rules": lambda m: m.rules,
    "unmap_state_bytes": lambda m: m.unmap_state_bytes,
    "repr": repr,
    "sync_for_cpu": lambda m: m.sync_for_cpu(),
    "sync_for_device": lambda m: m.sync_for_device(),
    "iter": iter,
}


def devices() -> dict[str, tuple[Device, Any]]:
    """Name -> a device whose mappings map segment by segment, and the policy."""
    memory = PhysMemory(1 << 20, base=1 << 32)
    return {
        "per range": (strict(), "linux"),
        "non-coherent": (strict(coherent=False), "unified"),
        "direct": (Device(), "unified"),
        "pool": (Device(memory=memory, swiotlb=Swiotlb(memory, slots=512)), "unified"),
        "forced": (Device(memory=memory, swiotlb=Swiotlb(memory, slots=512, force=True, base=1 << 31)), "unified"),
    }


@pytest.mark.parametrize("name", ["per range", "non-coherent", "direct", "pool", "forced"])
@pytest.mark.parametrize("asked", [0, 1, 7])
def test_looking_and_unmapping_do_not_map(name: str, asked: int) -> None:
    dev, policy = devices()[name]
    m = dev.map_start(Bio(UNALIGNED), policy)
    for _ in range(asked):
        assert m.next() is not None
    before = dev.counters()
    for look in LOOKS.values():
        try:
            look(m)
        except StateError as e:
            assert "not read yet" in str(e)
    changed = {k for k, v in dev.counters().items() if v != before[k]}
    assert changed <= {"cache_clean_bytes", "cache_inval_bytes", "barriers"}  # the syncs
    m.unmap()
    assert dev.counters()["maps"] == before["maps"]
    assert len(m) == len(m.segments) == asked
    assert not any(live(dev).values())


@pytest.mark.parametrize("name", ["per range", "non-coherent", "direct", "pool", "forced"])
def test_what_was_told_before_stays_true(name: str) -> None:
    dev, policy = devices()[name]
    m = dev.map_start(Bio(UNALIGNED), policy)
    told: list[dict[str, Any]] = []
    for _ in range(9):
        now: dict[str, Any] = {}
        for look in ("layout", "case", "rules"):
            try:
                now[look] = LOOKS[look](m)
            except StateError:
                now[look] = None
        told.append(now)
        m.next()
    assert all(last is not None for last in told[-1].values()) or m.next() is None
    final = {look: LOOKS[look](m) for look in ("layout", "case", "rules")}
    for now in told:
        assert all(value in (None, final[look]) for look, value in now.items()), (now, final)
    m.unmap()
    assert {look: LOOKS[look](m) for look in final} == final
    whole = dev.map(Bio(UNALIGNED), policy)
    assert {look: LOOKS[look](whole) for look in final} == final
    whole.unmap()


def test_a_bounced_mapping_never_says_direct() -> None:
    memory = PhysMemory(1 << 20, base=(1 << 32) - (1 << 19))  # half of it is out of the device's reach
    dev = Device(memory=memory, dma_mask=2**32 - 1, swiotlb=Swiotlb(memory, slots=512))
    m = dev.map_start(Bio([((1 << 32) - 0x2000, 0x1000), (1 << 32, 0x1000)]))
    for used in (0, 0):
        assert dev.swiotlb.used == used
        for look in ("layout", "case", "rules"):
            with pytest.raises(StateError, match="not read yet"):
                LOOKS[look](m)
        assert "direct" not in repr(m)
        m.next()
    assert (dev.swiotlb.used, m.layout) == (2, "bounced")
    while m.next() is not None:
        pass
    assert (m.layout, m.case, m.unmap_state_bytes) == ("bounced", "swiotlb-multi", 16)
    m.unmap()
    assert (m.layout, m.case, m.unmap_state_bytes) == ("bounced", "swiotlb-multi", 16)


def test_one_iova_range_is_known_at_once() -> None:
    dev = strict()
    m = dev.map_start(Bio(UNALIGNED))
    assert (m.layout, m.case, m.unmap_state_bytes, len(m)) == ("gapped", "iommu-unaligned", 16, 8)
    m.unmap()
    assert len(m.segments) == 8
    m = dev.map_start(Bio(UNALIGNED))
    m.unmap()
    assert (m.layout, m.case, m.unmap_state_bytes) == ("gapped", "iommu-unaligned", 16)
    for look in ("segments", "len", "rules"):
        with pytest.raises(StateError, match="before its segments were read"):
            LOOKS[look](m)


def test_a_small_aperture_does_not_fail_at_unmap() -> None:
    dev = Device(iommu=Iommu(aperture=(0x10000, 0x11FFF)))
    m = dev.map_start(Bio(UNALIGNED), "linux")
    assert m.next() is not None
    m.unmap()
    with pytest.raises(KeyError) as e, dev.map_start(Bio(UNALIGNED), "linux") as m:
        m.next()
        raise KeyError("the block's own")
    assert not getattr(e.value, "__notes__", [])
    assert not any(live(dev).values())


def test_a_block_keeps_its_own_error_and_gets_a_note() -> None:
    for own in (KeyError("own"), KeyboardInterrupt()):
        dev = strict()
        faults = dev.attach(FaultInjector())
        with pytest.raises(type(own)) as e, dev.map(Bio(UNALIGNED)):
            faults.fail_nth("iova_unlink", 1)
            raise own
        assert e.value is own
        [note] = e.value.__notes__
        assert "with block" in note
    dev = strict()
    faults = dev.attach(FaultInjector())
    with pytest.raises(DmaError), dev.map(Bio(UNALIGNED)):  # without one it is the error
        faults.fail_nth("iova_unlink", 1)


@pytest.mark.parametrize("start", [Device.map, Device.map_start])
@pytest.mark.parametrize("name", ["per range", "direct", "forced"])
def test_nothing_hands_out_addresses_after_the_end(name: str, start: Any) -> None:
    dev, policy = devices()[name]
    with DmaDebug(dev):
        m = start(dev, Bio(UNALIGNED), policy)
        early = iter(m)
        segments = [next(early), next(early)]
        m.unmap()
        for use in (m.next, lambda: next(early), lambda: list(m), m.sync_for_cpu, m.sync_for_device, m.unmap, m.__enter__):
            with pytest.raises(StateError, match="already"):
                use()
        assert m.segments[:2] == segments


def test_iteration_maps_one_by_one_and_list_takes_all() -> None:
    dev = Device(iommu=Iommu())
    m = dev.map_start(Bio(UNALIGNED), "linux")
    for _ in m:
        break
    assert dev.counters()["maps"] == 1
    assert list(m) == [*m] == m.segments
    assert dev.counters()["maps"] == 8
    m.unmap()


def test_a_failed_next_ends_it() -> None:
    dev = Device(dma_mask=2**32 - 1)
    m = dev.map_start(Bio([(0x1000, 0x1000), (1 << 32, 0x1000)]))
    with pytest.raises(NoMemoryError):
        list(m)
    with pytest.raises(StateError, match="already"):
        m.next()
    assert len(m.segments) == 1
