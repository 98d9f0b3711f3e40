"""The behaviour of Linux 7.3, row by row: each test is named by its row of the kernel reference (section 15).

Rows about swiotlb are in test_swiotlb.py, about P2P, Xen and HMM in theirs, 78 in test_iova_properties.py and 80 in
test_every_back_end.py; the last test here counts them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import lazy, live, strict

from dmapath import (
    Bio,
    Device,
    DmaAddr,
    DmaEngine,
    DmaValueError,
    Iommu,
    MemoryRegion,
    PhysMemory,
    Request,
    XenDomain,
    mr,
    replay,
    trace,
)
from dmapath.descriptors import build_prp
from dmapath.mr import LOCAL_WRITE, REMOTE_READ, REMOTE_WRITE, FastMr
from dmapath.request import iterate

ErrnoOf = Callable[..., int]
THREE = [(0x100200, 0xE00), (0x205000, 0x1000), (0x30A000, 0x400)]
TRACES = Path(__file__).parent / "data" / "traces"


def events(dev: Device, *kinds: str) -> list[tuple[Any, ...]]:
    return [e for e in dev.backend.events() if e[0] in kinds]


def linked(dev: Device, vecs: list[tuple[int, int]], dir: str = "bidirectional") -> Any:
    st = dev.iova_try_alloc(vecs[0][0], sum(n for _, n in vecs))
    at = 0
    for phys, n in vecs:
        dev.iova_link(st, phys, at, n, dir)
        at += n
    dev.iova_sync(st, 0, at)
    return st


def test_row_1_first_allocations_come_from_the_top_of_4_gib() -> None:
    dev = strict()
    assert [dev.iova_try_alloc(0, 0x1000).addr for _ in range(2)] == [0xFFFFF000, 0xFFFFE000]


@pytest.mark.parametrize(("mask", "want"), [(2**64 - 1, 0xFFFFFFFFFFFFF000), (2**48 - 1, 0xFFFFFFFFF000)])
def test_row_3_forcedac_starts_at_the_top_of_the_mask(mask: int, want: int) -> None:
    assert strict(forcedac=True, dma_mask=mask).iova_try_alloc(0, 0x1000).addr == want


def test_row_4_an_unaligned_start_takes_a_page_more_and_keeps_its_offset() -> None:
    dev = strict()
    st = dev.iova_try_alloc(0x12345200, 0x1000)
    assert (st.addr, st.size) == (0xFFFFE200, 0x1000)
    assert live(dev)["iova_live_bytes"] == 0x2000


def test_row_5_refusals_leave_no_state() -> None:
    passthrough = Device(iommu=Iommu("passthrough"))
    xen = Device(memory=(memory := PhysMemory(4096)), xen=XenDomain(memory))
    for dev, size in ((strict(), 0), (strict(), 2**63 | 0x1000), (Device(), 0x1000), (passthrough, 0x1000), (xen, 0x1000)):
        assert dev.iova_try_alloc(0, size) is None
        assert not any(live(dev).values())


@pytest.mark.parametrize(
    ("size", "want"),
    [(0x1000, [0xF000 - i * 0x1000 for i in range(15)]), (0x3000, [0xC000, 0x8000, 0x4000])],
)
def test_row_6_a_16_bit_mask_runs_out(size: int, want: list[int]) -> None:
    dev = strict(dma_mask=0xFFFF)
    got = []
    while (st := dev.iova_try_alloc(0, size)) is not None:
        got.append(int(st.addr))
    assert got == want


def test_row_8_freed_ranges_come_back_last_in_first_out() -> None:
    dev = strict()
    a, b = (dev.iova_try_alloc(0, 0x1000) for _ in range(2))
    dev.iova_free(a)
    dev.iova_free(b)
    assert [dev.iova_try_alloc(0, 0x1000).addr for _ in range(2)] == [0xFFFFE000, 0xFFFFF000]


def test_row_9_128_kib_unaligned_is_33_pages_and_not_cached() -> None:
    dev = strict()
    for _ in range(2):
        st = dev.iova_try_alloc(0x200, 0x20000)
        assert st.addr == 0xFFFC0200
        assert live(dev)["iova_live_bytes"] == 33 * 0x1000
        dev.iova_free(st)
        assert dev.backend.stats()["iova_cached"] == 0


def test_row_10_three_bvecs_link_side_by_side() -> None:
    dev = strict()
    dev.backend.record(True)
    st = linked(dev, THREE)
    assert st.addr == 0xFFFFC200
    assert [e[1:] for e in events(dev, "map")] == [
        (0xFFFFC000, 0x100000, 0x1000),
        (0xFFFFD000, 0x205000, 0x1000),
        (0xFFFFE000, 0x30A000, 0x1000),
    ]
    assert [e[1:3] for e in events(dev, "sync")] == [(0xFFFFC000, 0x3000)]
    translate = dev.backend.iova_to_phys
    assert [translate(int(st.addr) + k) for k in (0, 0xE00, 0x1E00)] == [0x100200, 0x205000, 0x30A000]


def test_row_11_destroy_is_one_unmap_and_one_flush() -> None:
    dev = strict()
    st = linked(dev, THREE)
    dev.backend.record(True)
    dev.iova_destroy(st, 0x2200)
    assert [e[1:] for e in events(dev, "unmap")] == [(0xFFFFC000, 0x3000, 0x3000)]
    assert [e[1:] for e in events(dev, "flush")] == [(0xFFFFC000, 0xFFFFEFFF, 2)]
    assert dev.iova_try_alloc(0x200, 0x2200).addr == 0xFFFFC200


def test_row_12_a_later_range_must_begin_on_a_granule(errno_of: ErrnoOf) -> None:
    dev = strict()
    st = dev.iova_try_alloc(0, 0x3000)
    dev.iova_link(st, 0x100000, 0, 0x1000)
    before = dev.counters()
    assert errno_of(dev.iova_link, st, 0x205200, 0x1000, 0x1000) == errno.EIO
    assert dev.counters() == before


FORMATS = pytest.mark.parametrize("format", ["x86", "arm"])


@FORMATS
def test_row_13_an_offset_inside_a_granule(format: str, errno_of: ErrnoOf) -> None:
    dev = strict(format=format)
    st = dev.iova_try_alloc(0, 0x3000)
    want = errno.ENXIO if format == "x86" else errno.EINVAL
    assert errno_of(dev.iova_link, st, 0x205000, 0x200, 0x1000) == want


@FORMATS
def test_row_14_a_first_range_unlike_the_state(format: str, errno_of: ErrnoOf) -> None:
    dev = strict(format=format)
    st = dev.iova_try_alloc(0, 0x3000)
    want = errno.ENXIO if format == "x86" else errno.EINVAL
    assert errno_of(dev.iova_link, st, 0x205200, 0, 0x1000) == want


@FORMATS
def test_row_15_linking_twice(format: str, errno_of: ErrnoOf) -> None:
    dev = strict(format=format)
    st = dev.iova_try_alloc(0, 0x3000)
    dev.iova_link(st, 0x100000, 0x1000, 0x1000)
    before = live(dev)
    want = errno.EADDRINUSE if format == "x86" else errno.EEXIST
    assert errno_of(dev.iova_link, st, 0x200000, 0x1000, 0x1000) == want
    assert errno_of(dev.iova_link, st, 0x200000, 0, 0x2000) == want
    assert live(dev) == before
    assert dev.backend.iova_to_phys(int(st.addr) + 0x1000) == 0x100000
    assert dev.backend.iova_to_phys(int(st.addr)) is None


def test_row_16_a_link_outside_the_state(errno_of: ErrnoOf) -> None:
    dev = strict()
    st = dev.iova_try_alloc(0, 0x1000)
    assert errno_of(dev.iova_link, st, 0x100000, 0x1000, 0x1000) == errno.ERANGE
    assert errno_of(dev.iova_link, st, 0x100000, 0, 0x2000) == errno.ERANGE
    as_linux = strict(kernel_quirks=True, dma_mask=0xFFFFFF)
    st = as_linux.iova_try_alloc(0, 0x1000)
    as_linux.iova_link(st, 0x100000, 0x1000, 0x1000)
    assert as_linux.backend.iova_to_phys(int(st.addr) + 0x1000) == 0x100000


@pytest.mark.parametrize(
    ("kw", "attrs", "want"),
    [
        ({}, 0, (7, 5, 6)),
        ({"coherent": False}, 0, (3, 1, 2)),
        ({}, "mmio", (0x13, 0x11, 0x12)),
        ({}, "privileged", (0x27, 0x25, 0x26)),
    ],
)
def test_row_17_protection_bits(kw: dict[str, bool], attrs: Any, want: tuple[int, ...], errno_of: ErrnoOf) -> None:
    for dir, prot in zip(("bidirectional", "to_device", "from_device"), want, strict=True):
        dev = strict(**kw)
        st = dev.iova_try_alloc(0, 0x1000)
        dev.iova_link(st, 0x100000, 0, 0x1000, dir, attrs)
        assert dev.backend.prot_of(st.addr) == prot
    dev = strict()
    st = dev.iova_try_alloc(0, 0x1000)
    assert errno_of(dev.iova_link, st, 0x100000, 0, 0x1000, "none") == errno.EINVAL


def test_row_18_cache_maintenance_of_a_non_coherent_device() -> None:
    dev = strict(coherent=False)
    dev.backend.record(True)
    st = dev.iova_try_alloc(0x100200, 0x1E00)
    dev.iova_link(st, 0x100200, 0, 0x1E00)
    assert [e[1:3] for e in events(dev, "cache_clean", "barrier")] == [(0x100000, 0x2000)]
    dev.iova_sync(st, 0, 0x1E00)
    dev.iova_destroy(st, 0x1E00)
    assert [e[1:3] for e in events(dev, "cache_inval")] == [(0x100200, 0xE00), (0x101000, 0x1000)]
    assert dev.counters()["barriers"] == 2


@pytest.mark.parametrize("attrs", ["skip_cpu_sync", "mmio"])
def test_row_19_no_cache_maintenance_but_the_barrier_of_sync(attrs: str) -> None:
    dev = strict(coherent=False)
    st = dev.iova_try_alloc(0x100200, 0x1E00)
    dev.iova_link(st, 0x100200, 0, 0x1E00, attrs=attrs)
    dev.iova_sync(st, 0, 0x1E00)
    dev.iova_destroy(st, 0x1E00, attrs=attrs)
    c = dev.counters()
    assert (c["cache_clean_bytes"], c["cache_inval_bytes"], c["barriers"]) == (0, 0, 1)


def test_row_20_memory_that_must_be_coherent_on_a_device_that_is_not(errno_of: ErrnoOf) -> None:
    dev = strict(coherent=False)
    st = dev.iova_try_alloc(0, 0x1000)
    assert errno_of(dev.iova_link, st, 0x100000, 0, 0x1000, attrs="require_coherent") == errno.EOPNOTSUPP
    before = live(dev)
    with pytest.raises(OSError, match="coherent"):
        dev.map_phys(0x100000, 0x1000, attrs="require_coherent")
    assert live(dev) == before


def test_row_25_untrusted_and_aligned_does_not_bounce() -> None:
    dev = strict(untrusted=True, min_align_mask=0xFFF)
    st = dev.iova_try_alloc(0x100000, 0x2000)
    dev.iova_link(st, 0x100000, 0, 0x2000)
    assert dev.backend.iova_to_phys(st.addr) == 0x100000


@pytest.mark.parametrize("attrs", ["mmio", "require_coherent"])
def test_row_26_untrusted_memory_that_must_not_bounce(attrs: str, errno_of: ErrnoOf) -> None:
    dev = strict(untrusted=True)
    st = dev.iova_try_alloc(0x100200, 0x1000)
    assert errno_of(dev.iova_link, st, 0x100200, 0, 0x1000, attrs=attrs) == errno.EPERM


def test_row_27_untrusted_without_a_pool(errno_of: ErrnoOf) -> None:
    dev = strict(untrusted=True)
    st = dev.iova_try_alloc(0x100200, 0x1000)
    assert errno_of(dev.iova_link, st, 0x100200, 0, 0x1000) == errno.ENOMEM
    with pytest.raises(OSError, match="swiotlb"):
        dev.map_phys(0x100200, 0x1000)
    dev.iova_free(st)
    assert not any(live(dev).values())


def test_row_30_lazy_two_step_flushes_now() -> None:
    dev = lazy()
    st = linked(dev, THREE)
    dev.iova_destroy(st, 0x2200)
    c = dev.counters()
    assert (c["invalidations_ranged"], c["invalidations_full"], c["queued"], c["iova_live"]) == (1, 0, 0, 0)


def test_row_31_lazy_classic_waits_for_the_timer() -> None:
    dev = lazy()
    addr = dev.map_phys(0x100000, 0x1000)
    dev.unmap_phys(addr, 0x1000)
    c = dev.counters()
    assert (c["invalidations"], c["queued"], c["iova_live"]) == (0, 1, 1)
    assert dev.map_phys(0x100000, 0x1000) != addr
    dev.iommu.advance(9_999_999)
    assert dev.counters()["invalidations"] == 0
    dev.iommu.advance(1)
    c = dev.counters()
    assert (c["invalidations_full"], c["queued"], c["iova_live"]) == (1, 0, 1)
    assert dev.map_phys(0x200000, 0x1000) == addr


def test_row_32_the_256th_queued_unmap_flushes_everything() -> None:
    dev = lazy()
    for i in range(255):
        dev.unmap_phys(dev.map_phys(0x100000 + i * 0x1000, 0x1000), 0x1000)
    assert (dev.counters()["queued"], dev.counters()["invalidations_full"]) == (255, 0)
    dev.unmap_phys(dev.map_phys(0x900000, 0x1000), 0x1000)
    assert (dev.counters()["queued"], dev.counters()["invalidations_full"]) == (1, 1)


def test_row_33_what_is_queued_during_a_flush_waits_for_the_next() -> None:
    dev = lazy()
    addrs = [dev.map_phys(0x100000 + i * 0x1000, 0x1000) for i in range(2)]
    dev.unmap_phys(addrs[0], 0x1000)
    for half in dev.backend.flush_halves():
        assert half is None
        dev.unmap_phys(addrs[1], 0x1000)
    third = dev.map_phys(0x300000, 0x1000)
    dev.unmap_phys(third, 0x1000)  # drops what the flush has covered: the first entry alone
    assert dev.counters()["queued"] == 2
    dev.backend.flush()
    assert dev.counters()["queued"] == 0


def test_row_34_an_untrusted_device_is_strict_whatever_the_default() -> None:
    unit = Iommu("lazy")
    assert Device(iommu=unit, untrusted=True).backend.mode == "strict"
    assert Device(iommu=unit).backend.mode == "lazy"


def sg(dev: Device, vecs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    segments = dev.map_sg(Bio.from_phys(vecs))
    base = int(segments[0].addr) & ~0xFFF
    out = [(int(s.addr) - base, s.length) for s in segments]
    dev.unmap_sg(segments)
    assert not any(live(dev).values())
    return out


def test_row_35_a_list_that_fits() -> None:
    assert sg(strict(), [(0x100200, 0xE00), (0x205000, 0x1000), (0x30A000, 0x400)]) == [(0x200, 0x2200)]


def test_row_36_a_list_that_does_not() -> None:
    dev = strict()
    dev.backend.record(True)
    assert sg(dev, [(0x100200, 0x600), (0x205100, 0x200), (0x30A000, 0x1000)]) == [
        (0x200, 0x600),
        (0x1100, 0x200),
        (0x2000, 0x1000),
    ]
    assert [e[2] for e in events(dev, "alloc")] == [0x3000]


def test_row_37_adjacent_pages_share_a_map_call() -> None:
    dev = strict()
    dev.backend.record(True)
    vecs = [(0x100000, 0x1000), (0x101000, 0x1000), (0x300000, 0x800), (0x400000, 0x1000)]
    assert sg(dev, vecs) == [(0, 0x2800), (0x3000, 0x1000)]
    assert events(dev, "map")[0][3] == 0x2000


def test_row_38_64_kib_segments_by_default() -> None:
    assert sg(strict(), [(0x100000 + i * 0x2000, 0x1000) for i in range(17)]) == [(0, 0x10000), (0x10000, 0x1000)]


def test_section_2_2_segment_boundary_pads_and_splits() -> None:
    dev = strict(seg_boundary_mask=0x1FFF)
    dev.backend.record(True)
    vecs = [(0x100000, 0x1000), (0x200000, 0x2000), (0x300000, 0x1000)]
    assert sg(dev, vecs) == [(0, 0x1000), (0x2000, 0x2000), (0x4000, 0x1000)]
    assert [e[3] for e in events(dev, "map")] == [0x2000, 0x2000, 0x1000]


def test_row_42_untrusted_lists_are_mapped_entry_by_entry() -> None:
    dev = strict(untrusted=True)
    segments = dev.map_sg(Bio.from_phys([(0x100000, 0x1000), (0x101000, 0x1000)]))
    assert len(segments) == 2
    assert dev.counters()["iova_allocs"] == 2
    dev.unmap_sg(segments)
    with pytest.raises(OSError, match="swiotlb") as e:  # its third entry would bounce, and there is no pool
        dev.map_sg(Bio.from_phys([(0x100000, 0x1000), (0x101000, 0x1000), (0x200010, 0x20)]))
    assert e.value.errno == errno.EIO
    assert not any(live(dev).values())


@pytest.mark.parametrize(
    ("phys", "iova", "size", "want"),
    [
        (0x100201000, 0xFFE01000, 0x400000, (512, 1, 0)),
        (0x100202000, 0xFFE01000, 0x400000, (1024, 0, 0)),
        (0x80000000, 0x40000000, 0x40201000, (1, 1, 1)),
    ],
)
def test_row_43_page_sizes(phys: int, iova: int, size: int, want: tuple[int, int, int]) -> None:
    dev = strict()
    assert dev.backend.map_raw(iova, phys, size) == 0
    c = dev.counters()
    assert (c["ptes_4k"], c["ptes_2m"], c["ptes_1g"]) == want
    for k in (0, 0xFFF, size // 2, size - 1):
        assert dev.backend.iova_to_phys(iova + k) == phys + k
    assert dev.backend.unmap_raw(iova, size) == size
    assert live(dev)["mapped_bytes"] == 0


@pytest.mark.parametrize(("format", "first", "second"), [("x86", 0x200000, 0), ("arm", 0, 0)])
def test_row_44_half_of_a_large_leaf(format: str, first: int, second: int) -> None:
    for start, want in ((0, first), (0x100000, second)):
        dev = strict(format=format)
        assert dev.backend.map_raw(0x40000000, 0x80000000, 0x200000) == 0
        assert dev.backend.unmap_raw(0x40000000 + start, 0x100000) == want
        assert dev.backend.iova_to_phys(0x40000000) == (None if want else 0x80000000)


def test_row_45_a_hole_stops_unmap(errno_of: ErrnoOf) -> None:
    dev = strict()
    dev.backend.map_raw(0x10000, 0x100000, 0x2000)
    dev.backend.map_raw(0x13000, 0x100000, 0x1000)
    assert dev.backend.unmap_raw(0x10000, 0x4000) == 0x2000
    assert dev.backend.iova_to_phys(0x13000) == 0x100000
    st = dev.iova_try_alloc(0, 0x3000)
    dev.iova_link(st, 0x100000, 0, 0x1000)
    assert errno_of(dev.iova_unlink, st, 0, 0x3000) == errno.ENOENT


def test_row_50_direct_beyond_the_mask_without_a_pool(errno_of: ErrnoOf) -> None:
    dev = Device(dma_mask=2**32 - 1)
    assert errno_of(dev.map_phys, 1 << 32, 0x1000) == errno.ENOMEM
    assert errno_of(dev.map_phys, (1 << 32) - 0x800, 0x1000) == errno.ENOMEM
    assert dev.map_phys((1 << 32) - 0x1000, 0x1000) == 0xFFFFF000


def test_row_51_bus_offsets(errno_of: ErrnoOf) -> None:
    dev = Device(dma_ranges=[(0x80000000, 0, 0x40000000)])
    assert dev.map_phys(0x80001000, 0x1000) == 0x1000
    assert errno_of(dev.map_phys, 0xC0000000, 0x1000) == errno.ENOMEM


def test_row_54_no_gap_one_range() -> None:
    bio = Bio.from_phys(THREE)
    assert bio.gap_bit == 13
    dev = strict()
    with dev.map(bio, "linux") as m:
        assert (m.layout, [(int(s.addr), s.length) for s in m]) == ("linear", [(0xFFFFC200, 0x2200)])


def test_row_55_a_gap_many_ranges() -> None:
    bio = Bio.from_phys([(0x100200, 0x600), (0x205000, 0x1000)])
    assert bio.gap_bit == 12
    dev = strict()
    with dev.map(bio, "linux") as m:
        assert (m.layout, len(m), dev.counters()["maps"]) == ("per-range", 2, 2)
    assert dev.counters()["unmaps"] == 2


def test_row_56_contiguous_pieces_of_one_bio_still_gap() -> None:
    bio = Bio.from_phys([(0x100000, 0x200), (0x100200, 0x200), (0x100400, 0xC00)])
    assert bio.gap_bit == 10
    dev = strict()
    assert iterate(bio, dev) == [(0x100000, 0x1000)]
    with dev.map(bio, "linux") as m:
        assert (m.layout, len(m)) == ("per-range", 1)
    with dev.map(bio) as m:
        assert m.layout == "linear"


def test_row_58_adjacent_bios_merge() -> None:
    rq = Request([Bio.from_phys([(0x100000, 0x1000)]), Bio.from_phys([(0x101000, 0x1000)])])
    assert rq.gap_mask == 0
    assert iterate(rq, strict()) == [(0x100000, 0x2000)]
    apart = Request([Bio.from_phys([(0x100000, 0x800)]), Bio.from_phys([(0x101000, 0x1000)])])
    assert apart.gap_bit == 12


def test_row_59_a_failed_link_undoes_the_request(errno_of: ErrnoOf) -> None:
    dev = strict()
    taken = dev.backend.map_raw(0xFFFFE000, 0x900000, 0x1000)  # in the way of the third link
    assert taken == 0
    before = live(dev)
    for policy in ("linux", "unified"):
        assert errno_of(dev.map, Bio.from_phys(THREE), policy) == errno.EADDRINUSE
        assert live(dev) == before


def test_row_60_a_132_kib_read_splits(memory: PhysMemory) -> None:
    dev = strict(max_segments=256, dma_alignment=3)
    bio = Bio.from_memory(PhysMemory(1 << 20, layout="scattered"), [(0, 132 << 10)])
    first, second = bio.split(dev, max_bytes=128 << 10)
    assert (first.total, second.total, second.sector) == (128 << 10, 4 << 10, 256)
    assert (len(iterate(first, dev)), len(iterate(second, dev))) == (32, 1)


def test_row_63_who_must_keep_addresses() -> None:
    assert not Device().need_unmap
    assert Device(coherent=False).need_unmap
    assert strict().need_unmap


def test_row_64_fast_registration_lists() -> None:
    def pages(segs: list[tuple[int, int]], **kw: Any) -> tuple[Any, ...]:
        return mr.sg_to_pages(segs, **kw)

    assert pages([(0x10200, 0xE00), (0x20000, 0x1000), (0x30000, 0x800)]) == (
        3, 0x10200, 0x2600, [0x10000, 0x20000, 0x30000], 0)  # fmt: skip
    assert pages([(0x10200, 0x600), (0x20000, 0x1000)])[0] == 1
    n, _, length, got, _ = pages([(0x10200, 0x600), (0x10800, 0x800), (0x30000, 0x1000)])
    assert (n, length, got) == (3, 0x1E00, [0x10000, 0x30000])
    assert pages([(0x10000, 0x1000), (0x20200, 0x200)])[0] == 1
    assert pages([(0x10000, 0x3000)], sg_offset=0x1200) == (1, 0x11200, 0x1E00, [0x11000, 0x12000], 0)
    assert pages([(0x12000, 0xE000), (0x40000, 0x10000)], page_size=0x10000)[3] == [0x10000, 0x40000]
    assert pages([(0x10000, 0x3000)], max_pages=2) == (0, 0x10000, 0x2000, [0x10000, 0x11000], 0x2000)
    assert pages([(0x10000, 0x3000)], max_pages=2, kernel_quirks=True)[2::2] == (0x1000, 0x1000)


ALL = 1 << 12 | 1 << 16 | 1 << 21 | 1 << 30


def test_row_65_best_page_size() -> None:
    va = 0x7F0000200000
    best = mr.find_best_pgsz
    assert best([(0x100200000, 4 << 20)], 0, 4 << 20, va, ALL) == 1 << 30
    assert mr.dma_blocks([(0x100200000, 4 << 20)], 0, 4 << 20, va, 1 << 30) == [0x100000000]
    assert best([(0x100201000, 4 << 20)], 0, 4 << 20, va, ALL) == 4096
    assert len(mr.dma_blocks([(0x100201000, 4 << 20)], 0, 4 << 20, va, 4096)) == 1024
    assert best([(0x100200000, 2 << 20), (0x200000000, 2 << 20)], 0, 4 << 20, va, ALL) == 2 << 20
    assert best([(0x100010000, 1 << 16), (0x100030000, 1 << 16)], 0, 2 << 16, 0x7F0000210000, ALL) == 1 << 16
    # where two runs meet, the address there bounds the page, though each run by itself would allow 2 MiB
    assert best([(0x100010000, 1 << 16), (0x200020000, 1 << 16)], 0, 2 << 16, 0x7F0000210000, ALL) == 1 << 16
    three = [(0x100000, 0x1000), (0x300000, 0x1000), (0x500000, 0x1000)]
    assert best(three, 0x200, 0x2C00, va + 0x200, ALL) == 4096
    assert mr.dma_blocks(three, 0x200, 0x2C00, va + 0x200, 4096) == [0x100000, 0x300000, 0x500000]
    assert best([(0x100000, 0x3000)], 0x200, 0x2C00, 0x200, ALL) == 1 << 16
    assert len(mr.dma_blocks([(0x100000, 0x3000)], 0x200, 0x2C00, 0x200, 1 << 16)) == 1
    assert best([(0x100000, 0x3000)], 0x200, 0x2C00, 0, ALL) == 0
    assert best([(0x100000, 0x3000)], 0, 0x2000, 2**64 - 0x1000, ALL) == 0


def test_section_10_3_page_offset_masks() -> None:
    assert mr.find_best_pgoff([(0x100000, 0x9000)], 0x40, 0x8000, ALL, 0xFC0) == 1 << 16
    assert mr.find_best_pgoff([(0x100000, 0x9000)], 0x40, 0x8000, ALL, 0xF80) == 0


def test_row_61_prp_lists() -> None:
    base = 0x100000

    def lists(size: int, off: int = 0) -> tuple[list[int], str | None]:
        prp = build_prp([(base + off, size)])
        return [len(page) for page in prp.lists], prp.pool

    assert lists(128 << 10) == ([31], "small")
    assert lists(132 << 10) == ([32], "small")
    assert lists(136 << 10) == ([33], "large")
    assert lists((2 << 20) + 0x1000) == ([512], "large")
    assert lists((2 << 20) + 0x2000) == ([511, 2], "large")
    assert [len(page) for page in build_prp([(base + 0x200, 8 << 20)]).lists] == [511, 511, 511, 511, 4]
    two = build_prp([(base + 0x200, 0x2000)])
    assert (two.prp1, two.lists[0]) == (base + 0x200, [base + 0x1000, base + 0x2000])
    assert build_prp([(base, 0x1000)]).prp2 is None
    assert build_prp([(base + 0x200, 0x1000)]).prp2 == base + 0x1000
    with pytest.raises(DmaValueError, match="8 MiB"):
        build_prp([(base, 16 << 20)])


def test_row_54_the_prp_list_of_a_coalesced_request() -> None:
    dev = strict(min_align_mask=0xFFF)
    with dev.map(Bio.from_phys([(0x100200, 0xE00), (0x205000, 0x1000), (0x30A000, 0x400)]), "linux") as m:
        prp = build_prp(m.segments)
        addr = m.segments[0].addr
        assert (prp.prp1, prp.lists, prp.pool) == (addr, [[addr + 0xE00, addr + 0x1E00]], "small")


def test_row_62_a_malformed_middle_is_ioerr_and_everything_is_unmapped(errno_of: ErrnoOf) -> None:
    dev = strict()
    before = live(dev)
    with dev.map(Bio.from_phys([(0x100000, 0x1000), (0x205000, 0x800), (0x30A000, 0x1000)]), "linux") as m:
        assert errno_of(build_prp, m.segments) == errno.EIO
    assert live(dev) == before
    # Linux does not compare the first piece with what its entry covers
    wrong = [(0x100000, 0x800), (0x101000, 0x1000)]
    assert errno_of(build_prp, wrong) == errno.EIO
    assert build_prp(wrong, kernel_quirks=True).prp2 == 0x101000


def test_row_66_remote_write_needs_local_write(errno_of: ErrnoOf) -> None:
    assert errno_of(mr.check_access, mr.REMOTE_WRITE) == errno.EINVAL
    assert mr.check_access(mr.REMOTE_WRITE | mr.LOCAL_WRITE) == 3
    assert errno_of(mr.check_access, 1 << 12) == errno.EINVAL
    assert errno_of(mr.check_access, mr.ON_DEMAND) == errno.EOPNOTSUPP


def test_row_67_rereg_of_a_read_only_region(memory: PhysMemory, errno_of: ErrnoOf) -> None:
    region = MemoryRegion.from_memory(memory, 0x1000, 0x1000, access=mr.REMOTE_READ)
    assert errno_of(region.rereg, mr.LOCAL_WRITE) == errno.EACCES
    region.rereg(0)
    assert region.access == 0


def test_row_68_fast_registration_twice_or_under_a_wrong_key(errno_of: ErrnoOf) -> None:
    pd = object()
    mr = FastMr(0x1234, pd)
    assert mr.map([(0x10200, 0xE00), (0x20000, 0x1000), (0x30000, 0x800)]) == 3
    access = LOCAL_WRITE | REMOTE_READ
    assert errno_of(mr.reg, 0x1235 << 8, pd, access) == errno.EINVAL
    assert errno_of(mr.reg, 0x1234 << 8 | 7, object(), access) == errno.EINVAL
    mr.reg(0x1234 << 8 | 7, pd, access)
    assert errno_of(mr.reg, 0x1234 << 8 | 8, pd, access) == errno.EINVAL
    assert errno_of(mr.invalidate, 0x1234 << 8 | 8) == errno.EINVAL
    mr.check(0x10200, 0x2600, REMOTE_READ)
    for bad in ((0x10200, 0x2601, 0), (0x101FF, 1, 0), (2**64 - 1, 2, 0)):
        assert errno_of(mr.check, *bad) == errno.EINVAL
    assert errno_of(mr.check, 0x10200, 1, REMOTE_WRITE) == errno.EACCES
    mr.check(0, 0)  # a request of no bytes ignores key and address
    mr.invalidate(0x1234 << 8 | 7)
    assert errno_of(mr.check, 0x10200, 1) == errno.EACCES
    mr.reg(0x1234 << 8 | 8, pd, access)
    with pytest.raises(DmaValueError):
        FastMr(1, pd, page_size=3000)
    small = FastMr(1, pd, max_pages=2)
    assert small.map([(0x10000, 0x1000), (0x30000, 0x2000)]) == 1


def test_row_74_the_255th_free_fills_the_depot() -> None:
    dev = strict()
    states = [dev.iova_try_alloc(0, 0x1000) for _ in range(600)]
    depot = []
    for st in states:
        dev.iova_free(st)
        depot.append(dev.backend.stats()["iova_depot"])
    assert depot.index(1) == 254
    assert depot[-1] == 3
    assert dev.backend.stats()["iova_cached"] == 600


def test_row_75_cached_ranges_are_given_up_only_with_flush() -> None:
    dev = strict(dma_mask=0xFFFF)
    states = [dev.iova_try_alloc(0, 0x1000) for _ in range(15)]
    for st in states:
        dev.iova_free(st)
    assert dev.backend.alloc_raw(4, 0xF, flush=False) == 0
    assert dev.backend.alloc_raw(4, 0xF, flush=True) == 0xC


def test_section_3_4_holes_above_the_cached_node_wait() -> None:
    dev = strict()
    assert [dev.backend.alloc_raw(n, 0xFFFFF) for n in (1, 33, 1)] == [0xFFFFF, 0xFFFC0, 0xFFFBF]


def test_section_3_7_a_wrong_size_lands_in_the_wrong_class() -> None:
    dev = strict()
    pfn = dev.backend.alloc_raw(8, 0xFFFFF)
    dev.backend.free_raw(pfn, 3)
    assert dev.backend.alloc_raw(4, 0xFFFFF) == pfn


def test_section_3_9_uncached_ranges() -> None:
    dev = strict()
    a, b, c = (dev.backend.alloc_raw(64, 0xFFFFF) for _ in range(3))
    assert (a, b, c) == (0xFFFC0, 0xFFF80, 0xFFF40)
    dev.backend.free_raw(a, 64)
    assert dev.backend.alloc_raw(64, 0xFFFFF) == a
    dev.backend.free_raw(b, 64)
    assert dev.backend.alloc_raw(64, 0xFFFFF) == b
    assert dev.backend.alloc_raw(64, 0xFFFFF) == 0xFFF00


def test_row_79_strict_leaves_nothing_in_the_iotlb(memory: PhysMemory) -> None:
    dev = strict(memory=memory)
    bio = Bio.from_memory(memory, [(0x200, 0x600), (0x3000, 0x2000)], "write")
    with dev.map(bio) as m:
        DmaEngine(dev).read(m.segments)
        assert dev.iommu.iotlb()["entries"] == 3
    assert dev.iommu.iotlb_entries() == []


def test_row_79_lazy_keeps_a_stale_entry_until_the_flush(memory: PhysMemory) -> None:
    dev = lazy(memory=memory)
    engine = DmaEngine(dev)
    memory.write(memory.phys(0), b"secret!!")
    addr = dev.map_phys(memory.phys(0), 0x1000, "to_device")
    assert engine.read([(addr, 8)]) == b"secret!!"
    dev.unmap_phys(addr, 0x1000, "to_device")
    assert engine.read([(addr, 8)]) == b"secret!!"  # the window that lazy mode leaves open
    for _ in range(20):
        assert dev.iova_try_alloc(0, 0x1000).addr != addr  # but nobody else gets the address
    dev.iommu.advance(10_000_000)
    with pytest.raises(OSError, match="not present"):
        engine.read([(addr, 8)])


def test_row_81_failed_calls_leave_the_counters_as_they_were(errno_of: ErrnoOf) -> None:
    dev = strict(dma_mask=0xFFFF)
    st = dev.iova_try_alloc(0, 0x2000)
    before = dev.counters()
    assert errno_of(dev.iova_link, st, 0x100200, 0x1000, 0x100) == errno.EIO
    assert errno_of(dev.iova_link, st, 0x100000, 0, 0x3000) == errno.ERANGE
    assert errno_of(dev.iova_link, st, 1 << 52, 0, 0x1000) == errno.ERANGE
    assert errno_of(dev.map_phys, 0x100000, 0x10000) == errno.ENOMEM
    assert dev.iova_try_alloc(0, 0x20000) is None
    assert dev.counters() == before


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.txt")), ids=lambda p: p.name)
def test_row_83_every_trace_line_parses_and_every_covered_io_agrees(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len([e for e in trace.parse_lines(lines, path.name) if e.kind == "BEGIN"]) == 9
    report = replay.replay(lines, path.name)
    assert report.count("disagree") == 0, [o.differences for o in report.outcomes]
    assert report.count("agree") == 9


def test_row_84_direct_maps_without_unmaps_are_no_leak() -> None:
    dev = Device()
    with dev.map(Bio.from_phys(THREE), "linux") as m:
        assert [(s.addr, s.length) for s in m] == [(DmaAddr(p), n) for p, n in THREE]
        assert m.unmap_state_bytes == 0
    c = dev.counters()
    assert (c["maps"], c["unmaps"]) == (3, 0)
    assert not any(live(dev).values())


#: The rows that the kernel reference has.
ROWS = {1, *range(3, 7), *range(8, 24), *range(25, 39), *range(40, 57), *range(58, 76), *range(78, 85)}


def test_every_row_has_a_test_by_its_number() -> None:
    files = [p for p in Path(__file__).parent.glob("test_*.py") if p.name != "test_debug.py"]  # whose rows are dma-debug's
    named = {int(n) for p in files for n in re.findall(r"def test_row_(\d+)", p.read_text())}
    assert named >= ROWS, sorted(ROWS - named)
