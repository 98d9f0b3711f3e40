"""Every back end and every kind of memory under one random driver, with the bytes that must arrive as the model; and the
same request on all of them, byte for byte.

DMAPATH_STEPS sets the steps of the state machine (a fifth of it here).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import live
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dmapath import (
    Adversary,
    Bio,
    Device,
    DmaDebug,
    DmaEngine,
    DmaError,
    Fabric,
    GrantTable,
    HostBuffer,
    Iommu,
    MemoryRegion,
    PhysMemory,
    Swiotlb,
    XenDomain,
)  # fmt: skip

STEPS = int(os.environ.get("DMAPATH_STEPS", "100000")) // 5
RUN = 100
PAGE = 4096
SLOTS = 24  # of two pages each: what one range of a request may take
BASE = 1 << 32


@dataclass
class Machine:
    """A device and its memory; slots of arena, buffer and BAR memory in one list."""

    name: str
    memory: PhysMemory
    dev: Device
    slots: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    bounces: bool = False  # memory that must stay coherent is refused
    mixes: bool = True  # policy linux takes a mix of memory kinds
    scarce: bool = False  # IOVA may run out

    def __post_init__(self) -> None:
        self.slots = [int(self.memory.phys(i * 2 * PAGE)) for i in range(SLOTS)]
        self.kinds = ["host"] * SLOTS


def _pool(memory: PhysMemory, **kw: Any) -> Swiotlb:
    return Swiotlb(memory, slots=1024, **kw)


def _plain(name: str, **kw: Any) -> Machine:
    memory = PhysMemory(SLOTS * 2 * PAGE, base=BASE)
    pool = kw.pop("pool", None)
    if pool is not None:
        kw["swiotlb"] = _pool(memory, **pool)
    bounces, scarce = kw.pop("bounces", False), kw.pop("scarce", False)
    m = Machine(name, memory, Device(memory=memory, **kw), bounces=bounces, scarce=scarce)
    buffer = HostBuffer(mmap.mmap(-1, 4 * PAGE), memory, layout="contiguous")
    m.keep.append(buffer)
    m.slots += [int(buffer.vecs(at, PAGE)[0][0]) for at in (0, 2 * PAGE)]
    m.kinds += ["buffer"] * (len(m.slots) - len(m.kinds))
    return m


def _xen(layout: str, where: str = "") -> Machine:
    memory = PhysMemory(SLOTS * 2 * PAGE, base=BASE)
    pool = _pool(memory)
    base = 2**52 - SLOTS * 2 * PAGE if where else 1 << 40  # machine addresses have 52 bits
    xen = XenDomain(memory, pool=pool, layout=layout, base=base)
    m = Machine(f"xen-{where or layout}", memory, Device(memory=memory, xen=xen, swiotlb=pool), bounces=True)
    other = PhysMemory(2 * PAGE, base=1 << 34)
    theirs = XenDomain(other, base=1 << 43)
    for i in range(2):  # another guest's pages in the last slot
        at = memory.phys((SLOTS - 1) * 2 * PAGE + i * PAGE)
        xen.balloon_out(at)
        xen.map_foreign(at, theirs, other.phys(i * PAGE))
    m.kinds[-1] = "foreign"
    m.keep += [other, theirs]
    return m


def _peers(name: str, acs: int | None, iommu: str | None, **kw: Any) -> Machine:
    memory = PhysMemory(SLOTS * 2 * PAGE, base=BASE)
    switch = Fabric().root_complex(bus_offset=-0x1000000000).port().switch()
    bar = switch.port(acs=acs).function("gpu").bar(memory, 64 * PAGE)
    nic = switch.port().function("nic")
    dev = Device(memory=memory, pci=nic, iommu=None if iommu is None else Iommu(iommu), **kw)
    m = Machine(name, memory, dev, mixes=False, bounces=not kw.get("coherent", True))
    m.slots += [int(bar.phys(i * 8 * PAGE)) for i in range(6)]
    m.kinds += ["peer"] * 6
    m.keep.append(bar)
    return m


MACHINES: dict[str, Any] = {
    "direct": lambda: _plain("direct"),
    "direct-offset": lambda: _plain("direct-offset", dma_ranges=[(BASE, 1 << 44, 1 << 32), (1 << 50, 1 << 45, 1 << 40)]),
    "direct-32bit": lambda: _plain("direct-32bit", dma_mask=2**32 - 1, pool={}, bounces=True),
    "swiotlb-force": lambda: _plain("swiotlb-force", pool={"force": True}, bounces=True),
    "swiotlb-restricted": lambda: _plain("swiotlb-restricted", pool={"restricted": True}, bounces=True),
    "swiotlb-dynamic": lambda: _plain("swiotlb-dynamic", pool={"force": True, "dynamic": True}, bounces=True),
    "direct-noncoherent": lambda: _plain("direct-noncoherent", coherent=False, bounces=True),
    "bounce-noncoherent": lambda: _plain("bounce-noncoherent", coherent=False, pool={"force": True}, bounces=True),
    "strict": lambda: _plain("strict", iommu=Iommu("strict")),
    "lazy": lambda: _plain("lazy", iommu=Iommu("lazy")),
    "caching": lambda: _plain("caching", iommu=Iommu("strict", caching_mode=True)),
    "passthrough": lambda: _plain("passthrough", iommu=Iommu("passthrough")),
    "small-mask": lambda: _plain("small-mask", iommu=Iommu("strict"), dma_mask=0x3FFFF, scarce=True),
    "untrusted": lambda: _plain("untrusted", iommu=Iommu("lazy"), untrusted=True, min_align_mask=0xFFF, pool={},
                                bounces=True),
    "iommu-noncoherent": lambda: _plain("iommu-noncoherent", iommu=Iommu("strict"), coherent=False, bounces=True),
    "untrusted-noncoherent": lambda: _plain("untrusted-noncoherent", iommu=Iommu("strict"), coherent=False, untrusted=True,
                                            min_align_mask=0xFFF, pool={}, bounces=True),
    "xen-scattered": lambda: _xen("scattered"),
    "xen-contiguous": lambda: _xen("contiguous"),
    "grant": lambda: _plain("grant", grants=GrantTable()),
    "peers-bus": lambda: _peers("peers-bus", None, "strict"),
    "peers-host": lambda: _peers("peers-host", 4, "lazy"),
    "peers-direct": lambda: _peers("peers-direct", None, None),
    "peers-noncoherent": lambda: _peers("peers-noncoherent", 4, "strict", coherent=False),
    "adversary": lambda: _plain("adversary", backend=Adversary(5, cut=0), bounces=True),
    # the same where DMA addresses end at 2**64
    "direct-top": lambda: _plain("direct-top", dma_ranges=[(BASE, 2**64 - SLOTS * 2 * PAGE, SLOTS * 2 * PAGE),
                                                           (1 << 50, 1 << 45, 1 << 40)]),
    "strict-top": lambda: _plain("strict-top", iommu=Iommu("strict"), forcedac=True),
    "lazy-top": lambda: _plain("lazy-top", iommu=Iommu("lazy"), forcedac=True),
    "caching-top": lambda: _plain("caching-top", iommu=Iommu("strict", caching_mode=True), forcedac=True),
    "narrow-top": lambda: _plain("narrow-top", iommu=Iommu("strict", aperture=(2**64 - 64 * PAGE, 2**64 - 1)), scarce=True),
    "untrusted-top": lambda: _plain("untrusted-top", iommu=Iommu("strict"), untrusted=True, min_align_mask=0xFFF, pool={},
                                    bounces=True, forcedac=True),
    "iommu-noncoherent-top": lambda: _plain("iommu-noncoherent-top", iommu=Iommu("lazy"), coherent=False, bounces=True,
                                            forcedac=True),
    "untrusted-noncoherent-top": lambda: _plain("untrusted-noncoherent-top", iommu=Iommu("strict"), coherent=False,
                                                untrusted=True, min_align_mask=0xFFF, pool={}, bounces=True, forcedac=True),
    "peers-host-top": lambda: _peers("peers-host-top", 4, "strict", forcedac=True),
    "xen-top": lambda: _xen("contiguous", "top"),
}  # fmt: skip


@dataclass
class Live:
    """A mapping that the driver holds, and what the device and the CPU must see."""

    op: str
    how: str
    ranges: list[tuple[int, int]]
    used: list[int]
    mapping: Any
    segments: Any
    data: bytes  # what the device must read, or has written


offsets = st.sampled_from([0, 0, 0, 0x1, 0x3F, 0x200, 0x800, 0xFFF])
sizes = st.sampled_from([1, 0x40, 0x200, 0x600, PAGE, PAGE, PAGE])


class Driver(RuleBasedStateMachine):
    """It keeps the rules of the DMA API, and so every byte must be where it belongs, on every machine."""

    @initialize(name=st.sampled_from(sorted(MACHINES)), data=st.randoms(use_true_random=False))
    def make(self, name: str, data: Any) -> None:
        self.m: Machine = MACHINES[name]()
        self.engine = DmaEngine(self.m.dev)
        self.before = live(self.m.dev)
        self.debug = self.m.dev.attach(DmaDebug())
        self.open: list[Live] = []
        self.random = data
        self.free = set(range(len(self.m.slots)))
        for at in self.m.slots:
            self.m.memory.write(at, self._bytes(2 * PAGE))

    def _bytes(self, n: int) -> bytes:
        return (bytes(self.random.getrandbits(8) for _ in range(64)) * (n // 64 + 1))[:n]

    def _cpu(self, ranges: list[tuple[int, int]]) -> bytes:
        return b"".join(self.m.memory.read(p, n) for p, n in ranges)

    @rule(op=st.sampled_from(["read", "write"]), policy=st.sampled_from(["linux", "unified"]),
          how=st.sampled_from(["request", "request", "request", "sg", "phys", "region"]),
          parts=st.lists(st.tuples(st.integers(0, 99), offsets, sizes), min_size=1, max_size=6))  # fmt: skip
    def map(self, op: str, policy: str, how: str, parts: list[tuple[int, int, int]]) -> None:
        ranges: list[tuple[int, int]] = []
        used: list[int] = []
        for pick, off, n in parts[: 1 if how == "phys" else 6]:
            candidates = sorted(self.free - set(used))
            if not candidates:
                break
            used.append(candidates[pick % len(candidates)])
            whole = how == "region"
            ranges.append((self.m.slots[used[-1]] + (0 if whole else off), PAGE if whole else n))
        if not ranges:
            return
        kinds = {self.m.kinds[i] for i in used}
        before = live(self.m.dev)
        bio = Bio(ranges, op=op)
        try:
            mapping, segments = self._map(how, bio, policy)
        except DmaError as e:
            assert live(self.m.dev) == before
            if self.m.scarce and e.errno == errno.ENOMEM:
                return
            mixed = len(kinds) > 1 and policy == "linux" and not self.m.mixes and how == "request"
            assert mixed or (how == "region" and self.m.bounces) or (how == "phys" and "peer" in kinds), (how, kinds)
            return
        self.free -= set(used)
        self.open.append(Live("both" if how == "region" else op, how, ranges, used, mapping, segments, self._cpu(ranges)))

    def _map(self, how: str, bio: Bio, policy: str) -> Any:
        dev = self.m.dev
        if how == "request":
            mapping = dev.map(bio, policy)
            return mapping, mapping.segments
        if how == "region":
            mapping = dev.map(MemoryRegion(bio.vecs, length=bio.total), policy)
            return mapping, mapping.segments
        if how == "sg":
            segments = dev.map_sg(bio)
            return None, segments
        [(phys, n)] = bio.vecs
        if any(0 <= int(phys) - int(b.phys()) < len(b) for b in self.m.memory.peers):
            raise DmaError("a driver asks how it reaches a peer before it maps by itself")
        return None, [(int(dev.map_phys(phys, n, bio.dir)), n)]

    @precondition(lambda self: self.open)
    @rule(i=st.integers(0, 99))
    def device_moves_bytes(self, i: int) -> None:
        x = self.open[i % len(self.open)]
        if x.op != "read":
            assert self.engine.read(x.segments) == x.data
        if x.op != "write":
            x.data = self._bytes(len(x.data))
            self.engine.write(x.segments, x.data)

    def _sync(self, x: Live, what: str) -> None:
        dirs = {"read": "from_device", "write": "to_device", "both": "bidirectional"}
        if x.mapping is not None:
            getattr(x.mapping, f"sync_{what}")()
        elif x.how == "sg":
            getattr(self.m.dev, f"sync_sg_{what}")(x.segments)
        else:
            getattr(self.m.dev, f"sync_{what}")(*x.segments[0], dirs[x.op])

    @precondition(lambda self: any(x.op == "write" and not self._peer(x) for x in self.open))
    @rule(i=st.integers(0, 99))
    def cpu_writes_and_syncs(self, i: int) -> None:
        writes = [x for x in self.open if x.op == "write" and not self._peer(x)]
        x = writes[i % len(writes)]
        x.data = self._bytes(len(x.data))
        at = 0
        for p, n in x.ranges:
            self.m.memory.write(p, x.data[at : at + n])
            at += n
        self._sync(x, "for_device")

    @precondition(lambda self: any(x.op == "read" and not self._peer(x) for x in self.open))
    @rule(i=st.integers(0, 99))
    def cpu_syncs_and_looks(self, i: int) -> None:
        reads = [x for x in self.open if x.op == "read" and not self._peer(x)]
        x = reads[i % len(reads)]
        self._sync(x, "for_cpu")
        assert self._cpu(x.ranges) == x.data

    def _peer(self, x: Live) -> bool:
        return any(self.m.kinds[i] == "peer" for i in x.used)

    @precondition(lambda self: self.open)
    @rule(i=st.integers(0, 99))
    def unmap(self, i: int) -> None:
        self._unmap(self.open.pop(i % len(self.open)))

    def _unmap(self, x: Live) -> None:
        if x.mapping is not None:
            x.mapping.unmap()
        elif x.how == "sg":
            self.m.dev.unmap_sg(x.segments)
        else:
            [(addr, n)] = x.segments
            self.m.dev.unmap_phys(addr, n, "from_device" if x.op == "read" else "to_device")
        self.free |= set(x.used)
        assert self._cpu(x.ranges) == x.data

    @rule()
    def caches_evict(self) -> None:
        self.m.memory.evict()

    @rule(ms=st.integers(0, 12))
    def time_passes(self, ms: int) -> None:
        if self.m.dev.iommu is not None:
            self.m.dev.iommu.advance(ms * 1_000_000)

    def teardown(self) -> None:
        if not hasattr(self, "m"):
            return
        while self.open:
            self._unmap(self.open.pop())
        self.m.dev.detach(self.debug)
        self.debug.check()
        with contextlib.suppress(AttributeError):
            self.m.dev.backend.flush()
        assert live(self.m.dev) == self.before
        if self.m.dev.swiotlb is not None:
            assert self.m.dev.swiotlb.used == 0


TestDriver = Driver.TestCase
TestDriver.settings = settings(
    max_examples=max(64, STEPS // RUN), stateful_step_count=RUN, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip


# ---- the same request everywhere


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(offsets, sizes), min_size=1, max_size=8), policy=st.sampled_from(["linux", "unified"]),
       seed=st.integers(0, 255))  # fmt: skip
def test_row_80_every_device_sees_the_same_bytes(parts: list[tuple[int, int]], policy: str, seed: int) -> None:
    """The differential run: one request, every back end, the bytes at the device and back."""
    content = bytes((i * 31 + seed) & 255 for i in range(SLOTS * 2 * PAGE))
    incoming = bytes((i * 7 + seed) & 255 for i in range(SLOTS * 2 * PAGE))
    places = [(i * 2 * PAGE + off, n) for i, (off, n) in enumerate(parts)]
    want = b"".join(content[a : a + n] for a, n in places)
    for name, make in MACHINES.items():
        m = make()
        m.memory.write(BASE, content[: (SLOTS - 1) * 2 * PAGE])  # the last slot may be another's
        engine = DmaEngine(m.dev)
        with m.dev.map(Bio([(BASE + a, n) for a, n in places], op="write"), policy) as mapping:
            assert engine.read(mapping.segments) == want, name
        with m.dev.map(Bio([(BASE + a, n) for a, n in places], op="read"), policy) as mapping:
            engine.write(mapping.segments, incoming[: len(want)])
        after, at = bytearray(content[: (SLOTS - 1) * 2 * PAGE]), 0
        for a, n in places:
            after[a : a + n] = incoming[at : at + n]
            at += n
        assert m.memory.read(BASE, len(after)) == after, name


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_each_machine_is_what_it_says(name: str) -> None:
    m = MACHINES[name]()
    assert m.name == name
    assert m.dev.backend.name in ("direct", "iommu", "xen", "grant", "adversary")
    with m.dev.map(Bio([(BASE + 0x200, 0x400), (BASE + 3 * PAGE, 0x100)], op="write")) as mapping:
        bounced = mapping.layout == "bounced"
    assert bounced == (name.startswith(("swiotlb", "bounce", "untrusted-noncoherent")) or name == "direct-32bit")
