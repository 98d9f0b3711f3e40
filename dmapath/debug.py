"""dma-debug: mistakes in how a driver uses the DMA API, each with the mapping it concerns and the two places in the code.

The checks are those of kernel/dma/debug.c, and more for the two-step API, which Linux does not check at all. Attach a
DmaDebug before the first mapping; without one a device pays nothing.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dmapath.device import ATTRS, Device
from dmapath.errors import DmaError

__all__ = ["CHECKS", "DmaDebug", "DmaDebugError", "Report"]

_ERROR = 2**64 - 1
LINE = 64
OVERLAPS = 7
#: Attributes that must be the same at unmap.
_SAME = ATTRS["mmio"] | ATTRS["require_coherent"] | ATTRS["privileged"]
_SKIP, _MMIO, _COHERENT = ATTRS["skip_cpu_sync"], ATTRS["mmio"], ATTRS["require_coherent"]

#: Check -> (row of the kernel's list, or None for ours; what it says).
CHECKS: dict[str, tuple[int | None, str]] = {
    "not-memory": (1, "maps an address that is no memory of the machine"),
    "vmalloc": (2, "maps a vmalloc buffer, which is not contiguous in memory"),
    "stack": (3, "maps memory of a stack"),
    "text": (4, "maps memory that holds the kernel's code or constants"),
    "mmio-on-ram": (5, "maps RAM as a resource (MMIO)"),
    "sg-too-long": (6, "maps a list entry longer than the device's maximum segment"),
    "sg-boundary": (7, "was given a segment across the device's segment boundary"),
    "line-shared": (8, "maps a cache line that another mapping may write to"),
    "line-overlaps": (9, "maps one cache line more than 7 times"),
    "out-of-entries": (10, "has more mappings than the debug can track; it stops"),
    "unmap-error": (11, "unmaps or uses the address of a mapping that failed"),
    "unmap-unknown": (12, "unmaps what is not mapped: never, not by this device, or already unmapped"),
    "unmap-size": (13, "unmaps another size than it mapped"),
    "unmap-function": (14, "unmaps with another function than it mapped with"),
    "unmap-cpu-address": (15, "frees coherent memory by another CPU address"),
    "unmap-count": (16, "unmaps another number of list entries than it mapped"),
    "unmap-direction": (17, "unmaps with another direction than it mapped with"),
    "unchecked": (18, "never looked whether its mapping had failed"),
    "unmap-attrs": (19, "unmaps with other attributes than it mapped with"),
    "sync-unknown": (20, "syncs a range that lies in no mapping"),
    "sync-size": (21, "syncs more than it mapped"),
    "sync-direction": (22, "syncs with another direction than it mapped with"),
    "sync-for-cpu": (23, "syncs for the CPU what only the device reads"),
    "sync-for-device": (24, "syncs for the device what only the device writes"),
    "sync-count": (25, "syncs another number of list entries than it mapped"),
    "leak": (26, "left mappings behind"),
    "link-outside": (None, "links outside the allocation"),
    "link-overlap": (None, "links what is linked already"),
    "link-gap": (None, "syncs or destroys a range with a hole"),
    "unsynced": (None, "lets the device use a link before it was synced"),
    "unlink-unknown": (None, "unlinks what is not linked"),
    "unlink-direction": (None, "unlinks with another direction than it linked with"),
    "unlink-attrs": (None, "unlinks with other attributes than it linked with"),
    "free-linked": (None, "frees IOVA that is still linked"),
    "free-unknown": (None, "frees IOVA that it does not have: destroyed twice, or never allocated"),
    "use-after-unmap": (None, "lets the device use what was unmapped"),
    "use-unmapped": (None, "lets the device use what was never mapped"),
    "use-outside": (None, "lets the device reach beyond a mapping"),
    "use-direction": (None, "lets the device use a mapping against its direction"),
}


class DmaDebugError(DmaError):
    """A driver misused the DMA API; the text is that of every report."""


@dataclass
class Report:
    """One mistake. ``check`` is a key of CHECKS; ``where`` the call at fault, ``made`` where the mapping was made."""

    check: str
    message: str
    where: str
    made: str | None = None

    @property
    def row(self) -> int | None:
        """Its number in the kernel's list of checks, None for those that the kernel does not have."""
        return CHECKS[self.check][0]

    def __str__(self) -> str:
        made = f" (mapped at {self.made})" if self.made else ""
        return f"{self.where}: {self.message}{made} [{self.check}]"


@dataclass
class Link:
    """Part of a two-step state that is linked."""

    start: int
    end: int
    dir: str
    attrs: int
    made: str
    synced: bool = False


@dataclass
class Entry:
    """A live mapping: "phys", "sg", "coherent" or "iova"."""

    type: str
    addr: int
    size: int
    dir: str
    attrs: int
    made: str
    phys: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    links: list[Link] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        what = {"phys": "map_phys", "sg": "map_sg", "coherent": "alloc_coherent", "iova": "iova_try_alloc"}[self.type]
        return f"{what} {self.addr:#x}+{self.size:#x} {self.dir}"

    def spans(self) -> list[tuple[int, int]]:
        """(first, end) of each DMA range."""
        return [(a, a + n) for a, n in self.segments] if self.type == "sg" else [(self.addr, self.addr + self.size)]


class DmaDebug:
    """An observer that checks how a device is used. ``reports`` holds what it found; ``check`` raises it.

    In a ``with`` block it attaches itself and, at the end, detaches, looks for leaks and raises. ``entries``: mappings it
    tracks at most, as the kernel's pool of entries. ``lines``: also check for cache lines that two mappings share (by
    default where the device is not coherent; on machines whose caches see DMA the kernel does not look).
    """

    need_unmap = True

    def __init__(self, device: Device | None = None, *, entries: int = 65536, lines: bool | None = None) -> None:
        self._device, self._entries, self._want_lines = device, entries, lines
        self.reports: list[Report] = []
        self.disabled = False
        self._at: dict[int, list[Entry]] = {}
        self._starts: list[int] = []
        self._spans: dict[int, list[Entry]] = {}
        self._gone: deque[tuple[int, int, Entry, str]] = deque(maxlen=1024)
        self._count = 0
        self._lines: dict[int, int] = {}
        self._failed: deque[str] = deque(maxlen=16)

    # ---- observer

    def attached(self, device: Device) -> None:
        """Start to watch a device."""
        self._device = device
        if self._want_lines is None:
            self._want_lines = not device.coherent

    def detached(self, device: Device) -> None:
        """The driver is unbound: nothing may be mapped any more."""
        left = [e for bucket in self._at.values() for e in bucket]
        if left and not self.disabled:
            example = left[0]
            self._tell("leak", f"{len(left)} mappings are left, one of them {example}", "at detach", example)

    def before(self, call: Any) -> None:
        """Check what must be checked while the mapping still stands."""
        check = None if self.disabled else getattr(self, f"_before_{call.op}", None)
        if check is not None:
            check(call)

    def after(self, call: Any) -> None:
        """Note what became of the call."""
        note = None if self.disabled else getattr(self, f"_after_{call.op}", None)
        if note is not None:
            note(call)

    def __enter__(self) -> DmaDebug:
        assert self._device is not None, "DmaDebug(device) is wanted in a with block"
        return self._device.attach(self)

    def __exit__(self, kind: object, *rest: object) -> None:
        assert self._device is not None
        self._device.detach(self)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise DmaDebugError with every report so far, if there are any."""
        if self.reports:
            raise DmaDebugError("\n".join(str(r) for r in self.reports))

    @property
    def live(self) -> int:
        """Mappings it knows of now."""
        return self._count

    # ---- book-keeping

    def _tell(self, check: str, detail: str, where: str, entry: Entry | None = None, made: str | None = None) -> None:
        message = f"the driver {CHECKS[check][1]}: {detail}"
        self.reports.append(Report(check, message, where, made or (entry.made if entry else None)))

    def _add(self, entry: Entry) -> None:
        if self._count == self._entries:
            self.disabled = True
            self._tell("out-of-entries", f"{self._entries} entries", entry.made)
            return
        self._count += 1
        self._at.setdefault(entry.addr, []).append(entry)
        for start, _ in entry.spans():
            if start not in self._spans:
                bisect.insort(self._starts, start)
            self._spans.setdefault(start, []).append(entry)

    def _drop(self, entry: Entry, where: str) -> None:
        self._count -= 1
        self._at[entry.addr].remove(entry)
        if not self._at[entry.addr]:
            del self._at[entry.addr]
        for start, end in entry.spans():
            self._spans[start].remove(entry)
            if not self._spans[start]:
                del self._spans[start]
                self._starts.pop(bisect.bisect_left(self._starts, start))
            self._gone.append((start, end, entry, where))
        for line in entry.lines:
            self._lines[line] -= 1

    def _holding(self, addr: int) -> Entry | None:
        """The mapping that a DMA address lies in."""
        i = bisect.bisect_right(self._starts, addr)
        for start in reversed(self._starts[max(0, i - 64) : i]):
            for entry in self._spans[start]:
                if any(a <= addr < b for a, b in entry.spans()):
                    return entry
        return None

    def _find(self, addr: int, kind: str, size: int, direction: str) -> Entry | None:
        """The mapping that an unmap means: the best fit among those at its address."""
        bucket = self._at.get(addr, [])
        return max(bucket, key=lambda e: (e.type == kind, e.size == size, e.dir == direction), default=None)

    # ---- map

    def _memory_checks(self, call: Any, phys: int, size: int, attrs: int) -> None:
        memory = self._device.memory if self._device else None
        if memory is None:
            return
        kind = memory.kind_of(phys)
        if attrs & _MMIO:
            if kind == "ram":
                self._tell("mmio-on-ram", f"phys {phys:#x}+{size:#x}", call.where)
        elif kind is None:
            self._tell("not-memory", f"phys {phys:#x}+{size:#x}", call.where)
        elif kind in ("vmalloc", "stack", "text"):
            self._tell(kind, f"phys {phys:#x}+{size:#x}", call.where)

    def _line_checks(self, call: Any, entry: Entry, phys: int) -> None:
        if not self._want_lines or entry.dir == "to_device" or entry.attrs & (_SKIP | _MMIO):
            return
        line = phys // LINE
        held = self._lines.get(line, 0)
        if held > OVERLAPS:
            self._tell("line-overlaps", f"line {line * LINE:#x}, {held + 1} mappings", call.where)
        elif held and not entry.attrs & _COHERENT:
            self._tell("line-shared", f"line {line * LINE:#x}", call.where)
        self._lines[line] = held + 1
        entry.lines.append(line)

    def _after_map_phys(self, call: Any) -> None:
        if call.rc:
            self._failed.append(call.where)
            return
        self._memory_checks(call, call.phys, call.size, call.attrs)
        entry = Entry("phys", call.addr, call.size, call.dir, call.attrs, call.where, call.phys)
        self._line_checks(call, entry, call.phys)
        self._add(entry)

    def _after_map_sg(self, call: Any) -> None:
        if call.rc < 0:
            return
        assert self._device is not None
        most, mask = self._device.sg_max_segment_size, self._device.seg_boundary_mask
        entry = Entry("sg", call.segments[0][0], sum(n for _, n in call.segments), call.dir, call.attrs, call.where,
                      segments=tuple(call.segments))  # fmt: skip
        for phys, n in call.vecs:
            self._memory_checks(call, phys, n, call.attrs)
            self._line_checks(call, entry, phys)
            if n > most:
                self._tell("sg-too-long", f"{n:#x} bytes at phys {phys:#x}, at most {most:#x}", call.where)
        for addr, n in call.segments:
            if (addr ^ (addr + n - 1)) & ~mask:
                self._tell("sg-boundary", f"{addr:#x}+{n:#x}, mask {mask:#x}", call.where)
        self._add(entry)

    # ---- unmap

    def _before_unmap_phys(self, call: Any) -> None:
        if call.addr == _ERROR:
            made = self._failed[-1] if self._failed else None
            self._tell("unmap-error", "address all ones", call.where, made=made)
            if made:
                self._tell("unchecked", "its failure went unnoticed", made)
            return
        entry = self._find(call.addr, "phys", call.size, call.dir)
        if entry is None:
            self._unknown(call, call.addr)
            return
        self._same(call, entry, "phys", call.size)
        self._drop(entry, call.where)

    def _before_unmap_sg(self, call: Any) -> None:
        total = sum(n for _, n in call.segments)
        entry = self._find(call.segments[0][0], "sg", total, call.dir) if call.segments else None
        if entry is None:
            self._unknown(call, call.segments[0][0] if call.segments else 0)
            return
        if entry.type == "sg" and len(call.segments) != len(entry.segments):
            self._tell("unmap-count", f"{len(call.segments)} instead of {len(entry.segments)} of {entry}", call.where, entry)
            total = entry.size
        self._same(call, entry, "sg", total)
        self._drop(entry, call.where)

    def _unknown(self, call: Any, addr: int) -> None:
        before = next((g for g in reversed(self._gone) if g[0] == addr), None)
        history = f"; it was unmapped at {before[3]}" if before else ""
        self._tell("unmap-unknown", f"{addr:#x}{history}", call.where, before[2] if before else None)

    def _same(self, call: Any, entry: Entry, kind: str, size: int) -> None:
        if entry.type != kind:
            self._tell("unmap-function", f"{call.op} of {entry}", call.where, entry)
        elif size != entry.size:
            self._tell("unmap-size", f"{size:#x} bytes of {entry}", call.where, entry)
        if call.dir != entry.dir:
            self._tell("unmap-direction", f"{call.dir} for {entry}", call.where, entry)
        if (call.attrs ^ entry.attrs) & _SAME:
            self._tell("unmap-attrs", f"{_attrs(call.attrs)} for {entry} with {_attrs(entry.attrs)}", call.where, entry)

    # ---- coherent memory: Device tells, since no table has it

    def _after_alloc_coherent(self, call: Any) -> None:
        self._add(Entry("coherent", call.addr, call.size, "bidirectional", 0, call.where, call.phys))

    def _before_free_coherent(self, call: Any) -> None:
        entry = self._find(call.addr, "coherent", call.size, "bidirectional")
        if entry is None:
            self._unknown(call, call.addr)
            return
        if entry.phys != call.phys:
            self._tell("unmap-cpu-address", f"phys {call.phys:#x} for {entry}", call.where, entry)
        if entry.size != call.size:
            self._tell("unmap-size", f"{call.size:#x} bytes of {entry}", call.where, entry)
        self._drop(entry, call.where)

    # ---- syncs

    def _sync(self, call: Any, addr: int, size: int, op: str) -> Entry | None:
        entry = self._holding(addr)
        if entry is None:
            self._tell("sync-unknown", f"{addr:#x}+{size:#x}", call.where)
            return None
        end = next(b for a, b in entry.spans() if a <= addr < b)
        if addr + size > end:
            self._tell("sync-size", f"{addr:#x}+{size:#x} of {entry}", call.where, entry)
        wanted = entry.dir
        if entry.type == "iova":
            link = next((x for x in entry.links if x.start <= addr - entry.addr < x.end), None)
            wanted = link.dir if link else "bidirectional"
        if wanted == "bidirectional":
            return entry
        if call.dir != wanted:
            self._tell("sync-direction", f"{call.dir} for {entry}", call.where, entry)
        if op == "sync_for_cpu" and wanted == "to_device" and call.dir != "to_device":
            self._tell("sync-for-cpu", str(entry), call.where, entry)
        if op == "sync_for_device" and wanted == "from_device" and call.dir != "from_device":
            self._tell("sync-for-device", str(entry), call.where, entry)
        return entry

    def _before_sync_for_cpu(self, call: Any) -> None:
        self._sync(call, call.addr, call.size, call.op)

    _before_sync_for_device = _before_sync_for_cpu

    def _before_sync_sg_for_cpu(self, call: Any) -> None:
        entries = [self._sync(call, a, n, call.op.replace("_sg", "")) for a, n in call.segments]
        first = entries[0] if entries else None
        if first is not None and first.type == "sg" and len(call.segments) != len(first.segments):
            self._tell("sync-count", f"{len(call.segments)} instead of {len(first.segments)} of {first}", call.where, first)

    _before_sync_sg_for_device = _before_sync_sg_for_cpu

    # ---- two steps

    def _state(self, call: Any) -> Entry | None:
        return next((e for e in self._at.get(call.state[0], []) if e.type == "iova"), None)

    def _after_iova_try_alloc(self, call: Any) -> None:
        if call.rc:
            self._add(Entry("iova", call.state[0], call.state[1], "none", 0, call.where))

    def _link_spans(self, call: Any) -> list[tuple[int, int, int]]:
        """(start, end, phys) of each link in bytes of its state."""
        assert self._device is not None
        gm = self._device.merge_boundary
        out, at = [], call.offset
        for phys, n in call.vecs:
            if call.op == "iova_link_gapped":
                off = phys & gm
                out.append((at + off, at + off + n, phys))
                at += (off + n + gm) & ~gm
            else:
                out.append((at, at + n, phys))
                at += n
        return out

    def _before_iova_link(self, call: Any) -> None:
        entry = self._state(call)
        if entry is None:
            self._tell("link-outside", f"state {call.state[0]:#x} is not allocated", call.where)
            return
        for start, end, _ in self._link_spans(call):
            if end > entry.size:
                self._tell("link-outside", f"[{start:#x}, {end:#x}) of {entry}", call.where, entry)
            for link in entry.links:
                if start < link.end and link.start < end:
                    self._tell("link-overlap", f"[{start:#x}, {end:#x}) of {entry}", call.where, entry, link.made)
                    break

    def _after_iova_link(self, call: Any) -> None:
        entry = self._state(call)
        if entry is None or call.rc:
            return
        for start, end, phys in self._link_spans(call):
            self._memory_checks(call, phys, end - start, call.attrs)
            entry.links.append(Link(start, end, call.dir, call.attrs, call.where))

    _before_iova_link_vec = _before_iova_link_gapped = _before_iova_link
    _after_iova_link_vec = _after_iova_link_gapped = _after_iova_link

    def _covered(self, entry: Entry, start: int, end: int) -> list[Link]:
        return sorted((x for x in entry.links if x.start < end and start < x.end), key=lambda x: x.start)

    def _hole(self, entry: Entry, start: int, end: int) -> int | None:
        """The first byte of [start, end) that no link covers; what lies inside granules between gapped links counts as
        covered, since whole granules are mapped.
        """
        assert self._device is not None
        gm, at = self._device.merge_boundary, start
        base = entry.addr & gm
        for link in self._covered(entry, start, end):
            if ((link.start + base) & ~gm) > at + base:
                return at
            at = max(at, ((link.end + base + gm) & ~gm) - base)
        return at if at < end else None

    def _before_iova_sync(self, call: Any) -> None:
        entry = self._state(call)
        if entry is None:
            self._tell("free-unknown", f"sync of state {call.state[0]:#x}", call.where)
            return
        hole = self._hole(entry, call.offset, call.offset + call.size)
        if hole is not None:
            self._tell("link-gap", f"sync of {call.offset:#x}+{call.size:#x}, nothing at {hole:#x} of {entry}", call.where,
                       entry)  # fmt: skip

    def _after_iova_sync(self, call: Any) -> None:
        entry = self._state(call)
        if entry is not None and call.rc == 0:
            for link in self._covered(entry, call.offset, call.offset + call.size):
                link.synced = True

    def _before_iova_unlink(self, call: Any) -> None:
        entry = self._state(call)
        if entry is None:
            self._tell("free-unknown", f"unlink in state {call.state[0]:#x}", call.where)
            return
        start, end = call.offset, call.offset + call.size
        links = self._covered(entry, start, end)
        if not links or self._hole(entry, start, end) is not None:
            self._tell("unlink-unknown", f"[{start:#x}, {end:#x}) of {entry}", call.where, entry)
        for link in links:
            # the wrapper undoes a request whose links differ in MMIO alone with one call
            if call.dir != link.dir and call.rc is None:
                self._tell("unlink-direction", f"{call.dir} for {link.dir}, {entry}", call.where, entry, link.made)
                break
            if (call.attrs ^ link.attrs) & _SAME & ~(_MMIO if len({x.attrs for x in links}) > 1 else 0):
                self._tell("unlink-attrs", f"{_attrs(call.attrs)} for {_attrs(link.attrs)}, {entry}", call.where, entry,
                           link.made)  # fmt: skip
                break
        for link in links:
            self._gone.append((entry.addr + link.start, entry.addr + link.end, entry, call.where))
        entry.links = [x for x in entry.links if x not in links]

    def _before_iova_free(self, call: Any) -> None:
        entry = self._state(call)
        if entry is None:
            before = next((g for g in reversed(self._gone) if g[0] == call.state[0] and g[2].type == "iova"), None)
            self._tell("free-unknown", f"state {call.state[0]:#x}", call.where, before[2] if before else None)
            return
        if entry.links:
            total = sum(x.end - x.start for x in entry.links)
            self._tell("free-linked", f"{total:#x} bytes of {entry}", call.where, entry, entry.links[0].made)
        self._drop(entry, call.where)

    # ---- the device's side

    def _before_access(self, call: Any) -> None:
        if call.addr == _ERROR and self._holding(call.addr) is None:
            self._tell("unmap-error", "the device was given the address of a mapping that failed", call.where,
                       made=self._failed[-1] if self._failed else None)  # fmt: skip
            return
        at, end = call.addr, call.addr + call.size
        while at < end:
            stop = self._access(call, at, end)
            if stop is None:
                return
            at = stop

    def _peer(self, addr: int) -> int | None:
        """End of the peer's memory that a bus address lies in."""
        memory = self._device.memory if self._device else None
        for bar in memory.peers if memory else ():
            if 0 <= addr - bar.bus(0) < len(bar):
                return int(bar.bus(0)) + len(bar)
        return None

    def _access(self, call: Any, at: int, end: int) -> int | None:
        """Check an access from `at` on; where to go on, or None when told."""
        entry = self._holding(at)
        if entry is None:
            peer = self._peer(at)
            if peer is not None:
                return peer
            gone = next((g for g in reversed(self._gone) if g[0] <= at < g[1]), None)
            if gone is not None:
                self._tell("use-after-unmap", f"{at:#x} of {gone[2]}, unmapped at {gone[3]}", call.where, gone[2])
            else:
                self._tell("use-unmapped", f"{at:#x}", call.where)
            return None
        stop = next(b for a, b in entry.spans() if a <= at < b)
        direction = entry.dir
        if entry.type == "iova":
            link = next((x for x in entry.links if x.start <= at - entry.addr < x.end), None)
            if link is None:
                self._tell("use-after-unmap" if any(g[0] <= at < g[1] for g in self._gone) else "use-outside",
                           f"{at:#x} of {entry} is not linked", call.where, entry)  # fmt: skip
                return None
            if not link.synced:
                self._tell("unsynced", f"{at:#x} of {entry}", call.where, entry, link.made)
                return None
            stop, direction = entry.addr + link.end, link.dir
        if direction != "bidirectional" and call.write != (direction == "from_device"):
            self._tell("use-direction", f"{'write' if call.write else 'read'} of {entry}", call.where, entry)
            return None
        if stop < end and entry.type != "iova" and self._holding(stop) is None and self._peer(stop) is None:
            self._tell("use-outside", f"{at:#x}+{end - at:#x} of {entry}", call.where, entry)
            return None
        return stop


def _attrs(bits: int) -> str:
    return "|".join(name for name, bit in ATTRS.items() if bits & bit) or "no attributes"
