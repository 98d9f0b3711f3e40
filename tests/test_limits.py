"""No segment that the device cannot take: random devices with all limits together, random requests, both policies.

A request is mapped so that every segment is within every limit and every byte is right, or it is refused by a rule that it
really breaks; one that is within the limits as it is given, and needs no bounce, is never refused by policy ``unified``. A
failure names its seed. DMAPATH_LIMITS=100000 looks further.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from conftest import live
from limits_random import BASE, Case, Vecs, arena, broken, run

from dmapath import AlignmentError, Bio, Device, DmaEngine, DmaError, Fabric, Iommu, MemoryRegion, PhysMemory, Swiotlb
from dmapath.rules import RULES

SEEDS = int(os.environ.get("DMAPATH_LIMITS", "2000"))


@pytest.mark.parametrize("first", range(0, SEEDS, max(1, SEEDS // 10)))
def test_every_segment_is_within_every_limit_and_every_byte_is_right(first: int) -> None:
    for seed in range(first, min(first + max(1, SEEDS // 10), SEEDS)):
        try:
            run(seed)
        except BaseException as e:
            e.add_note(f"seed {seed}: {Case(seed).kind}, {Case(seed).request!r}") if hasattr(e, "add_note") else None
            raise


def test_what_the_caller_has_split_is_given_as_linux_gives_it() -> None:
    for seed in range(300):
        run(seed, split=True)


@pytest.mark.parametrize("policy", ["linux", "unified"])
def test_what_split_makes_is_never_refused(policy: Any) -> None:
    done = 0
    for seed in range(SEEDS // 2):
        case = Case(seed)
        if case.kind not in ("direct", "strict", "lazy", "forcedac") or case.region or case.dev.virt_boundary > 0xFFF:
            continue
        bio = Bio(case.vecs, op="write")
        try:
            parts = bio.split(case.dev, block_size=512)
        except DmaError:
            assert broken(case.dev, case.vecs)
            continue
        if "not-capable" in broken(case.dev, case.vecs):
            continue
        fits, got = True, []
        for part in parts:
            try:
                with case.dev.map(part, policy) as m:
                    fits &= case.dev.max_segments >= len(m)
                    got.append(DmaEngine(case.dev).read(m.segments))
            except DmaError as e:  # Linux cannot link what its own limits cut inside a granule
                assert policy == "linux", f"seed {seed}: {e}"
                assert RULES["link-failed"].text in e.rule, f"seed {seed}: {e}"
                break
        else:
            assert fits
            assert b"".join(got) == case.bytes()
            done += 1
    assert done > SEEDS // 40


# ---- one by one


def segments(dev: Device, vecs: Vecs, policy: Any = "unified") -> list[tuple[int, int]]:
    with dev.map(Bio(vecs), policy) as m:
        return [(int(s.addr), s.length) for s in m]


@pytest.mark.parametrize("peer", [False, True])
def test_a_gapped_range_is_cut_where_the_device_has_its_boundary(peer: bool) -> None:
    memory, function, _ = arena("peers" if peer else "")
    dev = Device(iommu=Iommu(), seg_boundary_mask=0xFFFF, memory=memory, pci=function)
    vecs = [(BASE + 0x200, 0x600), (BASE + 0x20000, 0x10000)]
    if peer:
        vecs.insert(1, (int(memory.peers[0].phys(0)), 0x1000))
    got = segments(dev, vecs)
    assert not broken(dev, got)
    assert sum(n for _, n in got) == sum(n for _, n in vecs)


def test_joined_vectors_of_a_gapped_range_are_no_longer_than_a_segment() -> None:
    dev = Device(iommu=Iommu(), max_segment_size=0x1800)
    got = segments(dev, [(BASE + 0x200, 0x600), (BASE + 0x20000, 0x1000), (BASE + 0x40000, 0x1000), (BASE + 0x60000, 0x400)])
    assert [n for _, n in got] == [0x600, 0x1800, 0xC00]
    assert got[1][0] + got[1][1] == got[2][0]
    dev = Device(iommu=Iommu(), seg_boundary_mask=0x1FFF)
    got = segments(dev, [(BASE + 0x200, 0x600), *((BASE + i * 0x20000, 0x1000) for i in range(1, 5))])
    assert not broken(dev, got)
    assert len(got) == 4  # joined to the boundary and cut there


def test_one_range_is_not_promised_where_cuts_make_too_many_segments(errno_of: Any) -> None:
    for unit in (Iommu(), None):
        dev = Device(iommu=unit, max_segments=1, max_segment_size=4096)
        for policy in ("unified", "linux"):
            with pytest.raises(DmaError, match=r"more segments than the device takes.*Bio\.split"):
                dev.map(Bio([(BASE, 0x2000)]), policy)
        assert live(dev)["iova_live"] == 0
        assert len(segments(dev, [(BASE, 0x1000)])) == 1
    # as given they are three segments, joined in one range they would be five
    vecs = [(BASE + i * 0x10000, 0x3000) for i in range(3)]
    dev = Device(iommu=Iommu(), max_segments=3, max_segment_size=0x3000, seg_boundary_mask=0x3FFF)
    with dev.map(Bio(vecs)) as m:
        assert (m.layout, len(m), "limits" in m.rules) == ("per-range", 3, True)


def test_a_bounce_that_opens_a_gap_is_refused_by_name(memory: PhysMemory) -> None:
    def make(keep: int) -> Device:
        return Device(memory=memory, swiotlb=Swiotlb(memory, slots=512, force=True), virt_boundary=4095, min_align_mask=keep)

    bio = Bio([*memory.vecs(0x2A00, 0x600), *memory.vecs(0x5000, 0xA00)])
    with pytest.raises(DmaError, match="min_align_mask") as e:
        make(0).map(bio)
    assert (e.value.argument, e.value.errno) == ("request", 22)
    dev = make(0xFFF)
    with dev.map(bio) as m:
        assert not broken(dev, [(int(s.addr), s.length) for s in m])


def test_a_vector_has_32_bits_of_length_and_a_region_has_not() -> None:
    for vecs in ([(1 << 40, 1 << 32)], [(0, 4096), (1 << 40, (1 << 32) + 4096)]):
        with pytest.raises(DmaError, match="bv_len has 32 bits") as e:
            Bio.from_phys(vecs)
        assert e.value.argument == f"vecs[{len(vecs) - 1}].len"
    dev = Device(iommu=Iommu(), dma_mask=2**48 - 1)
    for policy in ("unified", "linux"):
        got = segments(dev, [(1 << 40, 0xFFFFF000)], policy)
        assert [n for _, n in got] == [0xFFFFF000]
    with dev.map(MemoryRegion([(1 << 40, 1 << 33)], length=1 << 33)) as m:
        assert [s.length for s in m] == [1 << 33]
    dev.unmap_phys(dev.map_phys(1 << 40, 1 << 33), 1 << 33)


def test_peers_beyond_the_mask_are_refused_and_not_handed_out() -> None:
    memory, function, _ = arena("peers")
    dev = Device(iommu=Iommu(), memory=memory, pci=function, dma_mask=2**32 - 1)
    peer = (int(memory.peers[0].phys(0)), 0x1000)
    for vecs in ([peer], [(BASE, 0x1000), peer]):
        with pytest.raises(DmaError, match="cannot reach the address") as e:
            dev.map(Bio(vecs))
        assert e.value.errno == 34
    assert live(dev)["iova_live"] == 0


def test_a_gap_after_a_segment_that_ends_at_the_top_is_refused(memory: PhysMemory) -> None:
    """That segment's end is 2**64: a peer's segment that does not begin on the virt boundary still leaves a gap after it."""
    switch = Fabric().root_complex().port().switch()
    bar = switch.port().function("peer").bar(memory, 0x2000)
    dev = Device(iommu=Iommu(), memory=memory, pci=switch.port().function("device"), forcedac=True, virt_boundary=0xFFF)
    before = live(dev)
    with dev.map(Bio([(memory.phys(0), 0x1000), (bar.phys(), 0x200)])) as m:
        assert int(m.segments[0].addr) + m.segments[0].length == 2**64
    with pytest.raises(AlignmentError, match="virt_boundary"):
        dev.map(Bio([(memory.phys(0), 0x1000), (bar.phys(0x200), 0x200)]))
    assert live(dev) == before


def test_a_cut_that_would_open_a_gap_is_made_elsewhere_or_refused_by_name() -> None:
    dev = Device(virt_boundary=0xFFF, max_segment_size=0x1800)
    got = segments(dev, [(BASE + 0x200, 0x3000)])
    assert got == [(BASE + 0x200, 0xE00), (BASE + 0x1000, 0x1000), (BASE + 0x2000, 0x1200)]
    dev = Device(virt_boundary=0xFFF, max_segment_size=0x800)
    for policy in ("unified", "linux"):
        with pytest.raises(DmaError, match="no place to cut it"):
            dev.map(Bio([(BASE, 0x1000)]), policy)
        assert segments(dev, [(BASE, 0x800)], policy) == [(BASE, 0x800)]


@pytest.mark.parametrize("policy", ["unified", "linux"])
def test_both_policies_look_at_every_limit(policy: Any) -> None:
    gap = [(BASE, 0x600), (BASE + 0x5000, 0x1000)]
    cases: list[tuple[dict[str, Any], str]] = [({"dma_alignment": 7}, "misses the device's dma_alignment"),
                                               ({"virt_boundary": 0xFFF}, "takes no gaps"),
                                               ({"max_segments": 1}, "more segments")]  # fmt: skip
    for (limits, words), unit in itertools.product(cases, (None, Iommu())):
        vecs = [(BASE + 4, 0x604)] if "dma_alignment" in limits else gap
        with pytest.raises(DmaError, match=words):
            Device(iommu=unit, **limits).map(Bio(vecs), policy)
        if policy == "linux":
            Device(iommu=unit, **limits).map(Bio(vecs), policy, split=True).unmap()
    with pytest.raises(DmaError, match="with policy linux alone"):
        Device().map(Bio(gap), split=True)


def test_regions_keep_the_limits_that_were_given_and_no_others() -> None:
    pages = [(BASE + i * 0x4000, 0x1000) for i in range(5)]
    policies: list[Any] = ["unified", "linux"]
    for policy in policies:
        with pytest.raises(DmaError, match="more segments"):
            Device(max_segments=4).map(MemoryRegion(pages, length=0x5000), policy)
        with Device().map(MemoryRegion(pages, length=0x5000), policy) as m:
            assert len(m) == 5
    assert (Device().max_segments, Device(max_segments=70000).max_segments) == (65535, 70000)


def test_what_bounced_and_what_did_not_may_share_a_cache_line() -> None:
    """Their parts of one vector are cut inside a line; the device is not coherent."""
    run(38981)
