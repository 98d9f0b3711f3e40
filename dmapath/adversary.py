"""A back end that does everything the DMA API allows and no driver expects: for tests of drivers.

* Every byte bounces: the device works on a copy, and the CPU sees what it wrote only after a sync or an unmap.
* DMA addresses are random, unlike the physical ones, and do not come again for thousands of mappings; only the bits that the
  device asked for are kept, and its segment boundary.
* An IOVA range is sometimes refused, so drivers see both layouts; segments are cut at odd places.
* A link can be used only after its sync. What was unmapped faults for good, and its copy is poisoned.
"""

from __future__ import annotations

import bisect
import errno as _errno
import random
from collections import deque
from typing import Any

from dmapath.device import ATTRS, Device
from dmapath.errors import DmaFault, DmaValueError, StateError, error_for

__all__ = ["Adversary"]

GRANULE = 4096
POISON = 0x6B
QUARANTINE = 4096  # released ranges whose addresses are not given again
_SKIP = ATTRS["skip_cpu_sync"]


class Window:
    """A copy of memory that the device may use at an address."""

    def __init__(self, addr: int, phys: int, data: bytes, direction: str, visible: bool) -> None:
        self.addr, self.phys, self.dir, self.visible = addr, phys, direction, visible
        self.data = bytearray(data)
        self.written = bytearray(len(data))  # 1: the device wrote that byte, and the CPU has not been given it yet

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.addr + len(self.data)


class Adversary:
    """``Device(backend=Adversary(), memory=...)``.

    ``seed`` fixes every choice; ``refuse`` is the share of IOVA ranges that it refuses; ``cut`` the bytes of the longest
    segment (rounded to what the device's alignment and virt boundary allow), None for a choice of its own, 0 for no cut.
    By policy ``linux`` use 0: Linux cuts before it links, and so cannot link what is cut inside a granule.
    """

    name = "adversary"
    merge_boundary = GRANULE - 1
    need_unmap = True

    def __init__(self, seed: int = 0, *, refuse: float = 0.25, cut: int | None = None) -> None:
        self._random = random.Random(seed)
        self._refuse, self._cut = refuse, cut
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self._ranges: dict[int, int] = {}
        self._coherent: dict[int, tuple[int, int]] = {}  # address -> (phys, size): memory that both sides share
        self._used: set[int] = set()  # pages of what is mapped and of what was, lately
        self._gone: set[int] = set()  # of what was
        self._spans: dict[int, range] = {}  # address that was given -> its pages
        self._released: deque[range] = deque()
        self._counts = dict.fromkeys(("maps", "unmaps", "links", "syncs", "unlinks", "iova_allocs", "iova_frees", "bounces",
                                      "bounced_bytes", "faults"), 0)  # fmt: skip

    def attach(self, device: Device) -> None:
        """Called by the Device."""
        if device.memory is None:
            raise StateError("a device with a memory is wanted", argument="device", value=device)
        self._memory = device.memory
        unit = max(device.dma_alignment, device.virt_boundary) + 1
        cut = self._random.choice((0x600, 0xA00, 0x1E00, 0x3200)) if self._cut is None else self._cut
        if cut // unit:
            device.narrow(cut // unit * unit)
        self._keep = device.min_align_mask | device.dma_alignment | device.virt_boundary
        self._top = min(device.dma_mask, device.bus_dma_limit or device.dma_mask, 2**62 - 1)
        self._boundary = device.seg_boundary_mask

    # ---- addresses

    def _address(self, size: int, low: int, mask: int) -> int:
        """A fresh place for ``size`` bytes whose bits under ``mask`` are those of ``low``."""
        pages = (size + 2 * GRANULE) // GRANULE
        whole = size - 1 <= self._boundary  # what is longer than a boundary apart crosses one anyhow
        for attempt in range(1000):
            page = self._random.randrange(1, max(2, self._top // GRANULE - pages))
            free = self._random.randrange(GRANULE) & ~7 & ~mask if attempt % 8 != 7 else 0
            addr = page * GRANULE | (low & mask) | free
            if whole and addr | self._boundary != addr + size - 1 | self._boundary:
                continue
            if not any(page + i in self._used for i in range(-1, pages + 1)):
                self._spans[addr] = range(page, page + pages)
                self._used.update(self._spans[addr])
                return addr
        raise error_for(_errno.ENOMEM, "no address is left under the mask", "size", size)

    def _add(self, window: Window) -> None:
        i = bisect.bisect(self._starts, window.addr)
        self._starts.insert(i, window.addr)
        self._windows.insert(i, window)
        self._counts["bounces"] += 1
        self._counts["bounced_bytes"] += len(window.data)

    def _remove(self, window: Window, *, back: bool) -> None:
        i = self._windows.index(window)
        del self._windows[i], self._starts[i]
        if back and window.dir != "to_device":
            self._copy_back(window, 0, len(window.data))
        self._gone.update(range(window.addr // GRANULE, (window.end - 1) // GRANULE + 1))
        window.data[:] = bytes([POISON]) * len(window.data)

    def _free(self, addr: int) -> None:
        """An address goes back; after many others its pages may be given again."""
        self._released.append(self._spans.pop(addr))
        if len(self._released) > QUARANTINE:
            oldest = self._released.popleft()
            self._used.difference_update(oldest)
            self._gone.difference_update(oldest)

    def _copy_back(self, window: Window, first: int, end: int) -> None:
        """Give the CPU what the device wrote, and nothing else."""
        at = window.written.find(1, first, end)
        while at >= 0:
            stop = window.written.find(0, at, end)
            stop = end if stop < 0 else stop
            self._memory.write(window.phys + at, bytes(window.data[at:stop]))
            at = window.written.find(1, stop, end)
        window.written[first:end] = bytes(end - first)

    def _at(self, addr: int) -> Window | None:
        i = bisect.bisect_right(self._starts, addr) - 1
        return self._windows[i] if i >= 0 and addr < self._windows[i].end else None

    def _window(self, phys: int, data: bytes, addr: int, direction: str, visible: bool) -> Window:
        if direction == "none":
            raise DmaValueError("a direction", argument="dir", value=direction)
        window = Window(addr, phys, data, direction, visible)
        self._add(window)
        return window

    # ---- classic

    def map_phys(self, phys: int, size: int, dir: str, attrs: int) -> int:
        """dma_map_phys."""
        if attrs & ATTRS["require_coherent"]:
            raise error_for(_errno.EOPNOTSUPP, "everything bounces here, so nothing is coherent", "attrs", attrs)
        data = self._memory.read(phys, size)  # what is no memory is refused before it is given an address
        window = self._window(phys, data, self._address(size, phys, self._keep), dir, True)
        self._counts["maps"] += 1
        return window.addr

    def map_coherent(self, phys: int, size: int) -> int:
        """Memory of dma_alloc_coherent: the one thing that is not copied; page-aligned, as Linux promises."""
        addr = self._address(size, 0, 2**12 - 1)
        self._coherent[addr] = (phys, size)
        return addr

    def unmap_phys(self, addr: int, size: int, dir: str, attrs: int) -> None:
        """dma_unmap_phys, or the end of coherent memory."""
        if self._coherent.get(addr, (0, 0))[1] == size:
            del self._coherent[addr]
            self._gone.update(self._spans[addr])
            self._free(addr)
            return
        window = self._at(addr)
        if window is None or window.addr != addr or len(window.data) != size:
            raise error_for(_errno.ENOENT, "that was not mapped, or with another size", "addr", addr)
        self._remove(window, back=not attrs & _SKIP)
        self._free(addr)
        self._counts["unmaps"] += 1

    # ---- two steps

    def iova_try_alloc(self, phys: int, size: int) -> int | None:
        """dma_iova_try_alloc."""
        if not size or size > self._memory.frames or self._random.random() < self._refuse:
            return None
        addr = self._address(size + GRANULE, phys, GRANULE - 1)
        self._ranges[addr] = size
        self._counts["iova_allocs"] += 1
        return addr

    def iova_link(self, state: tuple[int, int], phys: int, offset: int, size: int, dir: str, attrs: int) -> None:
        """dma_iova_link."""
        if attrs & ATTRS["require_coherent"]:
            raise error_for(_errno.EPERM, "everything bounces here", "attrs", attrs)
        addr = state[0] + offset
        if phys % GRANULE and offset:
            raise error_for(_errno.EIO, "only the first range may begin inside a granule", "phys", phys)
        if (addr - phys) % GRANULE:
            raise error_for(_errno.ENXIO, "address and memory do not fall on granules together", "phys", phys)
        if self._ranges.get(state[0], -1) < offset + size:
            raise error_for(_errno.ERANGE, "outside the allocation", "size", size)
        if any(self._at(a) is not None for a in (addr, addr + size - 1)):
            raise error_for(_errno.EADDRINUSE, "linked already", "offset", offset)
        self._window(phys, self._memory.read(phys, size), addr, dir, False)
        self._counts["links"] += 1

    def iova_sync(self, state: tuple[int, int], offset: int, size: int) -> None:
        """dma_iova_sync: links can be used from now on."""
        for window in self._windows:
            if state[0] + offset < window.end and window.addr < state[0] + offset + size:
                window.visible = True
        self._counts["syncs"] += 1

    def iova_unlink(self, state: tuple[int, int], offset: int, size: int, dir: str, attrs: int) -> None:
        """dma_iova_unlink."""
        first, end = state[0] + offset, state[0] + offset + size
        gone = [w for w in self._windows if first < w.end and w.addr < end]
        for window in gone:
            self._remove(window, back=not attrs & _SKIP)
        self._counts["unlinks"] += 1
        if not gone:
            raise error_for(_errno.ENOENT, "nothing is linked there", "offset", offset)

    def iova_free(self, state: tuple[int, int]) -> None:
        """dma_iova_free."""
        if self._ranges.pop(state[0], None) is None:
            raise error_for(_errno.ENOENT, "that was not allocated", "state", state)
        self._free(state[0])
        self._counts["iova_frees"] += 1

    # ---- syncs, and the device's side

    def _parts(self, addr: int, size: int) -> Any:
        """(window, first, end) of each part of a range; a fault where there is none."""
        at = addr
        while at < addr + size:
            window = self._at(at)
            if window is None:
                word = "was unmapped" if at // GRANULE in self._gone else "was never mapped"
                self._counts["faults"] += 1
                raise DmaFault(f"{at:#x} {word}", iova=at, reason="not present", done=at - addr)
            end = min(window.end, addr + size)
            yield window, at - window.addr, end - window.addr
            at = end

    def sync_for_cpu(self, addr: int, size: int, dir: str) -> None:
        """dma_sync_single_for_cpu."""
        for window, first, end in self._parts(addr, size):
            if window.dir != "to_device":
                self._copy_back(window, first, end)

    def sync_for_device(self, addr: int, size: int, dir: str) -> None:
        """dma_sync_single_for_device."""
        for window, first, end in self._parts(addr, size):
            if window.dir != "from_device":  # what only the device writes stays (swiotlb_sync_single_for_device)
                window.data[first:end] = self._memory.read(window.phys + first, end - first)
                window.written[first:end] = bytes(end - first)

    def _usable(self, window: Window, write: bool, at: int, done: int) -> None:
        reason = ""
        if not window.visible:
            reason = "linked but not synced"
        elif window.dir == ("to_device" if write else "from_device"):
            reason = "no write permission" if write else "no read permission"
        if reason:
            self._counts["faults"] += 1
            raise DmaFault(f"{at:#x}: {reason}", iova=at, reason=reason, done=done, write=write)

    def _shared(self, addr: int, n: int) -> int | None:
        """Physical address of coherent memory that holds the whole range."""
        for first, (phys, size) in self._coherent.items():
            if first <= addr and addr + n <= first + size:
                return phys + addr - first
        return None

    def read(self, addr: int, n: int) -> bytes:
        """A device reads."""
        shared = self._shared(addr, n)
        if shared is not None:
            return bytes(self._memory.read(shared, n))
        out = bytearray()
        for window, first, end in self._parts(addr, n):
            self._usable(window, False, addr + len(out), len(out))
            out += window.data[first:end]
        return bytes(out)

    def write(self, addr: int, data: bytes) -> None:
        """A device writes."""
        shared = self._shared(addr, len(data))
        if shared is not None:
            self._memory.write(shared, data)
            return
        done = 0
        for window, first, end in self._parts(addr, len(data)):
            self._usable(window, True, addr + done, done)
            window.data[first:end] = data[done : done + end - first]
            window.written[first:end] = b"\1" * (end - first)
            done += end - first

    def counters(self) -> dict[str, int]:
        """By the names in COUNTERS."""
        c = self._counts
        return {**c, "iova_live": len(self._ranges), "bounces_live": len(self._windows),
                "mapped_bytes": sum(len(w.data) for w in self._windows)}  # fmt: skip
