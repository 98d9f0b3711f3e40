"""Devices that do not see the CPU's caches: each sync that is forgotten gives wrong bytes, by the line."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dmapath import Bio, Device, DmaEngine, Iommu, PhysMemory, Swiotlb

PAGE, LINE = 4096, 64
BASE = 1 << 32
BACK_ENDS = [None, "strict", "lazy", "pool"]


def machine(how: str | None, **kw: Any) -> tuple[PhysMemory, Device, DmaEngine]:
    memory = PhysMemory(1 << 18, base=BASE)
    pool = Swiotlb(memory, slots=128, force=True) if how == "pool" else None
    unit = Iommu(how) if how in ("strict", "lazy") else None
    dev = Device(iommu=unit, memory=memory, swiotlb=pool, coherent=False, **kw)
    return memory, dev, DmaEngine(dev)


@pytest.mark.parametrize("how", BACK_ENDS)
@pytest.mark.parametrize("policy", ["linux", "unified"])
@pytest.mark.parametrize("shift", [0, 0x200, 0x33])
def test_requests_arrive_whole_both_ways(how: str | None, policy: str, shift: int) -> None:
    memory, dev, engine = machine(how)
    places = [(shift, PAGE), (0x3000 + shift, PAGE), (0x8000 + shift, 0x700)]
    memoryview(memory)[:] = os.urandom(len(memory))
    out = Bio.from_memory(memory, places, op="write")
    with dev.map(out, policy) as m:
        assert engine.read(m.segments) == b"".join(bytes(memory)[a : a + n] for a, n in places)
    data, before = os.urandom(out.total), bytes(memory)
    with dev.map(Bio.from_memory(memory, places, op="read"), policy) as m:
        engine.write(m.segments, data)
    want = bytearray(before)
    for a, n in places:
        want[a : a + n], data = data[:n], data[n:]
    assert bytes(memory) == bytes(want)


@pytest.mark.parametrize("how", BACK_ENDS)
def test_a_forgotten_sync_for_device_shows_the_device_old_bytes(how: str | None) -> None:
    memory, dev, engine = machine(how)
    memory.write(BASE, b"old" * 21)
    addr = dev.map_phys(BASE, 63)
    memory.write(BASE, b"new" * 21)
    assert engine.read([(int(addr), 63)]) == b"old" * 21
    dev.sync_for_device(addr, 63)
    assert engine.read([(int(addr), 63)]) == b"new" * 21
    dev.unmap_phys(addr, 63)


@pytest.mark.parametrize("how", BACK_ENDS)
def test_a_forgotten_sync_for_cpu_shows_the_cpu_old_bytes(how: str | None) -> None:
    memory, dev, engine = machine(how)
    memory.write(BASE, b"old" * 21)
    addr = dev.map_phys(BASE, 63)
    engine.write([(int(addr), 63)], b"dev" * 21)
    assert memory.read(BASE, 63) == b"old" * 21
    dev.sync_for_cpu(addr, 63)
    assert memory.read(BASE, 63) == b"dev" * 21
    dev.unmap_phys(addr, 63)


def test_coherent_devices_need_neither() -> None:
    memory = PhysMemory(PAGE, base=BASE)
    dev = Device(memory=memory)
    engine = DmaEngine(dev)
    addr = dev.map_phys(BASE, 8)
    memory.write(BASE, b"straight")
    assert engine.read([(int(addr), 8)]) == b"straight"
    engine.write([(int(addr), 8)], b"and back")
    assert memory.read(BASE, 8) == b"and back"


def test_unmap_that_skips_the_sync_leaves_the_cpu_with_old_bytes() -> None:
    memory, dev, engine = machine(None)
    addr = dev.map_phys(BASE, LINE, "from_device")
    engine.write([(int(addr), LINE)], b"\x77" * LINE)
    dev.unmap_phys(addr, LINE, "from_device", attrs="skip_cpu_sync")
    assert memory.read(BASE, LINE) == bytes(LINE)


def test_a_map_that_skips_the_sync_shows_the_device_what_ram_held() -> None:
    memory, dev, engine = machine("strict")
    memory.write(BASE, b"\x11" * LINE)
    addr = dev.map_phys(BASE, LINE, "to_device", attrs="skip_cpu_sync")
    assert engine.read([(int(addr), LINE)]) == bytes(LINE)
    dev.unmap_phys(addr, LINE, "to_device")


def test_lines_are_the_unit() -> None:
    memory, dev, engine = machine(None)
    memory.write(BASE, b"\x01" * 256)
    dev.map_phys(BASE + 100, 8)  # cleans the line of bytes 64 to 127 and no other
    whole = dev.map_phys(BASE, 256, attrs="skip_cpu_sync")
    assert engine.read([(int(whole), 256)]) == bytes(64) + b"\x01" * 64 + bytes(128)


def test_a_neighbour_in_the_same_line_that_the_cpu_writes_destroys_what_the_device_wrote() -> None:
    """Why buffers for DMA must not share lines: the 64-byte stale runs of KERNEL's oracle set."""
    memory, dev, engine = machine(None)
    addr = dev.map_phys(BASE, 32, "from_device")
    engine.write([(int(addr), 32)], b"\x77" * 32)
    memory.write(BASE + 32, b"mine")  # another's variable behind the buffer, while the device owns it
    dev.unmap_phys(addr, 32, "from_device")
    assert memory.read(BASE, 36) == bytes(32) + b"mine"


def test_a_line_that_is_evicted_over_the_devices_bytes() -> None:
    memory, dev, engine = machine(None)
    addr = dev.map_phys(BASE, LINE, "from_device")
    memory.write(BASE, b"x")  # the driver touches a buffer that the device owns
    engine.write([(int(addr), LINE)], b"\x77" * LINE)
    memory.evict()
    dev.unmap_phys(addr, LINE, "from_device")
    assert memory.read(BASE, LINE) == b"x" + bytes(LINE - 1)


def test_eviction_harms_nobody_who_keeps_the_rules() -> None:
    memory, dev, engine = machine("strict")
    memory.write(BASE, b"\x05" * PAGE)
    addr = dev.map_phys(BASE, PAGE, "from_device")
    memory.evict()
    engine.write([(int(addr), PAGE)], b"\x77" * PAGE)
    memory.evict()
    dev.unmap_phys(addr, PAGE, "from_device")
    assert memory.read(BASE, PAGE) == b"\x77" * PAGE


def test_a_synced_range_of_the_two_steps_is_maintained_where_it_lies() -> None:
    memory, dev, engine = machine("strict")
    state = dev.iova_try_alloc(0, 2 * PAGE)
    dev.iova_link(state, BASE + 0x5000, 0, PAGE)
    dev.iova_link(state, BASE + 0x1000, PAGE, PAGE)
    dev.iova_sync(state, 0, 2 * PAGE)
    memory.write(BASE + 0x1000, b"\x22" * PAGE)
    dev.sync_for_device(int(state.addr) + PAGE, PAGE)
    assert engine.read([(int(state.addr) + PAGE, PAGE)]) == b"\x22" * PAGE
    engine.write([(int(state.addr), 2 * PAGE)], b"\x33" * (2 * PAGE))
    dev.sync_for_cpu(int(state.addr), 2 * PAGE)
    assert memory.read(BASE + 0x5000, PAGE) == memory.read(BASE + 0x1000, PAGE) == b"\x33" * PAGE
    dev.iova_destroy(state, 2 * PAGE)


def test_a_coherent_device_beside_one_that_is_not() -> None:
    memory, dev, engine = machine(None)
    friend = Device(memory=memory)
    DmaEngine(friend).write([(BASE, 16)], b"from the friend!")
    addr = dev.map_phys(BASE, 16, "to_device")
    assert engine.read([(int(addr), 16)]) == b"from the friend!"
    dev.unmap_phys(addr, 16, "to_device")
