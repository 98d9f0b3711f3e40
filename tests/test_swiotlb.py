"""Bounce buffers as Linux 7.3 has them: rows 21 to 29, 42, 46 to 50, 63 and 82, and cases 4 and 5."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from conftest import live, strict
from hypothesis import given, settings
from hypothesis import strategies as st

import dmapath
from dmapath import Bio, Device, DmaEngine, DmaError, MemoryRegion, PhysMemory, Swiotlb

ErrnoOf = Callable[..., int]
BASE = 1 << 32


def machine(*, slots: int = 512, force: bool = False, areas: int = 1) -> tuple[PhysMemory, Swiotlb]:
    memory = PhysMemory(1 << 20, base=BASE)
    return memory, Swiotlb(memory, slots=slots, force=force, areas=areas)


def untrusted(min_align: int = 0xFFF) -> tuple[PhysMemory, Swiotlb, Device]:
    memory, pool = machine()
    memory.write(pool.base, b"\xcc" * (pool.slots * 2048))  # what earlier mappings of others left in the pool
    return memory, pool, strict(memory=memory, swiotlb=pool, untrusted=True, min_align_mask=min_align)


@pytest.fixture
def filled() -> tuple[PhysMemory, Swiotlb, Device]:
    memory, pool, dev = untrusted()
    memoryview(memory)[:] = bytes(i * 7 & 255 for i in range(len(memory)))
    return memory, pool, dev


def test_row_21_head_and_tail_bounce_and_the_rest_is_zero(filled: Any) -> None:
    memory, pool, dev = filled
    dev.backend.record(True)
    state = dev.iova_try_alloc(BASE + 0x200, 0x2000)
    dev.iova_link(state, BASE + 0x200, 0, 0x2000, "from_device")
    bounces = [e for e in dev.backend.events() if e[0] == "bounce"]
    assert [(a, b) for _, a, b, _ in bounces] == [(BASE + 0x200, 0xE00), (BASE + 0x2000, 0x200)]
    pages = [dev.backend.iova_to_phys((int(state.addr) & ~0xFFF) + k * 0x1000) for k in range(3)]
    assert pages[1] == BASE + 0x1000
    assert pages[0] in pool
    assert pages[2] in pool
    first, last = memory.read(pages[0], 0x1000), memory.read(pages[2], 0x1000)
    assert first == bytes(0x200) + bytes(memoryview(memory)[0x200:0x1000])
    assert last == bytes(memoryview(memory)[0x2000:0x2200]) + bytes(0xE00)
    assert (pool.used, state.size) == (4, 0x2000)
    dev.iova_destroy(state, 0x2000, "from_device")
    assert pool.used == 0
    assert not any(live(dev).values())


def test_row_22_what_the_device_wrote_comes_back_and_nothing_else(filled: Any) -> None:
    memory, pool, dev = filled
    before = bytes(memory)
    state = dev.iova_try_alloc(BASE + 0x200, 0x2000)
    dev.iova_link(state, BASE + 0x200, 0, 0x2000, "from_device")
    dev.iova_sync(state, 0, 0x2000)
    DmaEngine(dev).write([(int(state.addr) & ~0xFFF, 0x3000)], b"\x77" * 0x3000)
    dev.iova_destroy(state, 0x2000, "from_device")
    after = bytes(memory)
    assert after[0x200:0x2200] == b"\x77" * 0x2000
    assert (after[:0x200], after[0x2200:]) == (before[:0x200], before[0x2200:])
    assert pool.used == 0


@pytest.mark.parametrize(("format", "want"), [("x86", errno.ENXIO), ("arm", errno.EINVAL)])
def test_row_23_an_unaligned_head_without_min_align_fails(format: str, want: int, errno_of: ErrnoOf) -> None:
    memory, pool = machine()
    dev = strict(memory=memory, swiotlb=pool, untrusted=True, format=format)
    state = dev.iova_try_alloc(BASE + 0x200, 0x2000)
    before = live(dev)
    assert errno_of(dev.iova_link, state, BASE + 0x200, 0, 0x2000) == want
    assert (pool.used, live(dev)) == (0, before)
    tail = dev.iova_try_alloc(BASE, 0x1200)
    dev.iova_link(tail, BASE, 0, 0x1200)  # unaligned tails work with any mask
    assert pool.used == 2
    dev.iova_destroy(tail, 0x1200)
    dev.iova_free(state)


@pytest.mark.parametrize("min_align", [0, 0x1FF])
@pytest.mark.parametrize("ranges", [[(0x200, 0x600), (0x3000, 0x1000)], [(0x123, 0x2000)], [(0, 0x1000), (0x5400, 0x10)]])
def test_the_wrapper_maps_such_heads_by_themselves(min_align: int, ranges: list[tuple[int, int]], errno_of: ErrnoOf) -> None:
    """What two steps cannot link, the classic calls map: the unified flow needs no word of the driver for it."""
    memory, pool, dev = untrusted(min_align)
    memory.write(BASE, bytes(i * 13 & 255 for i in range(0x6000)))
    before, vecs = live(dev), [(BASE + at, n) for at, n in ranges]
    with dev.map(Bio(vecs, op="write")) as m:
        if any(at & 0xFFF & ~min_align for at, _ in ranges):
            assert "separate" in m.rules
        assert DmaEngine(dev).read(m.segments) == b"".join(memory.read(p, n) for p, n in vecs)
    data = bytes(255 - (i & 127) for i in range(sum(n for _, n in ranges)))
    with dev.map(Bio(vecs, op="read")) as m:
        DmaEngine(dev).write(m.segments, data)
    assert b"".join(memory.read(p, n) for p, n in vecs) == data
    assert (live(dev), pool.used) == (before, 0)
    if len(ranges) == 1 and not min_align:  # policy linux goes on to do as Linux does
        assert errno_of(dev.map, Bio(vecs, op="write"), "linux") == errno.ENXIO
        assert live(dev) == before


def test_row_25_aligned_does_not_bounce() -> None:
    _, pool, dev = untrusted()
    with dev.map(Bio([(BASE, 0x2000)])) as m:
        assert (m.layout, pool.used) == ("linear", 0)


def test_row_27_a_full_pool_is_enomem(errno_of: ErrnoOf) -> None:
    memory, pool = machine(slots=128)
    dev = strict(memory=memory, swiotlb=pool, untrusted=True, min_align_mask=0xFFF)
    held = [dev.map_phys(BASE + 0x1000 * i + 0x10, 0x20) for i in range(64)]
    assert pool.used == 128
    state = dev.iova_try_alloc(BASE + 0x200, 0x1000)
    before = live(dev)
    assert errno_of(dev.iova_link, state, BASE + 0x200, 0, 0x1000) == errno.ENOMEM
    assert errno_of(dev.map_phys, BASE + 0x200, 0x1000) == errno.ENOMEM
    with pytest.raises(DmaError, match="no room"):
        dev.map(Bio([(BASE + 0x200, 0x1000)]))
    assert live(dev) == before
    for a in held:
        dev.unmap_phys(a, 0x20)
    dev.iova_free(state)
    assert pool.used == 0


def test_row_28_the_classic_path_bounces_the_whole_buffer() -> None:
    memory, pool, dev = untrusted(min_align=0)
    memory.write(BASE + 0x200, b"classic")
    addr = dev.map_phys(BASE + 0x200, 0x400, "to_device")
    assert int(addr) & 0xFFF == 0
    assert DmaEngine(dev).read([(addr, 7)]) == b"classic"
    dev.unmap_phys(addr, 0x400, "to_device")
    assert (pool.used, pool.counters()["bytes_out"]) == (0, 0)


def test_row_29_a_bounced_state_takes_no_coherent_range(errno_of: ErrnoOf) -> None:
    _, pool, dev = untrusted()
    state = dev.iova_try_alloc(BASE + 0x200, 0x2E00)
    dev.iova_link(state, BASE + 0x200, 0, 0xE00)
    assert pool.used == 2
    assert errno_of(dev.iova_link, state, BASE + 0x1000, 0xE00, 0x1000, attrs="require_coherent") == errno.EOPNOTSUPP
    dev.iova_destroy(state, 0xE00)


def test_row_42_only_the_unaligned_entry_of_a_list_bounces() -> None:
    _, pool, dev = untrusted()
    segments = dev.map_sg(Bio([(BASE, 0x1000), (BASE + 0x3000, 0x1000), (BASE + 0x5010, 0x20)]))
    assert (len(segments), dev.counters()["iova_allocs"], pool.counters()["bounces"]) == (3, 3, 1)
    dev.unmap_sg(segments)
    assert pool.used == 0


def test_row_46_the_largest_mapping() -> None:
    pool = Swiotlb()
    assert [pool.max_mapping_size(m) for m in (0, 0x1FF, 0xFFF, 0xFFFF)] == [0x40000, 0x3F800, 0x3F000, 0x30000]


@pytest.mark.parametrize(("size", "count"), [(0x800, 512), (0x1000, 256), (0x2800, 84), (0x21000, 4)])
def test_row_47_filling_512_slots(size: int, count: int) -> None:
    memory, pool = machine(slots=512, force=True)
    dev = Device(memory=memory, swiotlb=pool)
    got = []
    with pytest.raises(DmaError):
        while True:
            got.append(dev.map_phys(BASE, size))
    assert len(got) == count
    for a in got:
        dev.unmap_phys(a, size)
    assert pool.used == 0
    assert len([dev.map_phys(BASE, size) for _ in range(count)]) == count  # the free runs have merged again


def test_row_48_one_byte_from_the_device() -> None:
    memory, pool = machine(force=True)
    dev = Device(memory=memory, swiotlb=pool)
    memoryview(memory)[:0x1000] = b"\x11" * 0x1000
    addr = dev.map_phys(BASE, 0x1000, "from_device")
    assert int(addr) in pool
    DmaEngine(dev).write([(addr + 5, 1)], b"\xff")
    assert bytes(memoryview(memory)[:8]) == b"\x11" * 8
    dev.unmap_phys(addr, 0x1000, "from_device")
    assert bytes(memoryview(memory)[:8]) == b"\x11" * 5 + b"\xff" + b"\x11" * 2


def test_row_49_skip_cpu_sync_copies_nothing_back() -> None:
    memory, pool = machine(force=True)
    dev = Device(memory=memory, swiotlb=pool)
    addr = dev.map_phys(BASE, 0x100, "from_device")
    DmaEngine(dev).write([(addr, 4)], b"lost")
    dev.unmap_phys(addr, 0x100, "from_device", attrs="skip_cpu_sync")
    assert (bytes(memoryview(memory)[:4]), pool.used) == (bytes(4), 0)


def test_row_50_beyond_a_32_bit_mask(errno_of: ErrnoOf) -> None:
    memory, pool = machine()
    memory.write(BASE, b"high")
    dev = Device(memory=memory, swiotlb=pool, dma_mask=2**32 - 1)
    addr = dev.map_phys(BASE, 0x1000, "to_device")
    assert int(addr) in pool
    assert DmaEngine(dev).read([(addr, 4)]) == b"high"
    dev.unmap_phys(addr, 0x1000, "to_device")
    assert errno_of(dev.map_phys, BASE, 0x1000, attrs="require_coherent") == errno.ENOMEM
    assert errno_of(Device(dma_mask=2**32 - 1).map_phys, BASE, 0x1000) == errno.ENOMEM
    low = Device(swiotlb=Swiotlb(), dma_mask=2**20 - 1)
    assert errno_of(low.map_phys, BASE, 0x1000) == errno.ENOMEM  # the pool itself is out of reach
    assert low.swiotlb.used == 0


def test_row_63_the_first_bounce_ends_forgetting() -> None:
    memory, pool = machine()
    dev = Device(memory=memory, swiotlb=pool, dma_mask=2**33 - 1)
    assert not dev.need_unmap
    narrow = Device(memory=memory, swiotlb=pool, dma_mask=2**32 - 1)
    narrow.unmap_phys(narrow.map_phys(BASE, 16), 16)
    assert narrow.need_unmap


def test_section_6_3_placement_keeps_low_bits() -> None:
    pool = Swiotlb(slots=512, force=True)
    dev = Device(swiotlb=pool, min_align_mask=0xFFF)
    assert int(dev.map_phys(0x100A00, 0x200)) == pool.base + 0xA00
    assert pool.used == 1
    dev = strict(swiotlb=(whole := Swiotlb(slots=512)), untrusted=True, min_align_mask=0xFFF)
    dev.backend.record(True)
    dev.map_phys(0x100A00, 0x200)
    dev.map_phys(0x100A00, 0x1000)
    assert [e[3] - whole.base for e in dev.backend.events() if e[0] == "bounce"] == [0xA00, 0x1A00]
    assert whole.used == 2 + 4


def test_section_6_4_addresses_advance_and_wrap() -> None:
    pool = Swiotlb(slots=128, force=True)
    dev = Device(swiotlb=pool)
    got = []
    for _ in range(130):
        addr = dev.map_phys(0x100000, 0x800)
        dev.unmap_phys(addr, 0x800)
        got.append((int(addr) - pool.base) // 0x800)
    assert got == [*range(128), 0, 1]


def test_section_6_4_a_segment_boundary_is_not_crossed() -> None:
    pool = Swiotlb(slots=256, force=True)
    dev = Device(swiotlb=pool, seg_boundary_mask=0x3FFF)
    addrs = [int(dev.map_phys(0x100000, 0x2800)) for _ in range(8)]
    assert all(a // 0x4000 == (a + 0x27FF) // 0x4000 for a in addrs)
    assert len(set(addrs)) == 8


def test_syncs_copy_by_direction() -> None:
    memory, pool = machine(force=True)
    dev = Device(memory=memory, swiotlb=pool)
    engine = DmaEngine(dev)
    addr = dev.map_phys(BASE, 0x1000)
    memory.write(BASE + 0x10, b"cpu")
    assert engine.read([(addr + 0x10, 3)]) == bytes(3)
    dev.sync_for_device(addr + 0x10, 3)
    assert engine.read([(addr + 0x10, 3)]) == b"cpu"
    engine.write([(addr + 0x20, 3)], b"dev")
    assert memory.read(BASE + 0x20, 3) == bytes(3)
    dev.sync_for_cpu(addr + 0x20, 3, "to_device")
    assert memory.read(BASE + 0x20, 3) == bytes(3)
    dev.sync_for_cpu(addr + 0x20, 3)
    assert memory.read(BASE + 0x20, 3) == b"dev"
    dev.unmap_phys(addr, 0x1000)


@pytest.mark.parametrize("policy", ["unified", "linux"])
@pytest.mark.parametrize(
    ("ranges", "case", "kept"),
    [([(0x200, 0x1000)], "swiotlb-single", 16), ([(0, 64), (0x3100, 0x1000)], "swiotlb-multi", 32)],
)
def test_cases_4_and_5(policy: str, ranges: Any, case: str, kept: int) -> None:
    memory, pool = machine(force=True)
    dev = Device(memory=memory, swiotlb=pool)
    memoryview(memory)[:] = bytes(i * 5 & 255 for i in range(len(memory)))
    engine = DmaEngine(dev)
    want = b"".join(bytes(memoryview(memory)[a : a + n]) for a, n in ranges)
    with dev.map(Bio.from_memory(memory, ranges, "write"), policy) as m:
        assert engine.read(m.segments) == want
        assert (m.layout, m.case, m.unmap_state_bytes) == ("bounced", case, kept)
    with dev.map(Bio.from_memory(memory, ranges, "read"), policy) as m:
        engine.write(m.segments, b"\xee" * len(want))
    assert all(bytes(memoryview(memory)[a : a + n]) == b"\xee" * n for a, n in ranges)
    assert pool.used == 0
    told = dev.explain(Bio.from_memory(memory, ranges, "read"), policy)
    assert (told.case, len(told.bounced), pool.used) == (case, len(ranges), 0)


@settings(max_examples=150, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 4095), st.integers(1, 9000)), min_size=1, max_size=8),
    policy=st.sampled_from(["unified", "linux"]),
    nth=st.integers(0, 6),
)
def test_untrusted_devices_see_the_request_and_nothing_else(ranges: Any, policy: str, nth: int) -> None:
    """Random ranges: every byte both ways, zeros around them, an untouched rest; and each failed bounce unwinds."""
    memory, pool, dev = untrusted()
    places = [(i * 0x4000 + off, n) for (i, off, n) in {r[0]: r for r in ranges}.values()]
    memoryview(memory)[:] = b"\xa5" * len(memory)
    engine = DmaEngine(dev)
    pool.fail_nth(nth)
    try:
        dev.map(Bio.from_memory(memory, places, "write"), policy).unmap()
    except DmaError:
        assert not any(live(dev).values())
        assert pool.used == 0
    pool.fail_nth(0)
    with dev.map(Bio.from_memory(memory, places, "write"), policy) as m:
        assert engine.read(m.segments) == b"\xa5" * sum(n for _, n in places)
        for s in m.segments:  # whole granules around each segment
            first, last = int(s.addr) & ~0xFFF, (int(s.addr) + s.length + 0xFFF) & ~0xFFF
            around = engine.read([(first, last - first)])
            assert set(around[: int(s.addr) - first]) | set(around[int(s.addr) - first + s.length :]) <= {0}
    with dev.map(Bio.from_memory(memory, places, "read"), policy) as m:
        engine.write(m.segments, b"\x5a" * sum(n for _, n in places))
    want = bytearray(b"\xa5" * len(memory))
    for at, n in places:
        want[at : at + n] = b"\x5a" * n
    assert bytes(memory) == bytes(want)
    assert pool.used == 0
    assert not any(live(dev).values())


def test_explain_names_the_ends_that_bounce() -> None:
    _, pool, dev = untrusted()
    told = dev.explain(Bio([(BASE + 0x200, 0x2000)]))
    assert (told.layout, told.exposed_bytes, told.error, pool.used) == ("linear", 0, None, 0)
    assert told.bounced == [("head", BASE + 0x200, 0xE00), ("tail", BASE + 0x2000, 0x200)]
    assert "bounced-ends" in [r[0] for r in told.rules]


def test_long_lived_memory_is_never_bounced(errno_of: ErrnoOf) -> None:
    memory, pool = machine(force=True)
    region = MemoryRegion([(BASE, 0x1000)], length=0x800)
    for dev in (Device(memory=memory, swiotlb=pool), Device(memory=memory, swiotlb=pool, dma_mask=2**32 - 1)):
        for policy in ("unified", "linux"):
            with pytest.raises(DmaError):
                dev.map(region, policy)
    assert pool.used == 0


def test_areas_and_bad_pools() -> None:
    memory = PhysMemory(4096)
    pool = Swiotlb(memory, slots=512, areas=4, force=True)
    dev = Device(memory=memory, swiotlb=pool)
    got = [dev.map_phys(memory.phys(0), 2048) for _ in range(512)]
    assert len({int(a) for a in got}) == 512
    for bad in ({"slots": 100}, {"slots": 256, "areas": 4}, {"base": 4096}, {"areas": 3}):
        with pytest.raises(dmapath.DmaValueError):
            Swiotlb(**bad)  # type: ignore[arg-type]
    with pytest.raises(DmaError, match="memory there already"):
        Swiotlb(memory, slots=128)
    for a in got:
        dev.unmap_phys(a, 2048)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 20000)), min_size=1, max_size=40),
    granule=st.booleans(),
    seed=st.integers(0, 99),
)
def test_row_82_slots_used_are_the_sum_and_merge_back(sizes: Any, granule: bool, seed: int) -> None:
    import random

    pool = Swiotlb(slots=512, force=not granule)
    options: dict[str, Any] = {"swiotlb": pool, "min_align_mask": 0xFFF}
    dev = strict(untrusted=True, **options) if granule else Device(**options)
    held, used = [], 0
    for off, n in sizes:
        keep = off & (0xFFF if granule else 0x7FF)
        need = -(-(n + keep) // 4096) * 2 if granule else -(-(n + keep) // 2048)
        if granule and not (off | n) & 0xFFF:
            continue
        try:
            held.append((dev.map_phys(0x100000 + off, n), n))
        except DmaError:
            continue
        used += need
        assert pool.used == used
    random.Random(seed).shuffle(held)
    for addr, n in held:
        dev.unmap_phys(addr, n)
    assert pool.used == 0
    # the free list is whole again: two mappings of the greatest size fit into each half
    largest = pool.max_mapping_size(0xFFF)
    full = Device(swiotlb=pool, min_align_mask=0xFFF, dma_mask=2**32 - 1)
    addrs = [full.map_phys(1 << 33, largest) for _ in range(4)]
    assert pool.used == 4 * largest // 2048
    for addr in addrs:
        full.unmap_phys(addr, largest)


# ---- pools that grow, and pools of a device's own


def test_a_dynamic_pool_serves_the_request_at_hand_and_then_grows() -> None:
    memory = PhysMemory(1 << 21, base=BASE)
    memoryview(memory)[:] = bytes(i * 11 & 255 for i in range(len(memory)))
    pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
    dev = Device(memory=memory, swiotlb=pool, min_align_mask=0xFFF)
    engine = DmaEngine(dev)
    frames = memory.frames
    held = [dev.map_phys(BASE + i * 0x20000 + 0x200, 0x20000) for i in range(3)]  # each more than half of a pool
    c = pool.counters()
    assert (c["pools"], c["transients"], c["bounces_live"]) == (2, 1, 3)  # one there, one for the second, one by the worker
    for i, addr in enumerate(held):
        assert int(addr) in pool
        assert int(addr) & 0xFFF == 0x200
        assert engine.read([(int(addr), 0x20000)]) == bytes(memory)[i * 0x20000 + 0x200 : (i + 1) * 0x20000 + 0x200]
    for addr in held:
        dev.unmap_phys(addr, 0x20000)
    c = pool.counters()
    assert (c["slots_used"], c["slots"], c["pools"]) == (0, 256, 2)  # the transient one is gone, the worker's stays
    assert memory.frames == frames + 128 * 2048
    with pytest.raises(DmaError):
        memory.read(held[1], 1)
    again = [dev.map_phys(BASE, 0x20000) for _ in range(2)]
    assert pool.counters()["transients"] == 1
    for addr in again:
        dev.unmap_phys(addr, 0x20000)


def test_a_dynamic_pool_inside_the_iova_path() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    pool = Swiotlb(memory, slots=128, dynamic=True)
    dev = strict(memory=memory, swiotlb=pool, untrusted=True, min_align_mask=0xFFF)
    engine = DmaEngine(dev)
    before = live(dev)
    mappings = [dev.map(Bio([(BASE + i * 0x2000 + 0x100, 0x1000)], op="read")) for i in range(80)]
    assert pool.counters()["transients"] >= 1
    for i, m in enumerate(mappings):
        engine.write(m.segments, bytes([i]) * 0x1000)
    for m in mappings:
        m.unmap()
    for i in range(80):
        assert memory.read(BASE + i * 0x2000 + 0x100, 0x1000) == bytes([i]) * 0x1000
    assert (pool.used, live(dev)) == (0, before)


def test_growing_that_fails_refuses_and_leaves_nothing() -> None:
    for nth in range(1, 12):
        memory = PhysMemory(1 << 20, base=BASE)
        pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
        dev = Device(memory=memory, swiotlb=pool)
        held = dev.map_phys(BASE, 0x30000)
        frames = memory.frames
        pool.fail_nth(nth)
        try:
            addr = dev.map_phys(BASE, 0x30000)
        except DmaError:
            assert memory.frames == frames
            dev.unmap_phys(held, 0x30000)
            assert pool.used == 0
            continue
        pool.fail_nth(0)
        assert nth > 4
        dev.unmap_phys(addr, 0x30000)
        dev.unmap_phys(held, 0x30000)
        return
    pytest.fail("never ran out of allocations")


def test_a_pool_made_for_one_mapping_takes_no_other() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
    dev = Device(memory=memory, swiotlb=pool, min_align_mask=0xFFF)
    engine = DmaEngine(dev)
    full = dev.map_phys(BASE, 0x3F000)
    rest = dev.map_phys(BASE, 0x1000)
    assert pool.used == 128
    alone = dev.map_phys(BASE, 0x1000)  # gets a pool of its own, with slots to spare for its alignment
    assert pool.counters()["transients"] == 1
    more = [dev.map_phys(BASE, 0x3F000), dev.map_phys(BASE, 0x1000)]  # fill the pool that the worker has added
    memory.write(BASE + 0x800, b"mine" * 0x100)
    small = dev.map_phys(BASE + 0x800, 0x400)
    assert pool.counters()["transients"] == 2
    dev.unmap_phys(alone, 0x1000)
    assert engine.read([(int(small), 0x400)]) == b"mine" * 0x100
    for addr, n in ((full, 0x3F000), (rest, 0x1000), (more[0], 0x3F000), (more[1], 0x1000), (small, 0x400)):
        dev.unmap_phys(addr, n)
    assert pool.used == 0


def test_other_memory_above_a_dynamic_pool_is_left_alone() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    pool = Swiotlb(memory, slots=128, force=True, dynamic=True)
    with dmapath.HostBuffer(bytearray(b"z" * 4096), memory, layout="contiguous", phys=pool.base + 0x40000) as other:
        dev = Device(memory=memory, swiotlb=pool)
        held = [dev.map_phys(BASE, 0x30000) for _ in range(3)]
        assert memory.read(other.vecs()[0][0], 4) == b"zzzz"
        for addr in held:
            dev.unmap_phys(addr, 0x30000)


def test_a_restricted_pool_bounces_all_that_its_devices_map() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    own, common = Swiotlb(memory, slots=128, restricted=True), Swiotlb(memory, slots=128, base=0x60000000)
    dev, other = Device(memory=memory, swiotlb=own), Device(memory=memory, swiotlb=common)
    addr = dev.map_phys(BASE, 0x1000)
    assert (int(addr) in own, other.map_phys(BASE, 0x1000)) == (True, BASE)
    assert dev.counters()["bounces_live"] == 1
    dev.unmap_phys(addr, 0x1000)
    assert dev.counters()["bounces_live"] == 0
    assert repr(own) == "Swiotlb(128 slots, restricted)"


def test_threads_share_a_pool_that_grows() -> None:
    import threading

    memory = PhysMemory(1 << 20, base=BASE)
    pool = Swiotlb(memory, slots=256, areas=2, force=True, dynamic=True)
    dev = Device(memory=memory, swiotlb=pool)
    engine = DmaEngine(dev)
    wrong: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(60):
                held = []
                for j in range(6):
                    at = BASE + (k * 8 + j) * 0x4000
                    held.append((at, dev.map_phys(at, 0x4000, "from_device")))
                    engine.write([(int(held[-1][1]), 0x4000)], bytes([k * 60 + i]) * 0x4000)
                for at, addr in held:
                    dev.unmap_phys(addr, 0x4000, "from_device")
                    assert memory.read(at, 0x4000) == bytes([k * 60 + i]) * 0x4000
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong
    assert pool.used == 0
