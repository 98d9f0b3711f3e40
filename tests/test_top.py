"""Ranges that end at 2**64: IOVA handed out, linked, synced, unlinked, flushed, bounced, watched."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from top import HIGH, KINDS, LAST, PAGE, TOP, all_gone, device

from dmapath import (
    Bio,
    Device,
    DmaDebug,
    DmaEngine,
    DmaError,
    DmaFault,
    Exposure,
    Fabric,
    Iommu,
    IovaRangeError,
    Mapping,
    MemoryRegion,
    PhysMemory,
    Tracer,
)
from dmapath.replay import replay
from dmapath.request import iterate

# ---- what was seen


def test_a_region_of_4_gib_behind_a_default_iommu() -> None:
    dev = Device(iommu=Iommu())
    with dev.map(MemoryRegion([(1 << 40, 4 << 30)], length=4 << 30)) as m:
        assert [(int(s.addr), s.length) for s in m] == [(TOP - (4 << 30), 4 << 30)]
        assert dev.counters()["ptes_1g_live"] == 4
    all_gone(dev)


def test_the_first_range_after_the_32_bit_space_was_full() -> None:
    dev = Device(iommu=Iommu(reserved=[(PAGE, (1 << 32) - 1)]))
    addr = dev.map_phys(1 << 40, PAGE)
    assert int(addr) == HIGH
    dev.unmap_phys(addr, PAGE)
    all_gone(dev)


def test_row_3_is_linked_too() -> None:
    dev = Device(iommu=Iommu(), forcedac=True)
    state = dev.iova_try_alloc(0, PAGE)
    assert state is not None and int(state.addr) == HIGH
    for _ in range(2):  # with and without page tables that exist
        dev.iova_link(state, 1 << 40, 0, PAGE)
        dev.iova_sync(state, 0, PAGE)
        assert dev.counters()["ptes_4k_live"] == 1
        assert dev.backend.iova_to_phys(LAST) == (1 << 40) + 0xFFF
        dev.iova_unlink(state, 0, PAGE)
        assert dev.counters()["ptes_4k_live"] == 0
    dev.iova_free(state)
    all_gone(dev)


def test_a_bounced_read_arrives_whole() -> None:
    dev, memory = device("untrusted")
    with dev.map(Bio.from_memory(memory, [(0x200, 0x1E00)])) as m:
        assert int(m.segments[-1].addr) + m.segments[-1].length == TOP
        DmaEngine(dev).write(m.segments, b"\xab" * 0x1E00)
    assert memory.read(memory.phys(0x200), 0x1E00) == b"\xab" * 0x1E00
    all_gone(dev)


# ---- two steps: pieces linked, synced, unlinked, in every kind of domain


@st.composite
def pieces(draw: Any) -> tuple[int, int, list[int]]:
    """(offset in the first page, bytes, where to cut): a range that fills the aperture to its end, or nearly."""
    off = draw(st.sampled_from([0, 0, 0x200, 0xFFF]))
    pages = draw(st.sampled_from([1, 1, 2, 4, 8, 3, 9]))  # a range is aligned to its size rounded up to a power of two
    size = pages * PAGE - off - draw(st.sampled_from([0, 0, 1, 0x800]) if pages > 1 or not off else st.just(0))
    cuts = sorted(draw(st.sets(st.integers(1, pages - 1), max_size=3))) if pages > 1 else []
    return off, size, [0, *(c * PAGE - off for c in cuts if c * PAGE - off < size), size]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(set(KINDS) - {"2 MiB granule"})), what=pieces(), seed=st.integers(0, 2**32),
       way=st.sampled_from(["from_device", "to_device", "bidirectional"]))  # fmt: skip
def test_links_up_to_the_top(kind: str, what: tuple[int, int, list[int]], seed: int, way: str) -> None:
    off, size, cuts = what
    dev, memory = device(kind)
    engine, rng, phys = DmaEngine(dev), random.Random(seed), int(memory.phys(off))
    content, incoming = rng.randbytes(size), rng.randbytes(size)
    memory.write(phys, content)
    with DmaDebug(dev):
        state = dev.iova_try_alloc(phys, size)
        assert state is not None and -int(state.addr) % TOP <= 16 * PAGE
        for a, b in pairwise(cuts):
            dev.iova_link(state, phys + a, a, b - a, way)
            dev.iova_sync(state, a, b - a)
        if way != "from_device":
            assert engine.read([(state.addr, size)]) == content
        if way != "to_device":
            engine.write([(state.addr, size)], incoming)
            before = dev.counters()["cache_inval_bytes"]
            for a, b in pairwise(sorted({0, size, *(rng.randrange(size) for _ in range(3))})):  # in parts of any size
                dev.sync_for_cpu(state.addr + a, b - a, way)
            assert memory.read(phys, size) == incoming
            assert dev.counters()["cache_inval_bytes"] - before == (0 if dev.coherent else size)
            dev.sync_for_device(state.addr, size, way)
        for a, b in rng.sample(list(pairwise(cuts)), len(cuts) - 1):
            dev.iova_unlink(state, a, b - a, way)
        dev.iova_free(state)
    assert memory.read(phys, size) == (content if way == "to_device" else incoming)
    all_gone(dev)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), policy=st.sampled_from(["linux", "unified"]),
       op=st.sampled_from(["read", "write"]),
       parts=st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0, 0, 1, 0x200, 0xFFF]),
                                st.sampled_from([1, 0x200, 0x601, PAGE, 2 * PAGE])), min_size=1, max_size=6),
       pages=st.sampled_from([1, 2, 4, 16, 64, 1 << 52]), sg=st.booleans())  # fmt: skip
def test_requests_in_an_aperture_at_the_top(kind: str, policy: str, op: str, parts: list[tuple[int, int, int]], pages: int,
                                            sg: bool) -> None:  # fmt: skip
    unit = 1 << 21 if "MiB" in kind else PAGE
    dev, memory = device(kind, (TOP - min(pages * unit, TOP), LAST))
    ranges = [(i * 8 * 4 * PAGE + (k * 4 * PAGE) + off, n) for i, (k, off, n) in enumerate(parts)]
    bio = Bio.from_memory(memory, ranges, op=op)
    want = random.Random(1).randbytes(bio.total)
    try:
        mapping = dev.map_sg(bio) if sg else dev.map(bio, policy)
    except DmaError as e:
        assert e.errno in (errno.ENOMEM, errno.EIO) and pages < 1 << 52
        all_gone(dev)
        return
    segments = [(int(s.addr), s.length) for s in mapping]
    assert all(TOP - pages * unit <= a and a + n <= TOP for a, n in segments)
    if op == "read":
        DmaEngine(dev).write(segments, want)
    else:
        want = b"".join(memory.read(p, n) for p, n in bio.vecs)
        assert DmaEngine(dev).read(segments) == want
    if isinstance(mapping, Mapping):
        mapping.unmap()
    else:
        dev.unmap_sg(mapping)
    assert b"".join(memory.read(p, n) for p, n in bio.vecs) == want
    all_gone(dev)


@pytest.mark.parametrize("granule", [PAGE, 1 << 21])
def test_an_aperture_and_a_bus_limit_that_end_inside_a_granule(granule: int) -> None:
    sizes = (PAGE, 1 << 21) if granule == PAGE else (1 << 21,)
    whole = 3 * granule
    for first, last, limit in ((granule * 5 + 1, granule * 9 + 17, 0), (granule * 6, granule * 20, granule * 9 + 17)):
        dev = Device(iommu=Iommu(aperture=(first, last), page_sizes=sizes), bus_dma_limit=limit)
        got = [int(s.addr) for s in (dev.iova_try_alloc(0, 1) for _ in range(3)) if s]
        assert sorted(got) == [granule * 6, granule * 7, granule * 8]
        assert dev.iova_try_alloc(0, 1) is None
        assert max(got) + granule - 1 <= last and len(got) * granule == whole


def test_no_mapping_has_the_address_that_means_none() -> None:
    """All ones is DMA_MAPPING_ERROR: a byte at the end of a page is given another place."""
    dev = Device(iommu=Iommu(), forcedac=True)
    addr = dev.map_phys(0x1FFF, 1)
    assert int(addr) == HIGH - 1
    state = dev.iova_try_alloc(0x1FFF, 1)  # two steps have no such address
    assert state is not None and int(state.addr) == LAST
    dev.unmap_phys(addr, 1)
    dev.iova_link(state, 0x1FFF, 0, 1)
    dev.iova_sync(state, 0, 1)
    dev.iova_destroy(state, 1)
    all_gone(dev)


def test_links_outside_their_state_are_refused_there_too() -> None:
    dev = Device(iommu=Iommu(), forcedac=True)
    low, high = dev.iova_try_alloc(0, PAGE), None
    assert low is not None and int(low.addr) == HIGH
    high, low = low, dev.iova_try_alloc(0, 2 * PAGE)
    assert low is not None
    for offset, size in ((0, 2 * PAGE), (PAGE, PAGE), (PAGE, 2**63 - 1), (2**63 - 1, 1), (0, 2**63 - 1)):
        with pytest.raises(IovaRangeError):
            dev.iova_link(high, 1 << 40, offset, size)
    quirky = Device(iommu=Iommu(), forcedac=True, kernel_quirks=True)
    state = quirky.iova_try_alloc(0, PAGE)
    with pytest.raises(IovaRangeError):  # Linux would wrap to IOVA 0
        quirky.iova_link(state, 1 << 40, 0, 2 * PAGE)
    for d, states in ((dev, (high, low)), (quirky, (state,))):
        for s in states:
            d.iova_free(s)
        all_gone(d)


# ---- accesses, traces, observers


@pytest.mark.parametrize("name", ["iommu", "direct", "peers", "passthrough"])
def test_an_access_ends_at_the_top(name: str) -> None:
    memory = PhysMemory(4 * PAGE)
    ranges = [(int(memory.phys(0)), TOP - 3 * PAGE, 3 * PAGE)] if name in ("direct", "passthrough") else []
    pci = None
    if name == "peers":
        switch = Fabric().root_complex().port().switch()
        switch.port().function("gpu").bar(memory, PAGE)
        pci = switch.port().function("nic")
    unit = Iommu("passthrough" if name == "passthrough" else "strict") if name != "direct" else None
    dev = Device(memory=memory, iommu=unit, forcedac=True, dma_ranges=ranges, pci=pci)
    addr = int(dev.map_phys(memory.phys(0), 3 * PAGE))
    assert addr + 3 * PAGE == TOP if not unit or name == "passthrough" else addr + 4 * PAGE == TOP
    engine = DmaEngine(dev)
    if addr + 3 * PAGE != TOP:  # aligned to its size rounded up: three pages do not end there, four do
        dev.unmap_phys(addr, 3 * PAGE)
        addr = int(dev.map_phys(memory.phys(0), 4 * PAGE))
    n = TOP - addr
    engine.write([(addr, n)], b"\x5a" * n)
    assert memory.read(memory.phys(0), n) == b"\x5a" * n
    with pytest.raises(DmaFault) as e:
        engine.write([(addr, n), (HIGH, 2 * PAGE)], b"\xa5" * (n + 2 * PAGE))
    assert e.value.done == n + PAGE
    assert memory.read(memory.phys(0), n) == b"\xa5" * n
    assert dev.counters()["faults"] == 1
    dev.unmap_phys(addr, n)


@pytest.mark.parametrize("kind", ["strict", "caching", "untrusted"])
def test_a_trace_of_it_agrees_when_it_is_replayed(kind: str) -> None:
    dev, memory = device(kind)
    tracer = dev.attach(Tracer())
    for i, ranges in enumerate(([(0, 2 * PAGE)], [(0, PAGE), (3 * PAGE, PAGE)], [(0x200, 0x600), (3 * PAGE, 0x400)])):
        bio = Bio.from_memory(memory, ranges, op="write")
        with tracer.io(f"io{i}", bio):
            tracer.command(bio)
            if len(iterate(bio, dev)) == 1:
                [(phys, n)] = bio.vecs
                dev.unmap_phys(dev.map_phys(phys, n, bio.dir), n, bio.dir)
            else:
                with dev.map(bio, "linux") as m:
                    assert m.segments
    dev.detach(tracer)
    assert any("iova=0xfffffffffffff000 - 0x0000000000000000" in line or "- 0x0000000000000000 paddr" in line
               for line in tracer.lines)  # fmt: skip
    report = replay(tracer.text.splitlines(), "top")
    assert (report.count("agree"), report.count("disagree")) == (3, 0), report.to_dict()


def test_exposure_there() -> None:
    dev, memory = device("lazy")
    watch = dev.attach(Exposure())
    addr = dev.map_phys(memory.phys(0), PAGE)
    DmaEngine(dev).read([(addr, PAGE)])
    dev.unmap_phys(addr, PAGE)
    DmaEngine(dev).read([(addr, PAGE)])
    assert [int(u.iova) for u in watch.stale_uses] == [HIGH]
    assert dev.iommu is not None
    dev.iommu.advance(10_000_000)
    assert watch.summary()["stale_now"] == 0
    dev.detach(watch)
