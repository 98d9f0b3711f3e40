"""Bugs that Linux and its users really had (docs/bugs.md), each as a small wrong driver or back end, and what catches it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import strict
from test_debug import BASE, PAGE, Raw, State, found, watched

import dmapath
from dmapath import (
    Adversary,
    Bio,
    Device,
    DmaAddr,
    DmaDebug,
    DmaEngine,
    DmaError,
    DmaFault,
    Fabric,
    HmmMap,
    Iommu,
    MemoryRegion,
    PhysMemory,
    Swiotlb,
)  # fmt: skip

HERE = Path(__file__).parent


def test_a_unmap_rebuilt_from_the_descriptors() -> None:
    """nvme-pci: addresses for unmap were rebuilt in steps of a page, which is wrong when segments are longer."""
    dev, debug = watched(iommu=None)
    m = dev.map(Bio([(BASE + 0x200, 0x600), (BASE + 0x8000, 3 * PAGE)]), "linux")
    for s in m.segments:
        for at in range(int(s.addr), int(s.addr) + s.length, PAGE):
            dev.unmap_phys(at, min(PAGE, int(s.addr) + s.length - at), "from_device")
    assert found(debug) == ["unmap-size", "unmap-unknown", "unmap-unknown"]
    m.unmap()
    # behind an IOMMU the page table itself objects
    dev = strict()
    [segment] = dev.map_sg(Bio([(BASE + 0x8000, 3 * PAGE)]))
    dev.unmap_phys(segment.addr, PAGE)
    with pytest.raises(DmaError):
        dev.unmap_phys(segment.addr, 3 * PAGE)


def test_b_state_that_is_not_given_back_on_one_path() -> None:
    """nvme-pci: the fix of the last leaked the saved vectors where unmap was not needed."""
    dev, debug = watched(iommu=None)
    held = [dev.map(Bio([(BASE + i * PAGE, PAGE)])) for i in range(3)]
    held[0].unmap()  # the two others' path returns early
    dev.detach(debug)
    assert found(debug) == ["leak"]
    assert "2 mappings are left" in debug.reports[0].message
    for m in held[1:]:
        m.unmap()


def test_c_two_arguments_of_one_type_swapped() -> None:
    """nvme-pci: iova and length swapped at unmap; the compiler saw two integers, disks under Xen saw corruption."""
    dev = strict()
    addr = dev.map_phys(BASE, PAGE)
    with pytest.raises(TypeError, match="a number of bytes is wanted"):
        dev.unmap_phys(PAGE, addr)
    with pytest.raises(TypeError, match="a PhysAddr or a plain integer"):
        dev.map_phys(addr, PAGE)
    dev.unmap_phys(addr, PAGE)
    # a driver in C that strips the types is seen by the debug
    dev, debug = watched(iommu=None)
    raw, out = Raw(dev), ctypes.c_uint64(0)
    raw.call("map_phys", BASE, PAGE, 0, 0, out)
    raw.call("unmap_phys", PAGE, out.value, 0, 0)
    assert found(debug) == ["unmap-unknown"]


class UnlinksFromZero(Adversary):
    """A back end that, when a link fails, takes back from offset 0 instead of from the link's own."""

    def iova_link(self, state: Any, phys: int, offset: int, size: int, dir: str, attrs: int) -> None:
        try:
            super().iova_link(state, phys, offset, size, dir, attrs)
        except DmaError:
            self.iova_unlink(state, 0, offset, dir, attrs)
            raise


def test_d_a_failed_link_that_takes_its_neighbours_along() -> None:
    """dma-iommu: the bounce path unwound from offset 0, and mapped an empty middle."""
    memory = PhysMemory(1 << 20, base=BASE)
    for backend, survives in ((Adversary(1, refuse=0), True), (UnlinksFromZero(1, refuse=0), False)):
        dev = Device(backend=backend, memory=memory)
        state = dev.iova_try_alloc(0, 3 * PAGE)
        dev.iova_link(state, BASE, 0, PAGE)
        dev.iova_sync(state, 0, PAGE)
        with pytest.raises(DmaError):
            dev.iova_link(state, BASE + 0x5200, PAGE, PAGE)
        if survives:
            DmaEngine(dev).read([(int(state.addr), 8)])
        else:
            with pytest.raises(DmaFault):
                DmaEngine(dev).read([(int(state.addr), 8)])
    # ours: a tail without a middle maps one granule, and a failure leaves the link before it
    pool = Swiotlb(memory, slots=128)
    dev = Device(iommu=Iommu(), memory=memory, swiotlb=pool, untrusted=True, min_align_mask=0xFFF)
    dev.backend.record(True)
    state = dev.iova_try_alloc(0, 2 * PAGE)
    dev.iova_link(state, BASE, 0, PAGE)
    pool.fail_nth(1)
    with pytest.raises(DmaError):
        dev.iova_link(state, BASE + 0x5000, PAGE, 0x800)
    dev.iova_sync(state, 0, PAGE)
    DmaEngine(dev).read([(int(state.addr), PAGE)])
    dev.iova_link(state, BASE + 0x5000, PAGE, 0x800)
    assert [e[3] for e in dev.backend.events() if e[0] == "map"] == [PAGE, PAGE]


def test_e_a_state_from_the_request_before() -> None:
    """block: the DMA state was not initialised for every request, so an old one was destroyed again."""
    dev, debug = watched()
    raw, state = Raw(dev), State()
    assert raw.call("iova_try_alloc", state, 0, PAGE)
    raw.call("iova_free", state)
    # the next request needs no IOVA, but the state still says that there is one
    raw.call("iova_unlink", state, 0, PAGE, 1, 0)
    raw.call("iova_free", state)
    assert found(debug) == ["free-unknown", "free-unknown"]


@pytest.mark.parametrize("coherent", [True, False])
def test_f_unlink_without_the_attribute_of_the_link(coherent: bool) -> None:
    """dma-iommu users: a BAR was linked with MMIO and unlinked without, so its cache lines were invalidated."""
    memory = PhysMemory(1 << 20, base=BASE)
    switch = Fabric().root_complex().port().switch()
    bar = switch.port(acs=4).function().bar(memory, 4 * PAGE)
    dev = Device(iommu=Iommu(), memory=memory, pci=switch.port().function(), coherent=coherent)
    debug = dev.attach(DmaDebug())
    state = dev.iova_try_alloc(0, PAGE)
    dev.iova_link(state, bar.phys(), 0, PAGE, attrs="mmio")
    dev.iova_sync(state, 0, PAGE)
    dev.iova_destroy(state, PAGE)
    assert found(debug) == ["unlink-attrs"]
    assert dev.counters()["cache_inval_bytes"] == 0  # our page table remembers what the driver forgot


def test_g_lengths_cut_to_32_bits() -> None:
    """dma-buf: lengths of scatter lists overflowed from 8 GiB on."""
    dev = strict(forcedac=True)
    debug = dev.attach(DmaDebug())
    size = (8 << 30) + PAGE
    region = MemoryRegion([(1 << 40, size)], length=size)
    with dev.map(region) as m:
        assert [s.length for s in m] == [size]
    addr = dev.map_phys(1 << 40, size)
    with pytest.raises(DmaError):
        dev.unmap_phys(addr, (8 << 30) & 0xFFFFFFFF)
    with pytest.raises(DmaError):
        dev.unmap_phys(addr, size & 0xFFFFFFFF)
    assert found(debug) == ["unmap-size"]


def test_h_memory_of_two_providers_in_one_bio() -> None:
    """block: bio_add_page let pages of two P2P providers into one bio, and the first decided for both."""
    memory = PhysMemory(1 << 20, base=BASE)
    root = Fabric().root_complex()
    switch = root.port().switch()
    near, far = switch.port().function().bar(memory, PAGE), root.port().function().bar(memory, PAGE)
    dev = Device(iommu=Iommu(), memory=memory, pci=switch.port().function())
    both = Bio([*near.vecs(), *far.vecs()], op="write")
    with pytest.raises(DmaError, match="one kind and provider"):
        dev.map(both, "linux")
    near.bytes[:], far.bytes[:] = os.urandom(PAGE), os.urandom(PAGE)
    with dev.map(both) as m:  # the unified flow needs no such rule
        assert DmaEngine(dev).read(m.segments) == near.bytes[:] + far.bytes[:]


@pytest.mark.parametrize("make", [lambda m: Device(memory=m), lambda m: Device(memory=m, backend=Adversary(2, refuse=1))])
def test_i_a_count_from_before_the_mapping(make: Any) -> None:
    """RDMA/rw: resources were counted for one coalesced range; without an IOMMU there were as many as pages."""
    memory = PhysMemory(1 << 20, base=BASE)
    memoryview(memory)[:] = os.urandom(1 << 20)
    bio = Bio([(BASE, PAGE), (BASE + 0x5000, PAGE)], op="write")
    want = memory.read(BASE, PAGE) + memory.read(BASE + 0x5000, PAGE)
    behind = Device(iommu=Iommu(), memory=memory)
    for dev, right in ((behind, True), (make(memory), False)):
        with dev.map(bio) as m:
            first = m.segments[0]  # "there is one"
            read = DmaEngine(dev)
            if right:
                assert read.read([(int(first.addr), bio.total)]) == want
            else:
                with contextlib.suppress(DmaFault):
                    assert read.read([(int(first.addr), bio.total)]) != want


def test_j_no_device() -> None:
    """rxe ODP: hmm_dma_map_alloc was called with no DMA device."""
    with pytest.raises(TypeError):
        HmmMap(None, 4)  # type: ignore[arg-type]


def test_k_the_page_size_of_the_region_and_that_of_the_machine() -> None:
    """rxe: an address was looked up in a table of 64 KiB pages as if they were of 4 KiB."""
    memory = PhysMemory(1 << 20, base=BASE)
    memoryview(memory)[:] = os.urandom(1 << 20)
    dev = Device(memory=memory)
    mr = MemoryRegion.from_memory(memory, 0, 1 << 18, iova=0)
    with dev.map(mr) as m:
        table = mr.mtt(m.segments, 1 << 16)
        engine = DmaEngine(dev)

        def at(iova: int, page: int) -> DmaAddr:
            return table[iova // page % len(table)] + iova % page

        assert engine.read([(int(at(0x21230, 1 << 16)), 16)]) == bytes(memory)[0x21230:0x21240]
        assert engine.read([(int(at(0x21230, PAGE)), 16)]) != bytes(memory)[0x21230:0x21240]


def test_l_sums_that_pass_64_bits() -> None:
    """rxe: iova + length wrapped, and the check behind it passed."""
    with pytest.raises(DmaError, match="passes 2\\*\\*64"):
        MemoryRegion([(0x1000, 2 * PAGE)], length=2 * PAGE, iova=2**64 - PAGE)
    with pytest.raises(DmaError, match="passes 2\\*\\*64"):
        Bio([(2**64 - PAGE, 2 * PAGE)])
    dev = strict(memory=PhysMemory(1 << 20))
    with pytest.raises(DmaFault):
        DmaEngine(dev).read([(2**64 - 8, 16)])
    state = dev.iova_try_alloc(0, PAGE)
    with pytest.raises(DmaError):
        dev.iova_link(state, BASE, 2**63 - PAGE, PAGE)


def test_n_a_mask_wider_than_the_wires() -> None:
    """A device with 58 address lines that claimed 64: its DMA went elsewhere."""
    memory = PhysMemory(1 << 20, base=BASE)
    for mask, arrives in ((2**64 - 1, False), (2**58 - 1, True)):
        dev = Device(iommu=Iommu(), memory=memory, dma_mask=mask, forcedac=True)
        addr = dev.map_phys(BASE, PAGE)
        on_the_wires = int(addr) & (2**58 - 1)
        if arrives:
            DmaEngine(dev).read([(on_the_wires, 8)])
        else:
            with pytest.raises(DmaFault):
                DmaEngine(dev).read([(on_the_wires, 8)])


def test_o_contiguous_pages_one_by_one() -> None:
    """svcrdma: contiguous pages became a vector each; throughput halved. The counters show it."""
    dev = strict()
    pages = [(BASE + i * PAGE, PAGE) for i in range(64)]
    with dev.map(Bio(pages)) as m:
        assert len(m) == 1
    assert dev.counters()["links"] == 1
    slow = strict()
    state = slow.iova_try_alloc(0, 64 * PAGE)
    for i, (p, n) in enumerate(pages):
        slow.iova_link(state, p, i * PAGE, n)
    assert slow.counters()["links"] == 64
    slow.iova_destroy(state, 64 * PAGE)


@pytest.mark.parametrize("kind", ["force", "adversary", "non-coherent"])
def test_p_no_sync_before_the_cpu_looks(kind: str) -> None:
    """MANA: received packets were read without dma_sync_single_for_cpu, which works until something bounces."""
    memory = PhysMemory(1 << 20, base=BASE)
    kinds: dict[str, dict[str, Any]] = {
        "force": {"swiotlb": Swiotlb(memory, slots=128, force=True)},
        "adversary": {"backend": Adversary()},
        "non-coherent": {"coherent": False},
    }
    dev = Device(memory=memory, **kinds[kind])
    ring = dev.map_phys(BASE, PAGE, "from_device")
    DmaEngine(dev).write([(int(ring), 6)], b"packet")
    assert memory.read(BASE, 6) == bytes(6)  # the driver looks
    dev.sync_for_cpu(ring, 6, "from_device")
    assert memory.read(BASE, 6) == b"packet"
    dev.unmap_phys(ring, PAGE, "from_device")


def test_q_page_tables_that_stay_behind() -> None:
    """io-pgtable: of N large entries unmapped in one call, the tables of N - 1 leaked."""
    dev = strict(forcedac=True)
    left = []
    for _ in range(3):
        addr = dev.map_phys(1 << 40, 64 << 20)
        small = dev.map_phys((1 << 40) + (64 << 20) + PAGE, 16 << 20)  # 4 KiB pages in many tables
        assert dev.counters()["ptes_2m_live"] == 32
        dev.unmap_phys(addr, 64 << 20)
        dev.unmap_phys(small, 16 << 20)
        c = dev.counters()
        assert (c["ptes_2m_live"], c["ptes_4k_live"], c["mapped_bytes"]) == (0, 0, 0)
        left.append(dev.backend.stats()["page_table_bytes"])
    assert left[0] == left[1] == left[2] <= 10 * PAGE  # upper levels may stay; 32 leaves had 9 tables below them


def test_r_arguments_of_unmap_reversed() -> None:
    """libvfn: the arguments of dma_unmap were reversed; it types its IOVAs since."""
    dev = strict()
    state = dev.iova_try_alloc(0, PAGE)
    with pytest.raises(TypeError):
        dev.iova_link(state, state.addr, 0, PAGE)
    with pytest.raises(TypeError):
        dev.iova_unlink(PAGE, state, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        dev.iova_link(state, BASE, 0, dmapath.PhysAddr(PAGE))
    dev.iova_free(state)


def test_the_table_in_docs_names_each_of_these() -> None:
    docs = Path(os.environ.get("DMAPATH_SRC", HERE.parent)) / "docs" / "bugs.md"
    text = docs.read_text()
    tests = {name for name in globals() if re.match(r"test_[a-r]_", name)}
    named = set(re.findall(r"`(test_[a-r]_\w+)`", text))
    assert named == tests
    assert len(tests) == 17
