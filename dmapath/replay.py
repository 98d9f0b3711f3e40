"""A kernel's trace, mapped again by policy ``linux``, and compared with what the kernel did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio
from dmapath.device import Device
from dmapath.request import iterate
from dmapath.swiotlb import Swiotlb
from dmapath.trace import Command, Io, TraceEvent, read_ios
from dmapath.tracer import Tracer, map_like_nvme

__all__ = ["Outcome", "Report", "replay"]

PAGE = 4096
KIB = 1024
POOL = -1  # where a bounce buffer lies differs from pool to pool


@dataclass
class Flow:
    """How one command was mapped, in terms that a trace shows and a simulation can give."""

    kind: str  # direct, single (map_phys), two-step, classic
    ranges: int
    maps: list[tuple[int, int, int]]  # IOVA from the start of its range, phys (POOL: a bounce buffer), bytes
    addrs: list[tuple[int, int]]  # of each classic range: offset of the DMA address in its page, bytes
    bounces: list[tuple[int, int]]  # of each bounce buffer: the original's address and bytes
    unmaps: list[int]  # bytes of each page-table unmap
    releases: int  # dma_unmap_phys calls
    flushes: list[tuple[int, int]] | None  # (bytes, log2 pages) of each; None: the trace does not show them
    sync_flushes: list[tuple[int, int]] | None


@dataclass
class Outcome:
    """One I/O: agreed, disagreed (with what), or not covered (with why)."""

    io: Io
    verdict: str
    kinds: str = ""
    differences: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class Report:
    """A trace's outcomes."""

    name: str
    environment: str
    outcomes: list[Outcome]
    traced: str = ""  # our own trace of the same I/Os, where it was asked for

    def count(self, verdict: str) -> int:
        """I/Os with that verdict."""
        return sum(o.verdict == verdict for o in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "trace": self.name,
            "environment": self.environment,
            "agree": self.count("agree"),
            "disagree": self.count("disagree"),
            "not_covered": self.count("not covered"),
            "ios": [
                {"io": o.io.name, "op": o.io.op, "line": o.io.line, "verdict": o.verdict, "flow": o.kinds,
                 "differences": o.differences, "reason": o.reason}
                for o in self.outcomes
            ],
        }  # fmt: skip


def kernel_flow(cmd: Command, *, shows_flushes: bool, caching: bool) -> Flow:
    """What the trace says that the kernel did."""
    maps, phys, pooled = cmd.of("map"), cmd.of("dma_map_phys"), _pooled(cmd)
    starts: list[int] = []
    out: list[tuple[int, int, int]] = []
    end = None
    for m in maps:
        iova = m.num(0)
        classic = any(p.num(2) & ~(PAGE - 1) == iova for p in phys)
        if classic or end != iova:
            starts.append(iova)
        out.append((iova - starts[-1], POOL if m in pooled else m.num(2), m.num(3)))
        end = m.num(1)
    kind = "two-step" if not phys else "direct" if not maps else "single" if len(phys) == 1 else "classic"

    def seen(name: str) -> list[tuple[int, int]]:
        flushes = cmd.of("cache_tag_flush_range", name)
        return [(f.num(3) - f.num(2) + 1, f.num(5)) for f in flushes]

    return Flow(
        kind,
        len(phys) or len(starts),
        out,
        [(p.num(2) & (PAGE - 1), p.num(3)) for p in phys],
        [(b.num(2), b.num(3)) for b in cmd.of("swiotlb_bounced")],
        [u.num(3) for u in cmd.of("unmap")],
        len(cmd.of("dma_unmap_phys")),
        seen("cache_tag_flush_range") if shows_flushes else None,
        seen("cache_tag_flush_range_np") if caching else None,
    )


def _pooled(cmd: Command) -> dict[TraceEvent, tuple[int, int]]:
    """Map events whose pages are a bounce buffer's, with the original: each follows its bounce."""
    out: dict[TraceEvent, tuple[int, int]] = {}
    pending = None
    for e in cmd.events:
        if e.kind == "swiotlb_bounced":
            pending = (e.num(2), e.num(3))
        elif e.kind == "map" and pending is not None:
            out[e] = pending
            pending = None
    return out


def our_flow(device: Device, bio: Bio, *, shows_flushes: bool, caching: bool) -> Flow:
    """What policy ``linux`` does with the same vectors, the way the NVMe driver asks for it."""
    recorded = device.backend.name == "iommu"
    if recorded:
        device.backend.record(True)
    bounces: list[tuple[int, int]] = []
    pool = device.swiotlb
    before = device.counters()
    layout, segments = map_like_nvme(device, bio)
    if pool is not None and not recorded:
        pieces = zip(iterate(bio, device), segments, strict=True)
        bounces = [(int(p), n) for (p, n), (addr, _) in pieces if addr in pool]
    addrs = [] if layout == "linear" else [(addr & (PAGE - 1), n) for addr, n in segments]
    after = device.counters()
    events = device.backend.events() if recorded else []
    starts = [a for kind, a, _, _ in events if kind == "alloc"]
    maps = []
    for kind, iova, phys, n in events:
        if kind == "map":
            start = max(s for s in starts if s <= iova)
            maps.append((iova - start, POOL if pool is not None and phys in pool else phys, n))
    if recorded:
        bounces = [(a, b) for kind, a, b, _ in events if kind == "bounce"]
    flow = {"linear": "two-step", "per-range": "classic", "bounced": "classic", "single": "single"}.get(layout, "direct")
    return Flow(
        "direct" if not recorded else flow,
        len(addrs) or len(starts),
        maps,
        addrs,
        bounces,
        [b for kind, _, b, _ in events if kind == "unmap"],
        after["unmaps"] - before["unmaps"],
        [(b - a + 1, c) for kind, a, b, c in events if kind == "flush"] if shows_flushes else None,
        [(b - a + 1, c) for kind, a, b, c in events if kind == "flush_np"] if caching else None,
    )


def _runs(cmd: Command, start_offset: int) -> list[tuple[int, int]]:
    """Physical runs of a command's bytes. Two-step maps show whole pages: the first is cut at the vector's offset."""
    phys = cmd.of("dma_map_phys")
    if phys:
        return [(p.num(4), p.num(3)) for p in phys]
    pooled = _pooled(cmd)
    out = []
    for i, m in enumerate(cmd.of("map")):
        skip = 0 if i else start_offset
        out.append(pooled.get(m, (m.num(2) + skip, m.num(3) - skip)))
    return out


def _vectors(io: Io) -> tuple[list[tuple[int, int]], list[str]]:
    """The I/O's vectors, page by page: announced first pages, and the trace's own pages inside long vectors."""
    runs: list[tuple[int, int]] = []
    offset = io.vecs[0][0] % PAGE
    for cmd in io.commands:
        runs += _runs(cmd, offset)
        offset = 0
    out: list[tuple[int, int]] = []
    wrong: list[str] = []
    for i, (at, length) in enumerate(io.vecs):
        first = True
        while length:
            if not runs:
                wrong.append(f"vector {i}: the trace maps {length:#x} bytes too few")
                return out, wrong
            phys, n = runs.pop(0)
            if first and phys != at:
                wrong.append(f"vector {i}: announced at {at:#x}, mapped at {phys:#x}")
            take = min(n, length)
            out.append((phys, take))
            if n > take and (length > take or i + 1 < len(io.vecs)):
                runs.insert(0, (phys + take, n - take))
            length -= take
            first = False
    return out, wrong


def _differences(kernel: Flow, ours: Flow) -> Iterator[str]:
    for name, words in (
        ("kind", "flow"),
        ("ranges", "ranges"),
        ("maps", "pages mapped (offset, phys, bytes)"),
        ("bounces", "bounced (original, bytes)"),
        ("addrs", "DMA addresses (offset in page, bytes)"),
        ("unmaps", "bytes of each unmap"),
        ("releases", "dma_unmap_phys calls"),
        ("flushes", "IOTLB flushes (bytes, log2 pages)"),
        ("sync_flushes", "flushes at sync (bytes, log2 pages)"),
    ):
        a, b = getattr(kernel, name), getattr(ours, name)
        if a != b:
            yield f"{words}: the kernel {_short(a)}, here {_short(b)}"


def _short(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(str(tuple(hex(x) for x in v)) if isinstance(v, tuple) else hex(v) for v in value) + "]"
    return str(value)


def _trace_again(io: Io, bio: Bio, pieces: list[Bio], device: Device, tracer: Tracer) -> None:
    device.attach(tracer)
    with tracer.io(io.name, bio):
        for piece in pieces:
            tracer.command(piece)
            map_like_nvme(device, piece)
    device.detach(tracer)


def _compare_io(io: Io, device: Device, max_bytes: int, tracer: Tracer | None, *, shows_flushes: bool, caching: bool
                ) -> Outcome:  # fmt: skip
    if io.result is None or io.result < 0 or not io.commands:
        return Outcome(io, "not covered", reason="the I/O failed or became no command")
    vecs, wrong = _vectors(io)
    if wrong:  # what was mapped is not what was announced: there is nothing to map again
        return Outcome(io, "disagree", differences=wrong)
    bio = Bio.from_phys(vecs, op=io.op)
    pieces = bio.split(device, max_bytes=max_bytes)
    kinds = []
    if len(pieces) != len(io.commands):
        wrong.append(f"commands: the kernel {len(io.commands)}, here {len(pieces)}")
    for i, (cmd, piece) in enumerate(zip(io.commands, pieces, strict=False)):
        kernel = kernel_flow(cmd, shows_flushes=shows_flushes, caching=caching)
        ours = our_flow(device, piece, shows_flushes=shows_flushes, caching=caching)
        kinds.append(f"{ours.kind} x{ours.ranges}")
        wrong += [f"command {i} (line {cmd.line}): {d}" for d in _differences(kernel, ours)]
    if tracer is not None:
        _trace_again(io, bio, pieces, device, tracer)
    return Outcome(io, "disagree" if wrong else "agree", " + ".join(kinds), wrong)


def replay(lines: Iterator[str] | list[str], name: str, *, trace: bool = False) -> Report:
    """Map each I/O of a trace again and compare. Raises TraceError for a text that is no whole trace.

    With ``trace`` the report's ``traced`` is a trace of our own of the same I/Os, which ``replay`` reads like a kernel's.
    """
    ios = read_ios(lines, name)
    commands = [c for io in ios for c in io.commands]
    iommu = any(c.of("map") for c in commands)
    shows_flushes = any(c.of("cache_tag_flush_range", "cache_tag_flush_range") for c in commands)
    caching = any(c.of("cache_tag_flush_range", "cache_tag_flush_range_np") for c in commands)
    # without flush events nobody can tell strict from lazy; what is compared does not depend on it
    unit = Iommu("strict", caching_mode=caching) if iommu else None
    # QEMU's NVMe controller takes SGLs: no virt boundary; 128 KiB is dma_opt_mapping_size behind an IOMMU
    bounced = any(c.of("swiotlb_bounced") for c in commands)
    # behind an IOMMU only an untrusted device bounces; without one it is swiotlb=force, for these 64-bit devices
    pool = Swiotlb(force=not iommu) if bounced else None
    device = Device(iommu=unit, max_segments=256, dma_alignment=3, min_align_mask=0xFFF, max_segment_size=2**32 - 1,
                    untrusted=bounced and iommu, swiotlb=pool)  # fmt: skip
    max_bytes = 128 * KIB if iommu else 8 * KIB * KIB if pool is None else pool.max_mapping_size(0xFFF)
    words = "IOMMU" if iommu else "no IOMMU in the path"
    if iommu:
        words += ", flushes shown" if shows_flushes else ", flushes not shown"
        words += ", caching mode" if caching else ""
    words += f", bounces: {'untrusted device' if iommu else 'swiotlb=force'}" if bounced else ""
    tracer = Tracer() if trace else None
    outcomes = [_compare_io(io, device, max_bytes, tracer, shows_flushes=shows_flushes, caching=caching) for io in ios]
    return Report(name, words, outcomes, "" if tracer is None else tracer.text)
