"""The back end that helps nobody: right drivers work on it, and each wrong habit shows."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmapath import Adversary, Bio, Device, DmaDebug, DmaEngine, DmaError, DmaFault, MemoryRegion, PhysMemory

PAGE = 4096
BASE = 1 << 32


def machine(seed: int = 0, **kw: Any) -> tuple[PhysMemory, Device, DmaEngine, Adversary]:
    memory = PhysMemory(1 << 20, layout="scattered", seed=2)
    limits = {k: kw.pop(k) for k in list(kw) if k not in ("refuse", "cut")}
    adversary = Adversary(seed, **kw)
    dev = Device(backend=adversary, memory=memory, **limits)
    return memory, dev, DmaEngine(dev), adversary


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), policy=st.sampled_from(["linux", "unified"]), data=st.data())
def test_a_right_driver_gets_every_byte_both_ways(seed: int, policy: str, data: st.DataObject) -> None:
    # Linux links pieces as its segment limits cut them, so by its policy a cut inside a granule cannot be linked
    memory, dev, engine, _ = machine(seed, cut=0 if policy == "linux" else None)
    ranges, at = [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        at += data.draw(st.integers(0, 9000))
        n = data.draw(st.sampled_from([1, 100, 0x600, PAGE, 2 * PAGE, 9999]))
        ranges.append((at, n))
        at += n
    memoryview(memory)[:] = before = os.urandom(len(memory))
    with DmaDebug(dev):
        with dev.map(Bio.from_memory(memory, ranges, "write"), policy) as m:
            assert engine.read(m.segments) == b"".join(before[a : a + n] for a, n in ranges)
        fresh = os.urandom(sum(n for _, n in ranges))
        with dev.map(Bio.from_memory(memory, ranges, "read"), policy) as m:
            engine.write(m.segments, fresh)
    want = bytearray(before)
    for a, n in ranges:
        want[a : a + n], fresh = fresh[:n], fresh[n:]
    assert bytes(memory) == bytes(want)
    c = dev.counters()
    assert (c["iova_live"], c["bounces_live"], c["mapped_bytes"]) == (0, 0, 0)


def test_addresses_are_unlike_memory_and_never_come_twice() -> None:
    memory, dev, _, _ = machine(min_align_mask=0xFF)
    seen = set()
    for _ in range(50):
        addr = dev.map_phys(memory.phys(0x123), 16)
        assert int(addr) & 0xFF == 0x23
        assert int(addr) != memory.phys(0x123)
        seen.add(int(addr))
        dev.unmap_phys(addr, 16)
    assert len(seen) == 50
    assert len({a & 0xFFF for a in seen}) > 5  # a driver must not take the page offset for kept


def test_the_cpu_sees_nothing_before_a_sync() -> None:
    memory, dev, engine, _ = machine()
    addr = dev.map_phys(memory.phys(0), 8)
    engine.write([(int(addr), 8)], b"from dev")
    assert memory.read(memory.phys(0), 8) == bytes(8)
    dev.sync_for_cpu(addr, 8)
    assert memory.read(memory.phys(0), 8) == b"from dev"
    memory.write(memory.phys(0), b"from cpu")
    assert engine.read([(int(addr), 8)]) == b"from dev"
    dev.sync_for_device(addr, 8)
    assert engine.read([(int(addr), 8)]) == b"from cpu"
    dev.unmap_phys(addr, 8)


def test_links_without_a_sync_and_addresses_after_unmap_fault() -> None:
    memory, dev, engine, _ = machine(refuse=0)
    state = dev.iova_try_alloc(0, PAGE)
    dev.iova_link(state, memory.phys(0), 0, PAGE)
    with pytest.raises(DmaFault):
        engine.read([(int(state.addr), 4)])
    dev.iova_sync(state, 0, PAGE)
    engine.read([(int(state.addr), 4)])
    dev.iova_destroy(state, PAGE)
    with pytest.raises(DmaFault):
        engine.read([(int(state.addr), 4)])


def test_directions_are_meant() -> None:
    memory, dev, engine, _ = machine()
    for direction, verb in (("to_device", "write"), ("from_device", "read")):
        addr = dev.map_phys(memory.phys(0), 4, direction)
        with pytest.raises(DmaFault):
            _ = engine.write([(int(addr), 4)], b"1234") if verb == "write" else engine.read([(int(addr), 4)])
        dev.unmap_phys(addr, 4, direction)


def test_ranges_are_refused_now_and_then_and_segments_cut() -> None:
    memory, dev, _, _ = machine(7, cut=0x600)
    layouts, lengths = set(), set()
    for _ in range(40):
        with dev.map(Bio.from_memory(memory, [(0, 8 * PAGE)], "write")) as m:
            layouts.add(m.layout)
            lengths |= {s.length for s in m}
    assert layouts >= {"per-range", "linear"}
    assert any(n % PAGE for n in lengths)
    whole = machine(7, virt_boundary=0xFFF)[1]
    with whole.map(Bio.from_memory(memory, [(0, 8 * PAGE)], "write")) as m:
        assert all(s.length % PAGE == 0 for s in m)


def test_what_must_stay_coherent_is_refused() -> None:
    memory, dev, _, _ = machine()
    with pytest.raises(DmaError):
        dev.map(MemoryRegion.from_memory(memory, 0, 2 * PAGE))
    c = dev.counters()
    assert (c["iova_live"], c["bounces_live"]) == (0, 0)


@pytest.mark.parametrize("wrong", ["offset", "phys", "reuse", "late"])
def test_wrong_drivers_do_not_get_away_with_it(wrong: str) -> None:
    memory, dev, engine, _ = machine(3)
    at = memory.phys(0x210)
    memory.write(at, b"wanted")
    addr = dev.map_phys(at, 6)
    if wrong == "offset":  # takes the page of the address and adds the buffer's offset
        used = (int(addr) & ~0xFFF) | 0x210
    elif wrong == "phys":
        used = int(at)
    elif wrong == "reuse":  # keeps an address from one I/O for the next
        dev.unmap_phys(addr, 6)
        used = int(addr)
        dev.map_phys(at, 6)
    else:
        dev.unmap_phys(addr, 6)
        used = int(addr)
    with pytest.raises(DmaFault):
        engine.read([(used, 6)])


def test_a_python_back_end_that_is_wrong_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: shown.append(repr(args.exc_value)))

    class Broken:
        def map_phys(self, phys: int, size: int, dir: str, attrs: int) -> int:
            raise KeyError("a bug")

        def unmap_phys(self, addr: int, size: int, dir: str, attrs: int) -> None: ...

    dev = Device(backend=Broken())
    with pytest.raises(DmaError):
        dev.map_phys(BASE, 16)
    assert shown == ["KeyError('a bug')"]
    assert repr(dev) == "Device(Broken)"
    with pytest.raises(DmaError, match="methods map_phys and unmap_phys"):
        Device(backend=object())
    with pytest.raises(DmaError, match="with a memory"):
        Device(backend=Adversary())


def test_the_least_back_end_in_python() -> None:
    class Offset:
        """Bus addresses 1 TiB above physical ones."""

        def map_phys(self, phys: int, size: int, dir: str, attrs: int) -> int:
            return phys + (1 << 40)

        def unmap_phys(self, addr: int, size: int, dir: str, attrs: int) -> None: ...

    dev = Device(backend=Offset())
    with dev.map(Bio([(BASE, 64), (BASE + 0x5000, 64)])) as m:
        assert [int(s.addr) - (1 << 40) for s in m] == [BASE, BASE + 0x5000]
        assert m.unmap_state_bytes == 32
    assert dev.counters()["maps"] == 0  # it counts nothing
