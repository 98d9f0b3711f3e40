"""Answers without mapping: what a request would become on a device, and by which rules."""

from __future__ import annotations

import errno as _errno
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dmapath.errors import DmaError, NotSupportedError
from dmapath.request import iterate
from dmapath.rules import CASES, RULES, bounce_parts

if TYPE_CHECKING:
    from dmapath.device import Device
    from dmapath.request import Mappable

__all__ = ["Explanation"]

_ADDRESSES = {"direct": "Physical addresses as they are", "xen": "Machine addresses as they are",
              "grant": "Grant references, bit 63 set", "verbs": "Addresses in the arena's one region"}  # fmt: skip


@dataclass
class Explanation:
    """What ``Device.explain`` found. ``to_dict`` has the keys of the CLI's JSON; sizes are bytes."""

    policy: str
    backend: str = ""
    case: str | None = None
    layout: str | None = None
    segments: list[tuple[int, int]] = field(default_factory=list)
    iova_allocs: int = 0
    iova_bytes: int = 0
    maps: list[tuple[int, int, int]] = field(default_factory=list)
    ptes: dict[str, int] = field(default_factory=lambda: {"4k": 0, "2m": 0, "1g": 0})
    invalidations: int = 0
    bounced: list[tuple[str, int, int]] = field(default_factory=list)
    unmap_state_bytes: int = 0
    exposed_bytes: int | None = 0
    rules: list[tuple[str, str, str]] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: addresses as hex strings; exposed_bytes None where the device can reach all memory."""
        return {
            "case": self.case,
            "layout": self.layout,
            "segments": [{"addr": hex(a), "len": n} for a, n in self.segments],
            "iova_allocs": self.iova_allocs,
            "iova_bytes": self.iova_bytes,
            "maps": [{"iova": hex(i), "phys": hex(p), "len": n} for i, p, n in self.maps],
            "ptes": dict(self.ptes),
            "invalidations": self.invalidations,
            "bounced": [{"part": part, "phys": hex(p), "len": n} for part, p, n in self.bounced],
            "unmap_state_bytes": self.unmap_state_bytes,
            "exposed_bytes": self.exposed_bytes,
            "rules": [{"rule": r, "source": s, "because": b} for r, s, b in self.rules],
            "error": self.error,
        }

    def headline(self) -> str:
        """One sentence: what the list becomes."""
        if self.error is not None:
            return f"An error: {self.error}."
        n = len(self.segments)
        pieces = "1 segment" if n == 1 else f"{n} segments"
        words = {
            "none": "Nothing: the request is empty.",
            "direct": f"{_ADDRESSES.get(self.backend, _ADDRESSES['direct'])}, in {pieces}; no IOMMU is in the path.",
            "linear": f"One IOVA range that reads as {pieces}.",
            "gapped": f"One IOVA range with gaps: {pieces}, one allocation, one flush, nothing kept per range.",
            "bounced": f"Bounce buffers: {pieces}, copied in now and back at unmap.",
            "per-range": f"Many IOVA ranges: {pieces}, each mapped, flushed and remembered by itself.",
        }[self.layout or "none"]
        number, name = CASES[self.case or "empty"]
        return f"{words} Case {number}: {name}." if number else words


def _part(phys: int, size: int, granule: int, layout: str | None) -> str:
    return "whole" if layout == "bounced" else "head" if phys % granule else "tail"


def _covered(runs: list[tuple[int, int]]) -> int:
    total, reached = 0, 0
    for at, n in sorted((int(a), n) for a, n in runs):
        end = at + n
        total += max(0, end - max(at, reached))
        reached = max(reached, end)
    return total


def explain(device: Device, request: Mappable, policy: str, *, split: bool = False) -> Explanation:
    """Map the request on a fresh device of the same kind, look, and unmap it."""
    if device.backend.name not in ("direct", "iommu", "xen", "grant") and not device.backend.can_be_fresh:
        raise NotSupportedError(f"explain needs a fresh IOVA space, and the back end {device.backend.name!r} gives none",
                                argument="device", value=device)
    trial = device.fresh()
    out = Explanation(policy, device.backend.name)
    recorded = trial.backend.name == "iommu"
    if recorded:
        trial.backend.record(True)
    try:
        mapping = trial.map(request, policy, split=split)
    except DmaError as e:
        out.error = f"{_errno.errorcode.get(e.errno or 0, '?')}: {e.rule}"
        _bounces(trial, request, out)
        return out
    out.case, out.layout = mapping.case, mapping.layout
    out.segments = [(int(s.addr), s.length) for s in mapping.segments]
    names = mapping.rules
    if out.layout == "bounced":
        out.bounced = [("whole", int(p), n) for (p, n), (a, _) in zip(iterate(request, trial), out.segments, strict=True)
                       if a in trial.swiotlb]  # fmt: skip
    mapping.unmap()
    out.unmap_state_bytes = mapping.unmap_state_bytes
    counters = trial.counters()
    if recorded:
        events = trial.backend.events()
        allocs = [(a, b) for kind, a, b, _ in events if kind == "alloc"]
        out.iova_allocs, out.iova_bytes = len(allocs), sum(n for _, n in allocs)
        out.maps = [(a, b, c) for kind, a, b, c in events if kind == "map"]
        granule = trial.merge_boundary + 1
        out.bounced = [(_part(a, b, granule, out.layout), a, b) for kind, a, b, _ in events if kind == "bounce"]
        if out.bounced and out.layout != "bounced":
            names.append("bounced-ends")
        # what lies in the pool is zero around the data
        seen = [m for m in out.maps if trial.swiotlb is None or m[1] not in trial.swiotlb]
        asked = [(int(p), n) for p, n in request.wanted]
        out.exposed_bytes = _covered([(p, n) for _, p, n in seen] + asked) - _covered(asked)
    elif out.backend == "grant":
        asked = [(int(p), n) for p, n in request.wanted]
        pages = [(p & ~4095, (p + n + 4095 & ~4095) - (p & ~4095)) for p, n in asked]
        out.exposed_bytes = _covered(pages) - _covered(asked)
    elif out.backend == "verbs":
        out.iova_allocs, out.iova_bytes = counters["iova_allocs"], counters["iova_bytes"]
        out.exposed_bytes = max(0, counters["registered_bytes"] - _covered([(int(p), n) for p, n in request.wanted]))
    else:
        out.exposed_bytes = None
    out.ptes = {size: counters[f"ptes_{size}"] for size in out.ptes}
    out.invalidations = counters["invalidations"]
    out.rules = [(name, RULES[name].source, _because(name, trial, request, out)) for name in
                 [*names, *_after(trial, out, two_step=counters["unlinks"] > 0)]]
    return out


def _after(device: Device, out: Explanation, *, two_step: bool) -> list[str]:
    if out.layout == "none":
        return []
    if out.exposed_bytes is None:
        return ["see-all"]
    if out.backend in ("grant", "verbs"):
        return ["granted" if out.backend == "grant" else "registered", *(["exposure"] if out.exposed_bytes else [])]
    flush = "flush-now" if two_step else "flush-queue" if device.backend.mode == "lazy" else "flush-strict"
    return [flush, *(["exposure"] if out.exposed_bytes else [])]


def _bounces(device: Device, request: Mappable, out: Explanation) -> None:
    granule = device.merge_boundary + 1
    if device.untrusted and granule > 1:
        for phys, n in request.vecs:
            out.bounced += bounce_parts(int(phys), n, granule)
    pool = "no-pool" if device.swiotlb is None else "pool-full"
    for name in ("bounce-needed", pool) if out.bounced else ():
        out.rules.append((name, RULES[name].source, _because(name, device, request, out)))


def _because(name: str, device: Device, request: Mappable, out: Explanation) -> str:
    text = RULES[name].text
    granule = device.merge_boundary + 1
    vecs = [(int(p), n) for p, n in request.vecs]
    if name in ("gap", "gapped", "non-coherent", "virt-boundary"):
        for (p, n), (q, _) in itertools.pairwise(vecs):
            if (p + n) % granule:
                return f"{text}: {p:#x}+{n:#x} ends {(p + n) % granule:#x} into a granule of {granule:#x}"
            if q % granule:
                return f"{text}: {q:#x} begins {q % granule:#x} into a granule of {granule:#x}"
    if name == "no-gap":
        return f"{text}: {request.gap_mask:#x} & {granule - 1:#x}"
    if name == "bounce-needed":
        return f"{text}: {sum(n for _, _, n in out.bounced)} bytes in {len(out.bounced)} parts"
    if name == "registered":
        return f"{text}: {device.counters()['registrations']} of them"
    if name == "exposure":
        return f"{text}: {out.exposed_bytes} bytes"
    if name == "segment-cut":
        return f"{text}: {len(out.segments)} pieces"
    if name in ("flush-now", "flush-strict"):
        return f"{text}: {out.invalidations} invalidation{'s' if out.invalidations != 1 else ''}"
    return text
