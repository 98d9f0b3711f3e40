"""Observers of a device's calls: failures on demand, and what a device could see that it should not."""

from __future__ import annotations

import errno as _errno
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dmapath.device import Device
from dmapath.errors import DmaError, DmaValueError, NotSupportedError

__all__ = ["Exposed", "Exposure", "Fault", "FaultInjector", "History", "StaleUse", "StaleUseError"]

#: The calls that can be made to fail.
OPS = ("map_phys", "unmap_phys", "iova_try_alloc", "iova_link", "iova_link_vec", "iova_link_gapped", "iova_sync",
       "iova_unlink", "iova_free", "map_sg", "unmap_sg", "sync_for_cpu", "sync_for_device", "access")  # fmt: skip


class FaultInjector:
    """Make the nth call of an op fail from now on, once: it is refused before the back end sees it.

    ``fail_nth("iova_link", 3)`` fails the third link; ``op`` None counts every op that makes something (map and alloc and
    link and sync). ``errno`` is positive, ENOMEM by default. A refused ``iova_try_alloc`` is a plain refusal, a refused
    "access" a fault.
    """

    MAKING = ("map_phys", "iova_try_alloc", "iova_link", "iova_link_vec", "iova_link_gapped", "iova_sync", "map_sg")

    def __init__(self, op: str | None = None, n: int = 0, *, errno: int = _errno.ENOMEM) -> None:
        self.seen: list[str] = []
        self.fail_nth(op, n, errno=errno)

    def fail_nth(self, op: str | None, n: int, *, errno: int = _errno.ENOMEM) -> int:
        """Order a failure (n 1: the next; 0: none). Returns what was left of the last order."""
        if op is not None and op not in OPS:
            raise DmaValueError(f"one of {', '.join(OPS)}", argument="op", value=op)
        left = getattr(self, "left", 0)
        self.ops, self.left, self.errno = (op,) if op else self.MAKING, n, errno
        return left

    def before(self, call: Any) -> int | None:
        """Count the call down."""
        if call.op in self.ops:
            self.seen.append(call.op)
            if self.left:
                self.left -= 1
                if not self.left:
                    return self.errno
        return None


@dataclass
class Fault:
    """An access of the device that was refused: at which DMA address, where in the code it was set going, and what became of
    the mappings around that address before (oldest first).
    """

    addr: int
    write: bool
    where: str
    history: list[str]

    def __str__(self) -> str:
        past = "\n".join(f"    {line}" for line in self.history) or "    nothing was ever mapped there"
        return f"{'write' if self.write else 'read'} of {self.addr:#x} refused, from {self.where}; of this address:\n{past}"


class History:
    """An observer that remembers the last calls, so that a fault can be told with what became of its mapping."""

    def __init__(self, calls: int = 4096) -> None:
        self._calls: deque[tuple[int, int, str]] = deque(maxlen=calls)
        self.faults: list[Fault] = []

    def after(self, call: Any) -> None:
        """Note the call, or the fault."""
        if call.op == "access":
            if call.rc < 0:
                at = int(call.addr) + int(call.done or 0)
                self.faults.append(Fault(at, bool(call.write), call.where, self.of(at)))
            return
        result = "" if call.rc is None or call.rc >= 0 else f" failed: {_errno.errorcode.get(-call.rc, call.rc)}"
        for first, size, phys in _spans(call):
            memory = f" of {phys:#x}" if phys is not None else ""
            way = f" {call.dir}" if call.dir else ""
            text = f"{call.op} [{first:#x}, {first + size:#x}){memory}{way}{result}, from {call.where}"
            self._calls.append((first, first + size, text))

    def of(self, addr: int) -> list[str]:
        """What was done to mappings of a DMA address, oldest first."""
        return [text for first, end, text in self._calls if first <= addr < end]


def _spans(call: Any) -> list[tuple[int, int, int | None]]:
    """(DMA address, bytes, physical address) of what a call is about."""
    if call.segments:
        return [(int(at), int(n), None) for at, n in call.segments]
    if call.state is None:
        return [] if call.addr is None or not call.size else [(int(call.addr), int(call.size), call.phys)]
    start, size = int(call.state[0]), int(call.state[1])
    if call.vecs:
        return [(start + int(call.offset or 0), size - int(call.offset or 0), int(call.vecs[0][0]))]
    return [(start + int(call.offset or 0), int(call.size or size), call.phys)]


class StaleUseError(DmaError):
    """A device used a translation after its mapping was gone."""

    default_errno = _errno.EFAULT


@dataclass
class StaleUse:
    """A device got through by an IOTLB entry that outlived its mapping."""

    iova: int
    write: bool
    made: str
    unmapped: str
    after_ns: int

    def __str__(self) -> str:
        verb = "wrote" if self.write else "read"
        return (f"the device {verb} {self.iova:#x} through a stale IOTLB entry, {self.after_ns} ns "
                f"after the unmap at {self.unmapped} (mapped at {self.made})")  # fmt: skip


@dataclass
class Exposed:
    """What one mapping let the device see beyond its bytes, and for how long after the unmap it still could."""

    made: str
    bytes: int
    neighbours: int
    pages: list[tuple[int, int]] = field(default_factory=list)
    unmapped: str = ""
    unmapped_at: int | None = None
    stale_ns: int | None = None


class Exposure:
    """An observer behind a simulated IOMMU: bytes of neighbouring data that each mapping exposes, the time between its unmap
    and the flush that makes the unmap true, and every access that used that time.

    ``mappings`` has one Exposed for each; ``stale_uses`` the accesses caught; ``summary`` adds up. It takes the domain's
    record of events for itself.
    """

    def __init__(self) -> None:
        self.mappings: list[Exposed] = []
        self.stale_uses: list[StaleUse] = []
        self._live: dict[int, Exposed] = {}
        self._stale: dict[int, Exposed] = {}

    def attached(self, device: Device) -> None:
        """Start to watch."""
        if device.backend.name != "iommu":
            raise NotSupportedError("a device behind a simulated IOMMU is wanted", argument="device", value=device)
        self._device, self._granule = device, device.merge_boundary + 1
        device.backend.record(True)

    def detached(self, device: Device) -> None:
        """Stop."""
        self._drain("")
        device.backend.record(False)

    def after(self, call: Any) -> None:
        """Note what the call mapped, unmapped or flushed, and check accesses."""
        if call.op == "access":
            self._drain("")
            self._check(call)
            return
        wanted = 0
        if call.rc >= 0:
            wanted = call.size or 0 if call.op == "map_phys" else sum(n for _, n in call.vecs or ())
        self._drain(call.where, wanted)

    def _drain(self, where: str, wanted: int = 0) -> None:
        pages: list[tuple[int, int]] = []
        seen = 0
        for kind, a, b, c, now in self._device.backend.take_events():
            if kind == "map":
                pages.append((a, c))
                pool = self._device.swiotlb
                seen += c if pool is None or b not in pool else 0
            elif kind == "bounce":
                wanted -= b
            elif kind == "unmap":
                self._unmapped(a, b, where, now)
            elif kind in ("flush", "flush_all"):
                self._flushed(a, b, now)
        if pages:
            exposed = Exposed(where, wanted, max(0, seen - wanted), pages)
            self.mappings.append(exposed)
            for first, n in pages:
                for page in range(first, first + n, self._granule):
                    self._live[page] = exposed
                    self._stale.pop(page, None)

    def _unmapped(self, first: int, n: int, where: str, now: int) -> None:
        for page in range(first, first + n, self._granule):
            exposed = self._live.pop(page, None)
            if exposed is not None:
                exposed.unmapped, exposed.unmapped_at = where, now
                self._stale[page] = exposed

    def _flushed(self, first: int, last: int, now: int) -> None:
        for page in [p for p in self._stale if first <= p <= last]:
            exposed = self._stale.pop(page)
            exposed.stale_ns = max(exposed.stale_ns or 0, now - (exposed.unmapped_at or 0))

    def _check(self, call: Any) -> None:
        if not call.done:
            return
        first = call.addr & -self._granule
        for page in range(first, call.addr + call.done, self._granule):
            exposed = self._stale.get(page)
            if exposed is not None and page not in self._live:
                now = self._device.iommu.now
                self.stale_uses.append(StaleUse(max(page, call.addr), call.write, exposed.made, exposed.unmapped,
                                                now - (exposed.unmapped_at or 0)))  # fmt: skip

    def check(self) -> None:
        """Raise StaleUseError where a device used a stale translation."""
        if self.stale_uses:
            raise StaleUseError("\n".join(str(u) for u in self.stale_uses))

    def summary(self) -> dict[str, int]:
        """Sums over all mappings: mapped, exposed and stale so far, and the longest time until a flush, in ns."""
        self._drain("")
        return {
            "mappings": len(self.mappings),
            "bytes": sum(m.bytes for m in self.mappings),
            "neighbour_bytes": sum(m.neighbours for m in self.mappings),
            "stale_now": len(self._stale) * self._granule,
            "longest_stale_ns": max((m.stale_ns or 0 for m in self.mappings), default=0),
            "stale_uses": len(self.stale_uses),
        }
