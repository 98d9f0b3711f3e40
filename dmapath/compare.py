"""The seed's question in numbers: the same requests, aligned and not, by both policies, on each back end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dmapath import _bench
from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio
from dmapath.costs import modelled_ns
from dmapath.device import Device, Mapping
from dmapath.engine import DmaEngine
from dmapath.memory import PhysMemory
from dmapath.mr import MemoryRegion
from dmapath.pci import Fabric
from dmapath.request import Mappable
from dmapath.rules import CASES
from dmapath.swiotlb import Swiotlb

__all__ = ["Case", "SixCase", "cases", "json_object", "rows", "sentences", "six_cases", "six_rows", "transfer"]

PAGE = 4096
BIO_RANGES = (1, 8, 32, 128)
MR_BYTES = 16 << 20
UNALIGNED = 0x200
MODES = (("direct", "none"), ("iommu", "strict"), ("iommu", "lazy"))
POLICIES = ("linux", "unified")


@dataclass(frozen=True)
class Case:
    """One request to compare: how to make it for reading from memory and for writing to it, and where its bytes lie."""

    request: str
    alignment: str
    ranges: int
    memory: PhysMemory
    places: tuple[tuple[int, int], ...]  # (offset in the arena, bytes)

    @property
    def size(self) -> int:
        """Bytes of the request."""
        return sum(n for _, n in self.places)

    def make(self, op: str) -> Mappable:
        """The request itself; a memory region goes both ways."""
        if self.request == "mr":
            return MemoryRegion.from_memory(self.memory, *self.places[0])
        return Bio.from_memory(self.memory, self.places, op=op)


def cases() -> Iterator[Case]:
    """Bios of 1 to 128 ranges of 4 KiB, two pages apart in memory, and a 16 MiB region of scattered pages."""
    arena = PhysMemory(3 * PAGE * max(BIO_RANGES))
    pages = PhysMemory(MR_BYTES + PAGE, layout="scattered", seed=1)
    for ranges in BIO_RANGES:
        for alignment, shift in (("aligned", 0), ("unaligned", UNALIGNED)):
            # every third page, from the top down: neither physically adjacent nor in order
            places = tuple((3 * PAGE * (ranges - 1 - i) + shift, PAGE) for i in range(ranges))
            yield Case("bio", alignment, ranges, arena, places)
    for alignment, shift in (("aligned", 0), ("unaligned", UNALIGNED)):
        yield Case("mr", alignment, 1, pages, ((shift, MR_BYTES),))


# ---- the six cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SixCase:
    """One of the six cases of the discussion: a machine, and a request as (physical address, bytes) on it."""

    number: int
    words: str
    device: Device
    vecs: tuple[tuple[int, int], ...]

    @property
    def memory(self) -> PhysMemory:
        """The machine's memory."""
        memory: PhysMemory = self.device.memory
        return memory

    def bytes(self) -> bytes:
        """What the request's memory holds, as the CPU sees it."""
        return b"".join(self.memory.read(p, n) for p, n in self.vecs)


def transfer(device: Device, request: Mappable, policy: str, move: Callable[[Mapping], bytes | int]) -> Mapping:
    """The whole driver, the same for every case: map, give the segments to the hardware, unmap."""
    mapping = device.map(request, policy)
    try:
        move(mapping)
    finally:
        mapping.unmap()
    return mapping


def six_cases() -> list[SixCase]:
    """Fresh machines for the six cases, in their order."""
    out = []
    for number in range(1, 7):
        memory = PhysMemory(64 * PAGE)
        ranges = [(memory.phys(PAGE * at), PAGE) for at in (20, 8, 2)]
        options: dict[str, Any] = {}
        if number in (1, 6):
            ranges = [(p + UNALIGNED, n) for p, n in ranges]
        if number in (2, 3, 6):
            options["iommu"] = Iommu("strict")
        if number == 3:
            switch = Fabric().root_complex().port().switch()
            peer = switch.port().function("gpu").bar(memory, 1 << 20)
            options["pci"] = switch.port().function("nic")
            ranges.insert(1, peer.vecs(4 * PAGE, PAGE)[0])
        if number in (4, 5):
            options["swiotlb"] = Swiotlb(memory, slots=256, force=True)
            ranges = ranges[:1] if number == 4 else ranges
        device = Device(memory=memory, **options)
        name, words = next((n, w) for n, w in CASES.values() if n == number)
        out.append(SixCase(name, words, device, tuple((int(p), n) for p, n in ranges)))
    return out


def six_rows() -> list[dict[str, Any]]:
    """One row per case and policy; bytes are moved and compared in both directions."""
    rows = []
    for policy in POLICIES:
        for case in six_cases():
            told = case.device.explain(Bio.from_phys(case.vecs, op="write"), policy)
            rows.append(
                {
                    "number": case.number,
                    "setup": case.words,
                    "policy": policy,
                    "case": told.case,
                    "layout": told.layout,
                    "segments": len(told.segments),
                    "iova_allocs": told.iova_allocs,
                    "invalidations": told.invalidations,
                    "bounced_bytes": sum(n for _, _, n in told.bounced),
                    "unmap_state_bytes": told.unmap_state_bytes,
                    "exposed_bytes": told.exposed_bytes,
                    "verified": None if told.error else _six_verified(case, policy),
                    "error": told.error,
                }
            )
    return rows


def _six_verified(case: SixCase, policy: str) -> bool:
    engine = DmaEngine(case.device)
    for p, n in case.vecs:
        case.memory.write(p, os.urandom(n))
    want, got = case.bytes(), b""

    def fetch(m: Mapping) -> bytes:
        nonlocal got
        got = engine.read(m.segments)
        return got

    transfer(case.device, Bio.from_phys(case.vecs, op="write"), policy, fetch)
    incoming = os.urandom(len(want))
    transfer(case.device, Bio.from_phys(case.vecs, op="read"), policy, lambda m: engine.write(m.segments, incoming))
    return got == want and case.bytes() == incoming


# ---- aligned and unaligned ------------------------------------------------------------------------------------------


def _device(backend: str, mode: str, memory: PhysMemory) -> Device:
    return Device(iommu=Iommu(mode) if backend == "iommu" else None, memory=memory)


def _trim(case: Case, data: bytes) -> bytes:
    """The request's own bytes of what its segments carry: a region's pages are mapped whole."""
    return data[case.places[0][0] % PAGE :][: case.size] if case.request == "mr" else data


def _verify(case: Case, device: Device, policy: str) -> bool:
    """Move known bytes by DMA, out of memory and into it, and look at them from the other side."""
    engine, memory = DmaEngine(device), memoryview(case.memory)
    for at, n in case.places:
        memory[at : at + n] = os.urandom(n)
    want = b"".join(bytes(memory[at : at + n]) for at, n in case.places)
    with device.map(case.make("write"), policy) as m:
        if _trim(case, engine.read(m.segments)) != want:
            return False
    with device.map(case.make("read"), policy) as m:
        incoming = os.urandom(sum(s.length for s in m.segments))
        engine.write(m.segments, incoming)
    return b"".join(bytes(memory[at : at + n]) for at, n in case.places) == _trim(case, incoming)


def _row(case: Case, backend: str, mode: str, policy: str, rounds: int) -> dict[str, Any]:
    device = _device(backend, mode, case.memory)
    request = case.make("read")
    told = device.explain(request, policy)
    verified = _verify(case, device, policy)
    walks = _walk_reads(case, backend, mode, policy)
    map_ns, unmap_ns = _bench.time_request(device, request, policy, rounds)
    mapped = len(told.maps)
    return {
        "request": case.request,
        "ranges": case.ranges,
        "bytes": case.size,
        "alignment": case.alignment,
        "backend": backend,
        "mode": mode,
        "policy": policy,
        "case": told.case,
        "layout": told.layout,
        "segments": len(told.segments),
        "iova_allocs": told.iova_allocs,
        "ptes": told.ptes,
        "invalidations": told.invalidations,
        "bounced_bytes": sum(n for _, _, n in told.bounced),
        "unmap_state_bytes": told.unmap_state_bytes,
        "exposed_bytes": told.exposed_bytes,
        "verified": verified,
        "map_ns": map_ns,
        "unmap_ns": unmap_ns,
        "modelled_ns": round(
            modelled_ns(
                {
                    "iova_alloc": told.iova_allocs,
                    "map_call": mapped,
                    "sync": told.iova_allocs,
                    "unmap_call": told.iova_allocs,
                    "invalidation": told.invalidations,
                    "dma_page": sum(-(-s // PAGE) for _, s in told.segments),
                    "walk_read": walks,
                }
            )
        ),
    }


def _walk_reads(case: Case, backend: str, mode: str, policy: str) -> int:
    """Memory reads of page walks for one transfer over the request, from a cold IOTLB."""
    if backend != "iommu":
        return 0
    device = _device(backend, mode, case.memory)
    with device.map(case.make("write"), policy) as m:
        DmaEngine(device).read(m.segments)
        return int(device.iommu.iotlb()["walk_reads"])


def rows(progress: Callable[[int, int], None] = lambda done, of: None) -> list[dict[str, Any]]:
    """One row per case, back end and policy, in the order of the table."""
    every = list(cases())
    jobs = [(c, b, m, p) for b, m in MODES for c in every for p in POLICIES]
    out = []
    for i, (case, backend, mode, policy) in enumerate(jobs):
        progress(i, len(jobs))
        out.append(_row(case, backend, mode, policy, 31 if case.request == "mr" else 2001))
    progress(len(jobs), len(jobs))
    return out


def json_object(table: list[dict[str, Any]], six: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that ``--json`` writes."""
    return {"version": 1, "rows": table, "cases": six}


def _pick(table: list[dict[str, Any]], **want: object) -> dict[str, Any]:
    return next(r for r in table if all(r[k] == v for k, v in want.items()))


def sentences(table: list[dict[str, Any]]) -> list[str]:
    """What the figures say, in words, computed from them."""
    strict = {"backend": "iommu", "mode": "strict", "request": "bio", "ranges": 32}
    lin, uni = (_pick(table, policy=p, alignment="unaligned", **strict) for p in POLICIES)
    ali = _pick(table, policy="unified", alignment="aligned", **strict)
    time = {id(r): r["map_ns"] + r["unmap_ns"] for r in (lin, uni, ali)}
    same = sum(
        all(a[k] == b[k] for k in ("layout", "segments", "iova_allocs", "invalidations", "exposed_bytes"))
        for a, b in zip(*(
            [r for r in table if r["policy"] == p and r["alignment"] == "aligned" and r["request"] == "bio"]
            for p in POLICIES
        ), strict=True)
    )
    of = sum(r["alignment"] == "aligned" and r["policy"] == "linux" and r["request"] == "bio" for r in table)
    bad = [r for r in table if not r["verified"]]
    lazy = {p: _pick(table, policy=p, alignment="unaligned", **{**strict, "mode": "lazy"}) for p in POLICIES}
    extra = uni["exposed_bytes"] - lin["exposed_bytes"]
    exposure = "the same bytes" if not extra else f"{abs(extra)} bytes {'more' if extra > 0 else 'fewer'}"
    return [
        f"32 unaligned ranges on a strict IOMMU: Linux's rules make {lin['iova_allocs']} IOVA allocations, "
        f"{lin['invalidations']} IOTLB invalidations and {lin['unmap_state_bytes']} bytes to keep for unmap; the unified "
        f"flow makes {uni['iova_allocs']}, {uni['invalidations']} and {uni['unmap_state_bytes']}, hands the device the "
        f"same {uni['segments']} segments, exposes {exposure} beyond the request, and took "
        f"{time[id(uni)] / time[id(lin)]:.2f} of the time here ({lin['modelled_ns'] / 1000:.0f} against "
        f"{uni['modelled_ns'] / 1000:.0f} us modelled).",
        f"Unaligned costs the unified flow {time[id(uni)] / time[id(ali)]:.2f} times its aligned time and "
        f"{uni['segments']} segments instead of {ali['segments']}: the flow of calls is the same. "
        f"With aligned bios the two policies decide alike in {same} of {of} rows. In lazy mode Linux's rules put off "
        f"those flushes ({lazy['linux']['invalidations']} at once, stale entries until a full flush), where the unified "
        f"flow makes {lazy['unified']['invalidations']} per request.",
        "Every byte arrived in both directions in every row."
        if not bad
        else f"DATA MISMATCH in {len(bad)} of {len(table)} rows: {bad[0]}",
    ]
