"""Peer-to-peer memory: rows 40, 41, 52 and 53, requests that mix it with the host's, and what the device really reaches."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import pytest
from conftest import live

from dmapath import (
    Bar,
    Bio,
    Device,
    DmaDebug,
    DmaEngine,
    DmaError,
    DmaFault,
    Fabric,
    FaultInjector,
    HostBuffer,
    Iommu,
    MemoryRegion,
    PhysMemory,
    Request,
    RootComplex,
    pci,
)  # fmt: skip

ErrnoOf = Callable[..., int]
PAGE = 4096
OFFSET = -0x1000000000 % 2**64  # bus addresses lie below CPU addresses


class Machine:
    """A NIC, and a GPU whose BAR it reaches in a way that the parameters choose."""

    def __init__(self, how: str = "bus", *, layout: str = "scattered", size: int = 1 << 20, iommu: str | None = "strict",
                 **kw: Any) -> None:  # fmt: skip
        self.memory = PhysMemory(size, layout=layout, seed=5)  # type: ignore[arg-type]
        bridge = (0x8086, 0x2020) if how != "none" else (0x1234, 0x5678)
        self.root = Fabric().root_complex(bridge, bus_offset=OFFSET)
        switch = self.root.port().switch()
        acs = None if how == "bus" else pci.ACS_RR
        self.gpu = switch.port(acs=acs).function("gpu")
        self.nic = switch.port().function("nic")
        self.bar = self.gpu.bar(self.memory, 1 << 20)
        self.dev = self.device(iommu, **kw)

    def device(self, iommu: str | None, **kw: Any) -> Device:
        unit = None if iommu is None else Iommu(iommu)
        return Device(iommu=unit, memory=self.memory, pci=self.nic, **kw)

    def mixed(self, op: str = "write") -> Bio:
        """Two pages of the host's, two of the GPU's, one of the host's."""
        m, b = self.memory, self.bar
        return Bio([*m.vecs(0, 2 * PAGE), *b.vecs(3 * PAGE, 2 * PAGE), *m.vecs(5 * PAGE, PAGE)], op=op)

    def read(self, vecs: Any) -> bytes:
        return b"".join(self.memory.read(int(p), n) for p, n in vecs)


def fill(m: Machine) -> None:
    memoryview(m.memory)[:] = os.urandom(len(m.memory))
    m.bar.bytes[:] = os.urandom(len(m.bar))


# ---- topology


def test_row_52_one_switch_and_what_acs_makes_of_it() -> None:
    root = Fabric().root_complex()
    switch = root.port().switch()
    a, b = switch.port().function("a"), switch.port().function("b")
    assert a.reach(b) == pci.BUS_ADDR
    for bits in (pci.ACS_RR, pci.ACS_CR, pci.ACS_EC):
        for place in (0, 1):
            ports = [switch.port(acs=bits if i == place else 0) for i in range(2)]
            x, y = (p.function() for p in ports)
            assert x.reach(y) == y.reach(x) == pci.THRU_HOST_BRIDGE
    other = switch.port(acs=0x1 | 0x2 | 0x10 | 0x40).function()  # bits that redirect nothing
    assert other.reach(a) == pci.BUS_ADDR


def test_row_52_acs_above_the_meeting_point_does_not_matter_and_at_it_does() -> None:
    switch = Fabric().root_complex().port(acs=pci.ACS_RR).switch()
    a, b = switch.port().function(), switch.port().function()
    assert a.reach(b) == pci.BUS_ADDR
    switch = Fabric().root_complex().port().switch(acs=pci.ACS_RR)
    a, b = switch.port().function(), switch.port().function()
    assert a.reach(b) == pci.THRU_HOST_BRIDGE


@pytest.mark.parametrize(
    ("ours", "theirs", "cpu", "want"),
    [
        ((0x8086, 0x2030), (0x8086, 0x2030), "intel", pci.THRU_HOST_BRIDGE),
        ((0x8086, 0x2030), (0x8086, 0x2031), "intel", pci.THRU_HOST_BRIDGE),
        ((0x8086, 0x2F00), (0x8086, 0x2F00), "intel", pci.NOT_SUPPORTED),  # listed, but two bridges
        ((0x8086, 0x2F00), (0x8086, 0x2030), "intel", pci.NOT_SUPPORTED),
        ((0x1AE0, 0x1), (0x10DE, 0x2F95), "intel", pci.THRU_HOST_BRIDGE),
        ((0x1234, 0x1), (0x8086, 0x2030), "intel", pci.NOT_SUPPORTED),
        ((0x1234, 0x1), (0x5678, 0x1), "zen", pci.THRU_HOST_BRIDGE),
    ],
)
def test_row_52_different_roots(ours: Any, theirs: Any, cpu: str, want: int) -> None:
    fabric = Fabric(cpu)
    roots: list[RootComplex] = [fabric.root_complex(b, window=(0x1000000000 * (i + 1), 1 << 30))
                                for i, b in enumerate((ours, theirs))]  # fmt: skip
    a, b = (r.port().function() for r in roots)
    assert a.reach(b) == want
    assert a.distance(b) == (-1 if want == pci.NOT_SUPPORTED else 4)


def test_same_bridge_may_be_required() -> None:
    root = Fabric().root_complex((0x8086, 0x2F00))
    assert root.port().function().reach(root.port().function()) == pci.THRU_HOST_BRIDGE


def test_row_53_distances() -> None:
    switch = Fabric().root_complex().port().switch()
    port = switch.port()
    a, sibling, far = port.function(), port.function(), switch.port().function()
    assert (a.distance(a), a.distance(sibling), a.distance(far)) == (0, 2, 4)


def test_a_functions_own_acs_counts_for_itself() -> None:
    port = Fabric().root_complex().port()
    assert (f := port.function(acs=pci.ACS_RR)).reach(f) == pci.THRU_HOST_BRIDGE
    assert (f := port.function()).reach(f) == pci.BUS_ADDR


def test_machines_apart_share_nothing() -> None:
    a, b = (Fabric("zen").root_complex().port().function() for _ in range(2))
    assert a.reach(b) == pci.NOT_SUPPORTED


# ---- map_sg


def test_row_40_a_bus_address_in_the_middle_of_a_list() -> None:
    m = Machine(layout="contiguous")
    p = m.memory.phys
    before = live(m.dev)
    segs = m.dev.map_sg(Bio([(p(0), PAGE), *m.bar.vecs(0x2000, PAGE), (p(0x9000), PAGE)]))
    assert [s.length for s in segs] == [PAGE] * 3
    assert segs[1].addr == m.bar.bus(0x2000)
    assert m.dev.counters()["iova_live_bytes"] == 2 * PAGE
    assert segs[2].addr == segs[0].addr + PAGE
    m.dev.unmap_sg(segs)
    assert live(m.dev) == before
    only = m.dev.map_sg(Bio(m.bar.vecs(0, PAGE)))
    assert [int(s.addr) for s in only] == [m.bar.bus(0)]
    m.dev.unmap_sg(only)
    assert live(m.dev) == before


@pytest.mark.parametrize("iommu", ["strict", None])
def test_row_41_an_entry_that_cannot_be_reached(iommu: str | None, errno_of: ErrnoOf) -> None:
    m = Machine("none", iommu=iommu)
    before = live(m.dev)
    bad = Bio([*m.memory.vecs(0, PAGE), *m.bar.vecs(0, PAGE)])
    assert errno_of(m.dev.map_sg, bad) == errno.EREMOTEIO
    assert live(m.dev) == before
    for policy in ("linux", "unified"):
        assert errno_of(m.dev.map, MemoryRegion(bad.vecs, length=2 * PAGE), policy) == errno.EREMOTEIO
    assert errno_of(m.dev.map, bad) == errno.EREMOTEIO
    assert errno_of(m.dev.map, Bio(m.bar.vecs(0, PAGE)), "linux") == errno.EINVAL  # as the block layer says it
    assert live(m.dev) == before


def test_a_device_that_is_no_pci_function_reaches_no_peer(errno_of: ErrnoOf) -> None:
    m = Machine()
    assert errno_of(Device(memory=m.memory).map, Bio(m.bar.vecs(0, PAGE))) == errno.EREMOTEIO


# ---- requests


@pytest.mark.parametrize("iommu", ["strict", "lazy", None])
@pytest.mark.parametrize("how", ["bus", "host"])
def test_a_mixed_request_moves_every_byte_both_ways(how: str, iommu: str | None) -> None:
    m = Machine(how, iommu=iommu)
    fill(m)
    engine, before = DmaEngine(m.dev), live(m.dev)
    with m.dev.map(out := m.mixed("write")) as mapping:
        assert engine.read(mapping.segments) == m.read(out.vecs)
    with m.dev.map(into := m.mixed("read")) as mapping:
        data = os.urandom(5 * PAGE)
        engine.write(mapping.segments, data)
        assert m.read(into.vecs) == data
    if iommu == "lazy":
        m.dev.backend.flush()
    assert live(m.dev) == before


def test_a_peer_in_the_middle_breaks_one_range_in_three_segments() -> None:
    m = Machine()
    with m.dev.map(m.mixed()) as mapping:
        assert (mapping.layout, mapping.case) == ("linear", "iommu-aligned-p2p")
        first, peer, last = mapping.segments
        assert (first.length, peer.length, last.length) == (2 * PAGE, 2 * PAGE, PAGE)
        assert peer.addr == m.bar.bus(3 * PAGE)
        assert last.addr == first.addr + 2 * PAGE  # the IOVA range goes on behind the peer
        assert mapping.unmap_state_bytes == 16
        assert m.dev.counters()["iova_allocs"] == 1


def test_an_unaligned_peer_between_aligned_pages_leaves_them_one_range() -> None:
    m = Machine()
    fill(m)
    bio = Bio([*m.memory.vecs(0, PAGE), *m.bar.vecs(0x80, 0x100), *m.memory.vecs(0x5000, PAGE)], op="write")
    with m.dev.map(bio) as mapping:
        assert (mapping.layout, len(mapping)) == ("linear", 3)
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)


def test_through_the_host_bridge_it_is_one_range() -> None:
    m = Machine("host")
    with m.dev.map(m.mixed()) as mapping:
        assert (mapping.layout, len(mapping), mapping.case) == ("linear", 1, "iommu-aligned")
        assert "p2p-host-bridge" in mapping.rules
        assert m.dev.backend.prot_of(int(mapping.segments[0].addr) + 2 * PAGE) & 0x10  # MMIO
        assert not m.dev.backend.prot_of(int(mapping.segments[0].addr)) & 0x10


def test_one_peer_page_in_a_gibibyte_makes_three_segments() -> None:
    m = Machine(layout="scattered", size=1 << 30)
    half = len(m.memory) // 2
    pages = [*m.memory.vecs(0, half), *m.bar.vecs(0, PAGE), *m.memory.vecs(half + PAGE, half - PAGE)]
    with m.dev.map(MemoryRegion(pages, length=1 << 30)) as mapping:
        assert [s.length for s in mapping] == [half, PAGE, half - PAGE]
        assert mapping.unmap_state_bytes == 16
        assert mapping.case == "iommu-aligned-p2p"


def test_unaligned_pieces_around_a_peer_are_gapped() -> None:
    m = Machine()
    fill(m)
    p = m.memory.phys
    bio = Bio([(p(0x200), 0x400), *m.bar.vecs(0x80, 0x100), (p(0x5100), 0x200)], op="write")
    with m.dev.map(bio) as mapping:
        assert (mapping.layout, mapping.case, len(mapping)) == ("gapped", "iommu-unaligned", 3)
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)


def test_a_vector_across_the_end_of_a_bar_is_cut() -> None:
    m = Machine(layout="contiguous")
    second = m.gpu.bar(m.memory, PAGE)
    start = int(m.bar.phys(len(m.bar) - PAGE))
    assert int(second.phys()) == start + PAGE  # two BARs side by side, one of them another's
    with m.dev.map(Bio([(start, 2 * PAGE)], op="write")) as mapping:
        assert [s.length for s in mapping] == [PAGE, PAGE]


def test_a_vector_from_memory_into_a_bar_is_cut_there() -> None:
    memory = PhysMemory(1 << 20)
    switch = Fabric().root_complex(window=(0x8000001000, 1 << 20)).port().switch()
    bar = switch.port().function().bar(memory, PAGE)
    below = mmap.mmap(-1, PAGE)
    with HostBuffer(below, memory, layout="contiguous", phys=int(bar.phys()) - PAGE):
        below[:], bar.bytes[:] = os.urandom(PAGE), os.urandom(PAGE)
        dev = Device(iommu=Iommu(), memory=memory, pci=switch.port().function())
        with dev.map(Bio([(int(bar.phys()) - PAGE, 2 * PAGE)], op="write")) as mapping:
            assert [s.length for s in mapping] == [PAGE, PAGE]
            assert mapping.segments[1].addr == bar.bus(0)
            assert DmaEngine(dev).read(mapping.segments) == below[:] + bar.bytes[:]


def test_policy_linux_refuses_a_mixed_bio_and_takes_a_pure_one(errno_of: ErrnoOf) -> None:
    for how, layout in (("bus", "direct"), ("host", "linear")):
        m = Machine(how)
        fill(m)
        before = live(m.dev)
        assert errno_of(m.dev.map, m.mixed(), "linux") == errno.EINVAL
        bio = Bio([*m.bar.vecs(0, PAGE), *m.bar.vecs(0x4000, PAGE)], op="write")
        with m.dev.map(bio, "linux") as mapping:
            assert mapping.layout == layout
            assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)
            assert mapping.unmap_state_bytes == (0 if how == "bus" else 16)
        assert live(m.dev) == before


def test_policy_linux_maps_a_mixed_region_as_map_sg_does() -> None:
    m = Machine()
    with m.dev.map(MemoryRegion(m.mixed().vecs, length=5 * PAGE), "linux") as mapping:
        assert [s.length for s in mapping] == [2 * PAGE, 2 * PAGE, PAGE]
        assert mapping.segments[1].addr == m.bar.bus(3 * PAGE)
        assert mapping.case == "iommu-aligned-p2p"


def test_two_providers_in_one_request() -> None:
    m = Machine()
    other = m.root.port().function("ssd").bar(m.memory, PAGE)  # through the host bridge
    fill(m)
    other.bytes[:] = os.urandom(PAGE)
    bio = Bio([*other.vecs(0, PAGE), *m.memory.vecs(0, PAGE), *m.bar.vecs(0, PAGE)], op="write")
    with m.dev.map(bio) as mapping:
        assert [s.length for s in mapping] == [2 * PAGE, PAGE]
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)


def test_merged_bios_of_peers_read_right() -> None:
    m = Machine()
    fill(m)
    rq = Request([Bio(m.memory.vecs(0, PAGE), op="write"), Bio(m.bar.vecs(0, PAGE), op="write")])
    with m.dev.map(rq) as mapping:
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(rq.vecs)


# ---- the device's side


def test_the_switch_decides_and_not_the_driver() -> None:
    near, far = Machine("bus"), Machine("host")
    fill(near)
    assert DmaEngine(near.dev).read([(near.bar.bus(0), 16)]) == near.bar.bytes[:16]
    with pytest.raises(DmaFault):  # ACS sends it to the IOMMU, which knows no such address
        DmaEngine(far.dev).read([(far.bar.bus(0), 16)])


def test_an_access_across_the_end_of_a_peer_faults_there() -> None:
    m = Machine()
    at = m.bar.bus(len(m.bar) - 8)
    with pytest.raises(DmaFault) as e:
        DmaEngine(m.dev).write([(at, 16)], bytes(16))
    assert (e.value.done, e.value.iova) == (8, at + 8)


def test_what_the_host_bridge_must_not_forward_is_dropped() -> None:
    for iommu in ("strict", None):
        m = Machine("none", iommu=iommu)
        addr = m.dev.map_phys(m.bar.phys(0), PAGE, attrs="mmio")  # a driver that did not ask
        with pytest.raises(DmaFault):
            DmaEngine(m.dev).read([(int(addr), 16)])
        m.dev.unmap_phys(addr, PAGE, attrs="mmio")


def test_no_iova_is_ever_a_bus_address() -> None:
    memory = PhysMemory(1 << 20)
    root = Fabric().root_complex(window=(0xF0000000, 0x0FFFF000))
    nic, gpu = root.port().function(), root.port().function()
    gpu.bar(memory, PAGE)
    dev = Device(iommu=Iommu(), memory=memory, pci=nic)
    got = [int(dev.iova_try_alloc(0, PAGE).addr) for _ in range(3)]
    assert got == [0xFFFFF000, 0xEFFFF000, 0xEFFFE000]


def test_a_bar_that_appears_later_is_known_to_devices_that_were_there() -> None:
    m = Machine()
    late = m.gpu.bar(m.memory, PAGE)
    with m.dev.map(Bio(late.vecs(), op="write")) as mapping:
        assert mapping.segments[0].addr == late.bus(0)


def test_what_a_bar_needs() -> None:
    m = Machine()
    with pytest.raises(DmaError, match="multiple of 4096"):
        m.gpu.bar(m.memory, 100)
    m.gpu.mappable_bars = False
    with pytest.raises(DmaError, match="must not be mapped"):
        m.gpu.bar(m.memory, PAGE)
    with pytest.raises(DmaError, match="window is full"):
        Fabric().root_complex(window=(0x1000000, PAGE)).port().function().bar(m.memory, 2 * PAGE)
    with pytest.raises(DmaError):
        m.bar.vecs(0, len(m.bar) + 1)
    assert repr(m.bar).startswith("Bar('gpu'")
    assert isinstance(m.bar, Bar)


def test_a_non_coherent_device_maintains_the_hosts_pages_alone() -> None:
    m = Machine("host", coherent=False)
    fill(m)
    bio = m.mixed("write")
    with m.dev.map(bio) as mapping:
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)
    c = m.dev.counters()
    assert (c["cache_clean_bytes"], c["cache_inval_bytes"]) == (3 * PAGE, 3 * PAGE)


@pytest.mark.parametrize("coherent", [True, False])
@pytest.mark.parametrize("iommu", ["strict", None])
def test_unmap_says_mmio_where_map_did(iommu: str | None, coherent: bool) -> None:
    m = Machine("host", iommu=iommu, coherent=coherent)
    p = m.memory.phys
    for vecs in ([(p(0x200), 0x100), *m.bar.vecs(0x80, 0x100), (p(0x5100), 0x200)], m.bar.vecs(0, PAGE),
                 [*m.bar.vecs(0x80, 0x100), *m.bar.vecs(0x4080, 0x100)]):  # fmt: skip
        with DmaDebug(m.dev), m.dev.map(Bio(vecs, op="write")):
            pass


def test_failures_in_the_middle_leave_nothing() -> None:
    m = Machine("host")
    for nth in range(1, 30):
        dev = m.device("strict")
        before = live(dev)
        dev.backend.fail_nth(nth)
        try:
            dev.map(m.mixed()).unmap()
        except DmaError:
            assert live(dev) == before
            continue
        if dev.backend.fail_nth(0):
            assert nth > 1
            return
    pytest.fail("never ran out of allocations")


@pytest.mark.parametrize("how", ["bus", "host"])
def test_a_refused_range_maps_every_piece_by_itself(how: str) -> None:
    """Runs of pieces that would be one range each are more segments when there is no range: each is kept, none is lost."""
    m = Machine(how)
    fill(m)
    before = live(m.dev)
    order = [5, 9, 2, 7, 11, 3]
    vecs = [v for at in order for v in m.memory.vecs(at * PAGE, PAGE)]
    vecs[3:3] = [*m.bar.vecs(3 * PAGE, PAGE), *m.bar.vecs(9 * PAGE, PAGE)]
    bio = Bio(vecs, op="write")
    faults = m.dev.attach(FaultInjector("iova_try_alloc", 1))
    with m.dev.map(bio) as mapping:
        assert faults.left == 0
        assert (mapping.layout, len(mapping)) == ("per-range", 8)
        assert DmaEngine(m.dev).read(mapping.segments) == m.read(bio.vecs)
    m.dev.detach(faults)
    assert live(m.dev) == before


@pytest.mark.parametrize("peers", [True, False])
def test_a_refused_range_does_not_give_more_segments_than_the_device_takes(peers: bool) -> None:
    m = Machine("bus", max_segments=3)
    vecs = [*m.memory.vecs(5 * PAGE, PAGE), *m.memory.vecs(9 * PAGE, PAGE), *m.memory.vecs(2 * PAGE, PAGE)]
    vecs += m.bar.vecs(0, PAGE) if peers else m.memory.vecs(7 * PAGE, PAGE)
    before = live(m.dev)
    m.dev.map(Bio(vecs)).unmap()
    m.dev.attach(FaultInjector("iova_try_alloc", 1))
    with pytest.raises(DmaError, match="split the bio first") as e:
        m.dev.map(Bio(vecs))
    assert e.value.errno == errno.EINVAL
    assert live(m.dev) == before
