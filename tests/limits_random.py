"""Random devices with all limits together, random requests on them, and what must hold of each (test_limits)."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

from conftest import live

from dmapath import (
    Adversary,
    Bio,
    Device,
    DmaEngine,
    DmaError,
    Fabric,
    GrantTable,
    Iommu,
    MemoryRegion,
    PhysMemory,
    Request,
    Swiotlb,
    XenDomain,
)  # fmt: skip
from dmapath.pci import ACS_RR
from dmapath.request import iterate
from dmapath.rules import RULES

BASE, SLOT = 1 << 32, 0x8000
FULL = 2**64 - 1
Vecs = list[tuple[int, int]]
POOLS = itertools.count()


@functools.cache
def arena(how: str) -> tuple[PhysMemory, Any, list[int]]:
    """The machine's memory, the function that the device is (None: it has no peers), and where buffers may lie."""
    memory = PhysMemory(1 << 20, base=BASE)
    slots = list(range(BASE, BASE + (1 << 20), SLOT))
    if not how:
        return memory, None, slots
    switch = Fabric().root_complex((0x8086, 0x2020), bus_offset=-0x1000003000 % 2**64).port().switch()
    bars = [switch.port(acs=acs).function("peer").bar(memory, 2 * SLOT) for acs in (None, ACS_RR)]
    slots += [int(bar.phys(at)) for bar in bars for at in (0, SLOT)]
    return memory, switch.port().function("device"), slots


class Window:
    """A back end in Python whose addresses are physical ones in another order."""

    def map_phys(self, phys: int, size: int, dir: str, attrs: int) -> int:
        return phys + 0x5000

    def unmap_phys(self, addr: int, size: int, dir: str, attrs: int) -> None:
        pass

    def read(self, addr: int, size: int) -> bytes:
        return arena("")[0].read(addr - 0x5000, size)

    def write(self, addr: int, data: bytes) -> None:
        arena("")[0].write(addr - 0x5000, data)


KINDS = ("direct", "offset", "forced", "unreachable", "strict", "lazy", "forcedac", "untrusted", "tight", "peers",
         "peers alone", "xen", "grants", "python", "adversary")  # fmt: skip


def device(kind: str, rng: random.Random, limits: dict[str, Any]) -> Device:
    """A device of a kind; ``limits`` are those of its hardware."""
    memory, function, _ = arena("peers" if kind.startswith("peers") else "")
    kw: dict[str, Any] = {"memory": memory, **limits, "coherent": rng.random() < 0.75}
    pool = None
    if kind in ("forced", "unreachable", "untrusted", "xen"):
        pool = Swiotlb(memory, slots=2048, force=kind == "forced", base=(next(POOLS) % 500 + 256) << 22)
    align = rng.choice((0, 0xFFF, limits["virt_boundary"] & 0xFFF))
    if kind == "offset":
        kw["dma_ranges"] = [(BASE, rng.choice((0x80003000, 0x1000)), 1 << 20)]
    elif kind == "forced" or kind == "unreachable":
        kw.update(swiotlb=pool, min_align_mask=align)
        kw["dma_mask"] = min(kw["dma_mask"], 2**32 - 1 if kind == "unreachable" else FULL)
    elif kind in ("strict", "lazy", "forcedac", "peers"):
        kw.update(iommu=Iommu("lazy" if kind == "lazy" else "strict"), forcedac=kind == "forcedac")
    elif kind == "untrusted":
        kw.update(iommu=Iommu(), untrusted=True, swiotlb=pool, min_align_mask=align)
    elif kind == "tight":
        kw.update(iommu=Iommu(), dma_mask=0xFFFFF if rng.random() < 0.5 else 0xFFFF)
    elif kind == "xen":
        kw.update(xen=XenDomain(memory, pool=pool, layout=rng.choice(("scattered", "contiguous"))), swiotlb=pool,
                  min_align_mask=align)  # fmt: skip
    elif kind == "grants":
        kw.update(grants=GrantTable(256), dma_mask=FULL, bus_dma_limit=0)
    elif kind == "python":
        kw.update(backend=Window(), coherent=True)
    elif kind == "adversary":
        kw.update(backend=Adversary(rng.randrange(1000), refuse=0.25, cut=0), coherent=True)
    if kind.startswith("peers"):
        kw["pci"] = function
    return Device(**kw)


def some_limits(rng: random.Random) -> dict[str, Any]:
    """Limits of hardware, each of them given as often as not."""

    def one(usual: Any, *rare: Any) -> Any:
        return usual if rng.random() < 0.5 else rng.choice(rare)

    return {
        "max_segments": one(None, 1, 2, 3, 4, 8),
        "max_segment_size": one(None, 0x200, 0x600, 0x1000, 0x1800, 0x3000, 0x8000),
        "seg_boundary_mask": one(FULL, 0x7FF, 0xFFF, 0x1FFF, 0x3FFF, 0xFFFF, 0xFFFFFFFF),
        "virt_boundary": one(0, 0, 0x1FF, 0xFFF, 0xFFF, 0xFFFF),
        "dma_alignment": one(0, 3, 0x1FF, 0xFFF),
        "dma_mask": one(FULL, 2**48 - 1, 2**40 - 1),
        "bus_dma_limit": one(0, 0, 2**36 - 1),
    }


def some_vecs(rng: random.Random, dev: Device, slots: list[int], *, pages: bool) -> Vecs:
    """Vectors anywhere, or ones that are within the limits of the device as they are given."""
    fit, unit = rng.random() < 0.6, 4096 if pages else dev.dma_alignment + 1
    inner = max(unit, dev.virt_boundary + 1) if fit or rng.random() < 0.5 else unit
    n = rng.choice((1, 2, 3, 5, 9, rng.randint(1, min(len(slots), 20))))
    vecs: Vecs = []
    for slot in rng.sample(slots, min(n, len(slots))):
        first = rng.randrange(0, SLOT, unit if not vecs else inner) & rng.choice((-1, ~0xFFF))
        last = rng.randrange(first, SLOT, unit) + rng.choice((1, 7, unit, inner)) & rng.choice((-1, ~(inner - 1)))
        if not fit and not pages and rng.random() < 0.3:
            first, last = first + rng.choice((0, 4, 0x200)), last + rng.choice((0, 8, 0x200))
        one = (slot + first, min(last, SLOT) - first)
        if one[1] <= 0 or (pages and one[1] % 4096) or (fit and broken(dev, [*vecs, one])):
            continue
        vecs.append(one)
        if rng.random() < 0.4 and one[1] > inner and (one[1] // 2 & -inner) and not pages:  # two that touch
            half = one[1] // 2 & -inner
            split = [*vecs[:-1], (one[0], half), (one[0] + half, one[1] - half)]
            vecs = split if not fit or not broken(dev, split) else vecs
    return vecs or [(slots[0], 4096)]


def broken(dev: Device, vecs: Vecs, *, count: bool = True) -> set[str]:
    """The limits that a list breaks if each pair is a segment: of vectors as they are given, or of segments."""
    mask, out = dev.seg_boundary_mask, set()
    reach = min(dev.dma_mask, dev.bus_dma_limit or dev.dma_mask)
    for at, n in vecs:
        out |= {"alignment"} if (at | n) & dev.dma_alignment else set()
        out |= {"size"} if dev.max_segment_size is not None and n > dev.max_segment_size else set()
        out |= {"boundary"} if (at ^ (at + n - 1)) & ~mask else set()
        out |= {"not-capable"} if at + n - 1 > reach else set()
    for (at, n), (then, _) in itertools.pairwise(vecs):
        out |= {"virt-boundary"} if (at + n | then) & dev.virt_boundary else set()
    return out | ({"max-segments"} if count and len(vecs) > dev.max_segments else set())


def runs(vecs: Vecs) -> Vecs:
    """Vectors that continue each other, as one."""
    out: Vecs = []
    for at, n in vecs:
        if out and sum(out[-1]) == at:
            out[-1] = (out[-1][0], out[-1][1] + n)
        else:
            out.append((at, n))
    return out


def cut(dev: Device, vecs: Vecs) -> Vecs | None:
    """As few segments as a direct device takes them in; None where no cut is right."""
    out: Vecs = []
    keep = dev.dma_alignment | dev.virt_boundary
    for at, n in runs(vecs):
        while n:
            room = min(n, dev.max_segment_size or n, dev.seg_boundary_mask - (at & dev.seg_boundary_mask) + 1)
            room = room if room == n else (at + room & ~keep) - at
            if room <= 0:
                return None
            out.append((at, room))
            at, n = at + room, n - room
    return out


@dataclass
class Case:
    """One device and one request."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.kind = KINDS[self.seed % len(KINDS)]
        self.dev = device(self.kind, rng, some_limits(rng))
        self.memory, _, slots = arena("peers" if self.kind.startswith("peers") else "")
        self.policy: Any = "linux" if rng.random() < 0.4 else "unified"
        what = rng.choice(("bio", "bio", "request", "region"))
        self.region = what == "region"
        self.vecs = some_vecs(rng, self.dev, slots, pages=self.region)
        op = rng.choice(("read", "write"))
        self.request: Any = Bio(self.vecs, op=op)
        if self.region:
            self.request = MemoryRegion(self.vecs, length=sum(n for _, n in self.vecs))
        elif what == "request":
            at = rng.randint(0, len(self.vecs) - 1)
            self.request = Request([Bio(part, op=op) for part in (self.vecs[:at], self.vecs[at:]) if part])

    def told(self) -> Vecs | None:
        """The vectors by the addresses that the device is told, where these follow from the physical ones."""
        if self.kind == "offset":
            by: int | None = int(self.dev.fresh().map_phys(BASE, 1)) - BASE
        else:
            by = {"direct": 0, "python": 0x5000}.get(self.kind)
        return None if by is None else [(at + by, n) for at, n in self.vecs]

    def within(self) -> bool:
        """Is the request within the limits as it is given, and can it be mapped without a bounce?"""
        if broken(self.dev, self.vecs) - {"not-capable"} or (self.region and not self.dev.coherent):
            return False
        if self.kind in ("forced", "unreachable", "tight", "xen", "grants", "adversary") or self.kind.startswith("peers"):
            return False  # bounced, out of addresses, or told addresses that nobody knows before
        if 0 < self.dev.merge_boundary < self.dev.virt_boundary:
            return False  # an IOVA keeps the bits of a granule alone
        if self.kind == "untrusted":
            return not any((at | n) & 4095 for at, n in self.vecs)
        return not broken(self.dev, self.told() or [(0, 1)])

    def limit_of(self) -> int:
        return self.dev.max_segments if not self.region or self.dev.max_segments < 65535 else 1 << 32

    def right(self, mapping: Any, split: bool) -> None:
        """Every segment within every limit, every byte where it belongs."""
        segments = [(int(s.addr), s.length) for s in mapping]
        assert sum(n for _, n in segments) == self.request.total
        if not split:
            assert not broken(self.dev, segments, count=False), (segments, mapping.layout)
            assert len(segments) <= self.limit_of(), (segments, mapping.layout)
        engine, fresh = DmaEngine(self.dev), None
        if self.request.dir != "from_device":
            assert engine.read(segments) == self.bytes()
        if self.request.dir != "to_device":
            engine.write(segments, fresh := self.rng.randbytes(self.request.total))
        mapping.unmap()
        assert fresh is None or self.bytes() == fresh

    def bytes(self) -> bytes:
        return b"".join(self.memory.read(at, n) for at, n in self.vecs)

    def refused(self, error: DmaError) -> None:
        """The rule that is named is really broken."""
        assert not (self.policy == "unified" and self.within()), f"refused: {error}"
        names = [name for name, rule in RULES.items() if rule.text in error.rule]
        given, told = runs(self.vecs), self.told()
        least, own = cut(self.dev, self.vecs), cut(self.dev, told) if told else None
        for name in names:
            if name == "alignment":
                assert "alignment" in broken(self.dev, given) | broken(self.dev, told or [])
            elif name == "virt-boundary" and (self.dev.virt_boundary <= 0xFFF or self.kind in ("direct", "offset")):
                given = self.vecs if self.policy == "linux" else given  # the block layer looks at them as they are given
                assert any("virt-boundary" in broken(self.dev, vecs) for vecs in (given, least or [], told or []))
            elif name == "max-segments" and self.policy == "linux":  # as Linux counts, or as the device is told then
                assert len(iterate(self.request, self.dev)) > self.limit_of() or told != self.vecs or self.region
            elif name == "max-segments" and told:
                assert least is None or own is None or max(len(least), len(own)) > self.limit_of()
            elif name == "max-segments" and self.kind in ("strict", "lazy", "forcedac"):
                assert least is None or len(least) > self.limit_of()
            elif name == "no-cut":
                assert self.dev.dma_alignment | self.dev.virt_boundary
            elif name == "bounce-offset":
                assert (self.dev.dma_alignment | self.dev.virt_boundary) & ~self.dev.min_align_mask
            elif name == "link-failed":  # Linux cuts before it links, and a cut inside a granule cannot be linked
                assert self.policy == "linux" or self.kind == "adversary" or (self.region and not self.dev.coherent)


def run(seed: int, *, split: bool = False) -> None:
    case = Case(seed)
    before = live(case.dev)
    how: dict[str, Any] = {"split": True} if split else {}
    try:
        mapping = case.dev.map(case.request, "linux" if split else case.policy, **how)
    except DmaError as e:
        if not split:
            case.refused(e)
    else:
        case.right(mapping, split)
    if case.dev.iommu is not None:
        case.dev.iommu.advance(10_000_000)
    assert live(case.dev) == before
