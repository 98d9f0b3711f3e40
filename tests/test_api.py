"""What a user meets: types, errors that name argument, value and rule, limits, and nothing half mapped after them."""

from __future__ import annotations

import errno
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from conftest import lazy, live, strict

import dmapath
from dmapath import (
    AddressTypeError,
    AlignmentError,
    Bio,
    Device,
    DmaAddr,
    DmaError,
    DmaValueError,
    Iommu,
    Iova,
    MemoryRegion,
    PhysAddr,
    PhysMemory,
    Request,
    StateError,
)

GAPPED = [(0x100200, 0x600), (0x205000, 0x1000), (0x30A100, 0x300)]


# ---- addresses


def test_addresses_are_integers_with_a_kind() -> None:
    a = DmaAddr(0x1000)
    assert (a + 0x200, 0x200 + a, a - 0x1000, a - DmaAddr(0x800)) == (0x1200, 0x1200, 0, 0x800)
    assert type(a + 1) is DmaAddr
    assert (hex(a), str(a), repr(a), int(a)) == ("0x1000", "0x1000", "DmaAddr(0x1000)", 4096)
    assert pickle.loads(pickle.dumps(a)) == a
    assert {a: 1}[DmaAddr(0x1000)] == 1


@pytest.mark.parametrize("kinds", [(PhysAddr, DmaAddr), (DmaAddr, Iova), (Iova, PhysAddr)])
def test_kinds_do_not_mix(kinds: Any) -> None:
    a, b = kinds[0](0x1000), kinds[1](0x1000)
    ops: list[Callable[[], object]] = [
        lambda: a + b, lambda: a - b, lambda: a < b, lambda: a <= b, lambda: a > b, lambda: a >= b,
        lambda: kinds[0](b), lambda: a + kinds[0](1),
    ]  # fmt: skip
    for op in ops:
        with pytest.raises(TypeError):
            op()
    assert a != b


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_addresses_have_64_bits(bad: int) -> None:
    with pytest.raises(DmaValueError, match="64 bits"):
        DmaAddr(bad)
    with pytest.raises(DmaValueError, match="64 bits"):
        strict().iova_try_alloc(bad, 1)


# ---- bad input: (call, exception, argument)

DEV = strict()
STATE = DEV.iova_try_alloc(0, 0x3000)
BAD: list[tuple[str, Callable[[], object], type[DmaError], str]] = [
    ("a dma address as phys", lambda: DEV.map_phys(DmaAddr(0), 1), AddressTypeError, "phys"),
    ("a phys address as dma", lambda: DEV.unmap_phys(PhysAddr(0), 1), AddressTypeError, "addr"),
    ("an address as a length", lambda: DEV.map_phys(0, PhysAddr(4096)), AddressTypeError, "size"),
    ("a bool as a length", lambda: DEV.map_phys(0, True), AddressTypeError, "size"),
    ("a float", lambda: DEV.map_phys(1.5, 1), AddressTypeError, "phys"),  # type: ignore[arg-type]
    ("a string", lambda: DEV.iova_try_alloc("0", 1), AddressTypeError, "phys"),  # type: ignore[arg-type]
    ("a zero length", lambda: DEV.map_phys(0, 0), DmaValueError, "size"),
    ("a negative length", lambda: DEV.map_phys(0, -1), DmaValueError, "size"),
    ("a length of 2**64", lambda: DEV.iova_try_alloc(0, 2**64), DmaValueError, "size"),
    ("phys + size past 2**64", lambda: DEV.map_phys(2**64 - 1, 2), DmaValueError, "size"),
    ("a negative offset", lambda: DEV.iova_link(STATE, 0, -1, 1), DmaValueError, "offset"),
    ("no such direction", lambda: DEV.map_phys(0, 1, "up"), DmaValueError, "dir"),
    ("no such attribute", lambda: DEV.map_phys(0, 1, attrs="fast"), DmaValueError, "attrs"),
    ("no such policy", lambda: DEV.map(Bio([(0, 1)]), "solaris"), DmaValueError, "policy"),
    ("sync outside", lambda: DEV.iova_sync(STATE, 0x2000, 0x1001), dmapath.IovaRangeError, "size"),
    ("unlink outside", lambda: DEV.iova_unlink(STATE, 0x2000, 0x1001), dmapath.IovaRangeError, "size"),
    ("destroy of more", lambda: DEV.iova_destroy(STATE, 0x3001), dmapath.IovaRangeError, "size"),
    ("no state", lambda: DEV.iova_sync(None, 0, 1), AddressTypeError, "state"),  # type: ignore[arg-type]
    ("a foreign state", lambda: strict().iova_sync(STATE, 0, 1), StateError, "state"),
    ("a vector of nothing", lambda: Bio([(0, 0)]), DmaValueError, "vecs[0].len"),
    ("a vector past 2**64", lambda: Bio([(0, 1), (2**64 - 1, 2)]), DmaValueError, "vecs[1]"),
    ("no pair", lambda: Bio([(1, 2, 3)]), AddressTypeError, "vecs[0]"),  # type: ignore[list-item]
    ("no operation", lambda: Bio([(0, 1)], op="trim"), DmaValueError, "op"),
    ("bios of two kinds", lambda: Request([Bio([(0, 1)]), Bio([(0, 1)], op="write")]), DmaValueError, "bios"),
    ("no bio", lambda: Request([]), DmaValueError, "bios"),
    ("no mode", lambda: Iommu("fast"), DmaValueError, "mode"),
    ("no page size", lambda: Iommu(page_sizes=(8192,)), DmaValueError, "page_sizes"),
    ("an empty aperture", lambda: Iommu(aperture=(0x2000, 0x1000)), DmaValueError, "aperture"),
    ("no CPU", lambda: Iommu(cpus=0), DmaValueError, "cpus"),
    ("sets no power of two", lambda: Iommu(iotlb_sets=3), DmaValueError, "iotlb_sets"),
    ("a mask with holes", lambda: Device(dma_mask=0xF0F), DmaValueError, "dma_mask"),
    ("no mask", lambda: Device(dma_mask=0), DmaValueError, "dma_mask"),
    ("an iommu of the wrong type", lambda: Device(iommu="strict"), AddressTypeError, "iommu"),  # type: ignore[arg-type]
    ("a backend of the wrong type", lambda: Device(backend=object()), AddressTypeError, "backend"),
    ("a layout unknown", lambda: PhysMemory(4096, layout="round"), DmaValueError, "layout"),  # type: ignore[arg-type]
    ("memory outside", lambda: PhysMemory(4096).phys(4096), DmaValueError, "offset"),
    ("a region of no page", lambda: MemoryRegion([(0x10, 0x1000)], length=1), DmaValueError, "pages[0]"),
    ("a region too long", lambda: MemoryRegion([(0, 0x1000)], length=0x1001), DmaValueError, "length"),
    ("a region past 2**64", lambda: MemoryRegion([(0, 0x1000)], length=2, iova=2**64 - 1), DmaValueError, "iova"),
    ("time backwards", lambda: Iommu().advance(-1), DmaValueError, "ns"),
]


@pytest.mark.parametrize(("call", "kind", "argument"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named(call: Callable[[], object], kind: type[DmaError], argument: str) -> None:
    before = DEV.counters()
    with pytest.raises(kind) as e:
        call()
    assert e.value.argument == argument
    assert e.value.errno in errno.errorcode
    assert argument in str(e.value)
    assert e.value.rule
    assert DEV.counters() == before


def test_errors_are_one_tree_and_pickle() -> None:
    with pytest.raises(DmaError) as e:
        DEV.map_phys(0, -1)
    again = pickle.loads(pickle.dumps(e.value))
    assert (type(again), again.errno, again.argument, again.value) == (DmaValueError, errno.EINVAL, "size", -1)
    fault = pickle.loads(pickle.dumps(dmapath.DmaFault("x", iova=5, reason="r", done=3, write=True)))
    assert (fault.iova, fault.reason, fault.done, fault.write, fault.errno) == (5, "r", 3, True, errno.EFAULT)
    assert all(issubclass(getattr(dmapath, n), (DmaError, OSError)) for n in dmapath.__all__ if n.endswith("Error"))


def test_a_freed_state_is_refused() -> None:
    dev = strict()
    st = dev.iova_try_alloc(0, 0x1000)
    dev.iova_free(st)
    for call in (dev.iova_free, lambda s: dev.iova_destroy(s, 0), lambda s: dev.iova_link(s, 0, 0, 1)):
        with pytest.raises(StateError, match="freed"):
            call(st)
    assert not any(live(dev).values())


def test_a_mapping_is_unmapped_once() -> None:
    dev = strict()
    m = dev.map(Bio(GAPPED))
    m.unmap()
    with pytest.raises(StateError, match="already"):
        m.unmap()
    assert (m.layout, m.case, len(m.segments), m.unmap_state_bytes) == ("gapped", "iommu-unaligned", 3, 16)
    with dev.map(Bio(GAPPED)) as m:
        m.unmap()
    assert not any(live(dev).values())


def test_a_dropped_mapping_warns_and_is_unmapped() -> None:
    dev = strict()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dev.map(Bio(GAPPED))
        gc.collect()
    assert [w.category for w in seen] == [ResourceWarning]
    assert not any(live(dev).values())


# ---- the layouts


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("policy", ["unified", "linux"])
@pytest.mark.parametrize("shift", [0, 0x123])
def test_any_number_of_ranges(n: int, policy: Any, shift: int, memory: PhysMemory) -> None:
    dev = strict(memory=memory)
    arena = PhysMemory(3 * 4096 * n)
    bio = Bio.from_memory(arena, [(3 * 4096 * i + shift, 4096 - 2 * shift) for i in range(n)], op="write")
    dev = strict(memory=arena)
    memoryview(arena)[:] = bytes(i * 7 & 255 for i in range(len(arena)))
    with dev.map(bio, policy) as m:
        assert len(m) == (1 if not shift or n == 1 else n)
        want = b"".join(bytes(memoryview(arena)[p - (1 << 32) : p - (1 << 32) + k]) for p, k in bio.vecs)
        assert dmapath.DmaEngine(dev).read(m.segments) == want
    assert not any(live(dev).values())


@pytest.mark.parametrize("policy", ["unified", "linux"])
@pytest.mark.parametrize("dev", [strict(), Device()], ids=["iommu", "direct"])
def test_start_next_unmap(dev: Device, policy: str) -> None:
    m = dev.map_start(Bio(GAPPED), policy)
    first = m.next()
    assert first is not None
    rest = []
    while (s := m.next()) is not None:
        rest.append(s)
    assert m.next() is None
    assert [first, *rest] == m.segments
    assert [s.length for s in m] == [n for _, n in GAPPED]
    m.unmap()
    assert not any(live(dev).values())


def test_next_can_fail_and_undoes_the_request() -> None:
    dev = Device(dma_mask=2**32 - 1)
    m = dev.map_start(Bio([(0x1000, 0x1000), (1 << 32, 0x1000)]))
    assert m.next() is not None
    with pytest.raises(dmapath.NoMemoryError, match="reach"):
        m.next()
    with pytest.raises(StateError, match="already"):
        m.unmap()


def test_gapped_is_one_of_everything() -> None:
    dev = strict()
    with dev.map(Bio(GAPPED)) as m:
        assert (m.layout, m.case, m.unmap_state_bytes) == ("gapped", "iommu-unaligned", 16)
        assert [(int(s.addr) & 0xFFF, s.length) for s in m] == [(p & 0xFFF, n) for p, n in GAPPED]
        assert len({int(s.addr) >> 12 for s in m}) == 3
    c = dev.counters()
    counts = ("iova_allocs", "links", "syncs", "unlinks", "iova_frees", "invalidations")
    assert [c[k] for k in counts] == [1, 3, 1, 1, 1, 1]


def test_a_non_coherent_device_keeps_its_ranges() -> None:
    dev = strict(coherent=False)
    with dev.map(Bio(GAPPED)) as m:
        assert (m.layout, m.unmap_state_bytes, m.rules) == ("per-range", 48, ["non-coherent"])
    assert dev.counters()["cache_inval_bytes"] == sum(n for _, n in GAPPED)


def test_one_range_is_cut_at_the_devices_segment_limits() -> None:
    pages = [(0x100000 + i * 0x3000, 0x1000) for i in range(5)]
    dev = strict(max_segment_size=0x2000)
    with dev.map(Bio(pages)) as m:
        assert (m.layout, [s.length for s in m]) == ("linear", [0x2000, 0x2000, 0x1000])
        assert "segment-cut" in m.rules
    dev = strict(seg_boundary_mask=0x1FFF)
    with dev.map(Bio(pages)) as m:
        assert all(int(s.addr) // 0x2000 == (int(s.addr) + s.length - 1) // 0x2000 for s in m)
        assert sum(s.length for s in m) == 0x5000


@pytest.mark.parametrize(
    ("kw", "vecs", "rule"),
    [
        ({"dma_alignment": 3}, [(0x100001, 0x1000)], "dma_alignment"),
        ({"dma_alignment": 3}, [(0x100000, 0x1002)], "dma_alignment"),
        ({"virt_boundary": 0xFFF}, GAPPED, "virt_boundary"),
        ({"max_segments": 2}, GAPPED, "max_segments"),
    ],
)
def test_the_devices_limits_are_stated_and_kept(kw: Any, vecs: Any, rule: str) -> None:
    for dev in (strict(**kw), Device(**kw)):
        with pytest.raises(DmaValueError if rule == "max_segments" else AlignmentError, match=rule) as e:
            dev.map(Bio(vecs))
        assert e.value.errno == errno.EINVAL
        assert not any(live(dev).values())
        if rule != "dma_alignment":
            for piece in Bio(vecs).split(dev, block_size=0x100):
                dev.map(piece).unmap()


def test_an_aligned_request_passes_a_virt_boundary_in_one_piece() -> None:
    with strict(virt_boundary=0xFFF, max_segments=1).map(Bio([(0x100200, 0xE00), (0x300000, 0x800)])) as m:
        assert len(m) == 1


def test_split_keeps_every_byte_in_order() -> None:
    vecs = [(0x100000, 0x5000), (0x200800, 0x800), (0x300000, 0x7000), (0x400000, 0x200)]
    bio = Bio(vecs, sector=8)
    for kw in ({"max_segments": 2}, {"max_segment_size": 0x1000, "max_segments": 3}, {"virt_boundary": 0xFFF}):
        pieces = bio.split(Device(**kw), max_bytes=0x6000)  # type: ignore[arg-type]
        flat = [(int(p) + k) for b in pieces for p, n in b.vecs for k in range(0, n, 0x200)]
        assert flat == [p + k for p, n in vecs for k in range(0, n, 0x200)]
        assert all(b.total <= 0x6000 and b.total % 512 == 0 for b in pieces)
        assert pieces[0].sector == 8
        assert pieces[-1].sector + pieces[-1].total // 512 == 8 + bio.total // 512
    assert bio.split(Device()) == [bio]
    with pytest.raises(AlignmentError, match="block"):
        bio.split(Device(), max_bytes=256)


def test_the_linux_policy_hands_a_range_out_whole_where_the_caller_answers_for_the_limits() -> None:
    dev, bio = strict(max_segment_size=0x1000), Bio([(0x100000, 0x1000), (0x300000, 0x1000)])
    with dev.map(bio, "linux", split=True) as m:
        assert [s.length for s in m] == [0x2000]
    with dev.map(bio, "linux") as m:
        assert ([s.length for s in m], m.layout) == ([0x1000, 0x1000], "linear")


def test_no_iova_left_falls_back_and_then_fails_whole() -> None:
    dev = strict(dma_mask=0xFFFF)
    holes = [dev.iova_try_alloc(0, 0x1000) for _ in range(15)]
    for st in holes[::2]:
        dev.iova_free(st)  # eight single pages, none adjacent
    before = live(dev)
    with dev.map(Bio([(0x100000 + 0x3000 * i, 0x1000) for i in range(4)])) as m:
        assert (m.layout, len(m)) == ("per-range", 4)
        assert "iova-full" in m.rules
    assert live(dev) == before
    with pytest.raises(dmapath.NoMemoryError, match="IOVA"):
        dev.map(Bio([(0x100000 + 0x3000 * i, 0x1000) for i in range(9)]))
    assert live(dev) == before


def test_an_empty_request_maps_to_nothing() -> None:
    for dev in (strict(), Device()):
        with dev.map(Bio([])) as m:
            assert (m.segments, m.layout, m.case) == ([], "none", "empty")


# ---- memory regions


@pytest.mark.parametrize("policy", ["unified", "linux"])
def test_a_region_maps_whole_pages_and_has_an_mtt(policy: Any, memory: PhysMemory) -> None:
    dev = strict(memory=memory)
    region = MemoryRegion.from_memory(memory, 0x1234, 0x8000, iova=0x7F0000001234)
    with dev.map(region, policy) as m:
        assert sum(s.length for s in m) == 9 * 4096
        mtt = region.mtt(m.segments, 4096)
        assert len(mtt) == 9
        assert [dev.backend.iova_to_phys(a) for a in mtt] == [p for p, _ in region.vecs]
        assert region.best_page_size(m.segments, 4096 | 1 << 21) == 4096
    assert dev.explain(region, policy).exposed_bytes == 4096


def test_a_huge_region_uses_large_pages() -> None:
    memory = PhysMemory(8 << 20, layout="huge")
    dev = strict(memory=memory)
    region = MemoryRegion.from_memory(memory, 0, 8 << 20)
    with dev.map(region) as m:
        assert len(m) == 1
        c = dev.counters()
        assert (c["ptes_4k"], c["ptes_2m"]) == (0, 4)


def test_a_region_must_be_coherent() -> None:
    with pytest.raises(dmapath.NotSupportedError):
        strict(coherent=False).map(MemoryRegion([(0x1000, 0x1000)], length=10))


# ---- explain


def test_explain_changes_nothing_and_repeats() -> None:
    dev = strict()
    dev.map(Bio([(0x100000, 0x1000)])).unmap()
    before = dev.counters()
    first, second = (dev.explain(Bio(GAPPED), "linux").to_dict() for _ in range(2))
    assert first == second
    assert dev.counters() == before
    assert list(first) == [
        "case", "layout", "segments", "iova_allocs", "iova_bytes", "maps", "ptes", "invalidations", "bounced",
        "unmap_state_bytes", "exposed_bytes", "rules", "error",
    ]  # fmt: skip
    assert (first["layout"], first["iova_allocs"], first["error"]) == ("per-range", 3, None)
    assert {r["rule"] for r in first["rules"]} == {"gap", "flush-strict", "exposure"}
    assert all(r["source"] and r["because"] for r in first["rules"])


@pytest.mark.parametrize("policy", ["unified", "linux"])
@pytest.mark.parametrize("dev", [strict(), lazy(), Device(), strict(coherent=False)], ids=["strict", "lazy", "direct", "nc"])
@pytest.mark.parametrize("vecs", [[(0x100000, 0x1000)], GAPPED, [(0x100200, 0xE00), (0x300000, 0x10)]])
def test_explain_says_what_map_does(policy: Any, dev: Device, vecs: Any) -> None:
    told = dev.explain(Bio(vecs), policy)
    fresh = dev.fresh()
    with fresh.map(Bio(vecs), policy) as m:
        assert (told.case, told.layout) == (m.case, m.layout)
        assert told.segments == [(int(s.addr), s.length) for s in m]
        assert told.unmap_state_bytes == m.unmap_state_bytes
    c = fresh.counters()
    assert (told.iova_allocs, told.invalidations, told.ptes["4k"]) == (
        c["iova_allocs"], c["invalidations"], c["ptes_4k"])  # fmt: skip


def test_explain_names_what_would_bounce() -> None:
    told = strict(untrusted=True).explain(Bio([(0x100200, 0x2000)]))
    assert told.bounced == [("head", 0x100200, 0xE00), ("tail", 0x102000, 0x200)]
    assert told.error is not None
    assert told.error.startswith("ENOMEM")
    assert [r[0] for r in told.rules] == ["bounce-needed", "no-pool"]


def test_exposed_bytes_count_each_physical_byte_once() -> None:
    told = strict().explain(Bio([(0x100200, 0x200), (0x100600, 0x200)]))  # two ranges of one page
    assert told.exposed_bytes == 0x1000 - 0x400
    assert told.ptes["4k"] == 2
