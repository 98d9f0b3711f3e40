"""Tracepoints: what happens on a device, as the lines that Linux 7.3's ftrace prints for the same events.

Names, fields and layout are the kernel's (dma, iommu, swiotlb and intel_iommu), so that what reads a kernel's trace reads
these; ``dmapath replay`` does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmapath.device import Device
from dmapath.errors import StateError
from dmapath.request import iterate

if TYPE_CHECKING:
    from dmapath.bio import Bio

__all__ = ["Tracer"]

_ATTRS = ((1 << 1, "WEAK_ORDERING"), (1 << 2, "WRITE_COMBINE"), (1 << 4, "NO_KERNEL_MAPPING"), (1 << 5, "SKIP_CPU_SYNC"),
          (1 << 6, "FORCE_CONTIGUOUS"), (1 << 7, "ALLOC_SINGLE_PAGES"), (1 << 8, "NO_WARN"), (1 << 9, "PRIVILEGED"),
          (1 << 10, "MMIO"), (1 << 11, "CACHELINES_OVERLAP"), (1 << 12, "REQUIRE_COHERENT"))  # fmt: skip
_SHOWN = 128
_ERROR = 2**64 - 1
_OPS = {"write": "nvme_cmd_write", "read": "nvme_cmd_read"}


def _flags(bits: int) -> str:
    names = []
    for bit, name in _ATTRS:
        if bits & bit:
            names.append(name)
            bits &= ~bit
    return "|".join([*names, *([hex(bits)] if bits else [])])


def _array(values: list[int]) -> str:
    return "{" + ",".join(hex(v) for v in values[:_SHOWN]) + "}"


class Tracer:
    """An observer that writes a trace: ``lines``, ``text`` and ``save``.

    ``name`` is the device's in the trace. Behind a simulated IOMMU it takes the domain's record of events for itself.
    """

    def __init__(self, name: str = "0000:00:01.0") -> None:
        self.name = name
        self.lines: list[str] = []
        self._device: Device | None = None
        self._domain = False
        self._lists: dict[int, list[int]] = {}

    # ---- observer

    def attached(self, device: Device) -> None:
        """Start to write."""
        if self._device is not None:
            raise StateError("a tracer traces one device at a time", argument="device", value=device)
        self._device, self._domain = device, device.backend.name == "iommu"
        if self._domain:
            device.backend.record(True)

    def detached(self, device: Device) -> None:
        """Stop."""
        self._drain()
        if self._domain:
            device.backend.record(False)
        self._device = None

    def before(self, call: Any) -> None:
        """Only the unmap of a list is told before it happens."""
        if call.op == "unmap_sg" and call.segments:
            phys = self._lists.pop(call.segments[0][0], [])
            self._event("dma_unmap_sg", f"{self._who(call)} phys_addrs={_array(phys)} attrs={_flags(call.attrs)}")

    def after(self, call: Any) -> None:
        """What the IOMMU did during the call, then the call itself."""
        self._drain()
        tell = getattr(self, f"_{call.op}", None)
        if tell is not None:
            tell(call)

    def _who(self, call: Any) -> str:
        return f"{self.name} dir={call.dir.upper()}"

    def _map_phys(self, call: Any) -> None:
        if call.rc == 0 and not self._domain:
            self._bounce(call.addr, call.phys, call.size)
        self._event("dma_map_phys", f"{self._who(call)} dma_addr={call.addr:x} size={call.size} phys_addr={call.phys:x} "
                                    f"attrs={_flags(call.attrs)}")  # fmt: skip

    def _unmap_phys(self, call: Any) -> None:
        self._event("dma_unmap_phys", f"{self._who(call)} dma_addr={call.addr:x} size={call.size} "
                                      f"attrs={_flags(call.attrs)}")  # fmt: skip

    def _map_sg(self, call: Any) -> None:
        phys = [p for p, _ in call.vecs]
        if call.rc < 0:
            if -call.rc not in (22, 12, 5, 121):  # the four that Linux expects are not traced
                self._event("dma_map_sg_err", f"{self._who(call)} dma_addrs={_array(phys)} err={call.rc} "
                                              f"attrs={_flags(call.attrs)}")  # fmt: skip
            return
        self._lists[call.segments[0][0]] = phys
        nents, ents = len(call.vecs), len(call.segments)
        cut = " [TRUNCATED]" if max(nents, ents) > _SHOWN else ""
        self._event("dma_map_sg",
                    f"{self._who(call)} nents={min(nents, _SHOWN)}/{nents} ents={min(ents, _SHOWN)}/{ents}{cut} "
                    f"dma_addrs={_array([a for a, _ in call.segments])} sizes={_array([n for _, n in call.segments])} "
                    f"phys_addrs={_array(phys)} attrs={_flags(call.attrs)}")  # fmt: skip

    def _sync_for_cpu(self, call: Any) -> None:
        self._event(f"dma_sync_single_{call.op[5:]}", f"{self._who(call)} dma_addr={call.addr:x} size={call.size}")

    _sync_for_device = _sync_for_cpu

    def _sync_sg_for_cpu(self, call: Any) -> None:
        self._event(f"dma_{call.op}", f"{self._who(call)} dma_addrs={_array([a for a, _ in call.segments])} "
                                      f"sizes={_array([n for _, n in call.segments])}")  # fmt: skip

    _sync_sg_for_device = _sync_sg_for_cpu

    def _alloc_coherent(self, call: Any) -> None:
        self._event("dma_alloc", f"{self.name} dir=BIDIRECTIONAL dma_addr={call.addr:x} size={call.size} "
                                 f"virt_addr={call.phys:016x} flags=GFP_KERNEL attrs=")  # fmt: skip

    def _free_coherent(self, call: Any) -> None:
        self._event("dma_free", f"{self.name} dir=BIDIRECTIONAL dma_addr={call.addr:x} size={call.size} "
                                f"virt_addr={call.phys:016x} attrs=")  # fmt: skip

    # ---- the IOMMU and the pool

    def _bounce(self, addr: int, phys: int, size: int) -> None:
        assert self._device is not None
        pool = self._device.swiotlb
        if pool is not None and addr in pool:
            self._bounced(phys, size)

    def _bounced(self, phys: int, size: int) -> None:
        assert self._device is not None
        force = "FORCE" if self._device.swiotlb.force else "NORMAL"
        self._event("swiotlb_bounced", f"dev_name: {self.name} dma_mask={self._device.dma_mask:x} dev_addr={phys:x} "
                                       f"size={size} {force}")  # fmt: skip

    def _drain(self) -> None:
        if not self._domain:
            return
        assert self._device is not None
        did = self._device.backend.did
        for kind, a, b, c, _ in self._device.backend.take_events():
            if kind == "map":
                self._event("map", f"IOMMU: iova={a:#018x} - {(a + c) % 2**64:#018x} paddr={b:#018x} size={c}")
            elif kind == "unmap":
                self._event("unmap", f"IOMMU: iova={a:#018x} - {(a + b) % 2**64:#018x} size={b} unmapped_size={c}")
            elif kind == "bounce":
                self._bounced(a, b)
            elif kind == "fault":
                self._event("io_page_fault", f"IOMMU:dmapath {self.name} iova={a:#018x} flags={c:#06x}")
            elif kind in ("flush", "flush_np", "flush_all"):
                order = c & 63
                at = a & ~((4096 << order) - 1) if order < 52 else 0
                name = "cache_tag_flush_range_np" if kind == "flush_np" else "cache_tag_flush_range"
                self._event(name, f"dmar0 dmar0[0] type iotlb did {did} [{a:#x}-{b:#x}] addr {at:#x} mask {c:#x}")

    # ---- the text

    def _event(self, name: str, body: str) -> None:
        task = f"{threading.current_thread().name.replace(' ', '_')[:15]}-{os.getpid()}"
        now = time.monotonic()
        self.lines.append(f"{task:>23} [000] ..... {now:12.6f}: {name}: {body}")

    def mark(self, text: str) -> None:
        """A line of one's own, as written to trace_marker."""
        self._event("tracing_mark_write", text)

    @contextmanager
    def io(self, name: str, bio: Bio) -> Iterator[None]:
        """Announce an I/O, as the captures under tests/data/traces do: what is mapped inside belongs to it."""
        vecs = bio.vecs
        self.mark(f"BEGIN {name} {bio.op} n={len(vecs)} total={bio.total:#x}")
        for i, (phys, n) in enumerate(vecs):
            self.mark(f"VEC {i} pa={int(phys):#x} len={n:#x}")
        yield
        self._drain()
        self.mark(f"END {name} r={bio.total} errno=0")

    def command(self, bio: Bio) -> None:
        """Say that an NVMe command for the bio is being set up (nvme_setup_cmd)."""
        self._event("nvme_setup_cmd",
                    f"nvme0: disk=nvme0n1, qid=1, cmdid=0, nsid=1, flags=0x0, meta=0x0, cmd=({_OPS[bio.op]} "
                    f"slba={bio.sector}, len={max(bio.total // 512 - 1, 0)}, ctrl=0x0, dsmgmt=0, reftag=0)")  # fmt: skip

    @property
    def text(self) -> str:
        """The whole trace, with ftrace's header."""
        n = len(self.lines)
        head = f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {n}/{n}   #P:1\n#\n"
        return head + "".join(line + "\n" for line in self.lines)

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        Path(path).write_text(self.text, encoding="utf-8")


def map_like_nvme(device: Device, bio: Bio) -> tuple[str, list[tuple[int, int]]]:
    """Map and unmap a bio as the NVMe driver asks for it (nvme_map_data): one physical segment by itself, anything else as a
    request by policy ``linux``. Returns the layout ("single" for the first) and the segments (address, bytes).
    """
    pieces = iterate(bio, device)
    if len(pieces) == 1:
        [(phys, n)] = pieces
        addr = device.map_phys(phys, n, bio.dir)
        device.unmap_phys(addr, n, bio.dir)  # the short cut always unmaps
        return "single", [(int(addr), n)]
    with device.map(bio, "linux") as m:
        segments = [(int(s.addr), s.length) for s in m.segments]
        return m.layout, segments
