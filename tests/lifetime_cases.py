"""Owners of memory and mappings on every back end, for tests/test_lifetime.py. ``python lifetime_cases.py MODE`` runs each
in a forked child that ends as MODE says, and prints what did not end with 0 and an empty standard error.
"""

from __future__ import annotations

import builtins
import gc
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmapath
from dmapath import (
    Adversary,
    Bio,
    Device,
    DmaDebug,
    Exposure,
    Fabric,
    GrantTable,
    HmmMap,
    HostBuffer,
    Iommu,
    MemoryRegion,
    OdpRegion,
    PhysMemory,
    Swiotlb,
    Tracer,
    XenDomain,
)  # fmt: skip
from dmapath.devices.nvme import NvmeController
from dmapath.devices.rnic import Rnic
from dmapath.drivers import rnic
from dmapath.drivers.nvme import Nvme
from dmapath.drivers.registered import Registered

PAGE = 4096


class Plain:
    """A back end in Python whose attributes the collector may clear."""

    def __init__(self) -> None:
        self.table: dict[int, int] = {}

    def map_phys(self, phys: int, size: int, _dir: str, _attrs: int) -> int:
        self.table[phys] = size
        return phys

    def unmap_phys(self, addr: int, _size: int, _dir: str, _attrs: int) -> None:
        del self.table[addr]


def _memory() -> PhysMemory:
    return PhysMemory(1 << 20, base=1 << 32)


def _pool(memory: PhysMemory, **kw: Any) -> Swiotlb:
    return Swiotlb(memory, slots=512, **kw)


def _swiotlb() -> Device:
    memory = _memory()
    return Device(memory=memory, swiotlb=_pool(memory, force=True))


def _dynamic() -> Device:
    memory = _memory()
    return Device(memory=memory, swiotlb=_pool(memory, force=True, dynamic=True))


def _restricted() -> Device:
    memory = _memory()
    return Device(memory=memory, swiotlb=_pool(memory, restricted=True))


def _untrusted() -> Device:
    memory = _memory()
    return Device(memory=memory, iommu=Iommu(), untrusted=True, min_align_mask=0xFFF, swiotlb=_pool(memory))


def _xen() -> Device:
    memory = _memory()
    pool = _pool(memory)
    return Device(memory=memory, xen=XenDomain(memory, pool=pool), swiotlb=pool)


def _peers() -> Device:
    memory = _memory()
    switch = Fabric().root_complex().port().switch()
    switch.port().function("gpu").bar(memory, 16 * PAGE)
    return Device(memory=memory, pci=switch.port().function("nic"), iommu=Iommu())


def _registered() -> Device:
    below = Device(memory=_memory(), iommu=Iommu(), **Rnic().limits)
    hca = Rnic()
    hca.attach(below)
    return Device(memory=below.memory, backend=Registered(rnic.Pd(rnic.Context(hca, below))))


def _watched(make: Callable[[], Any]) -> Callable[[], Device]:
    def watched() -> Device:
        dev = Device(memory=_memory(), iommu=Iommu())
        dev.attach(make())
        return dev

    return watched


DEVICES: dict[str, Callable[[], Device]] = {
    "direct": lambda: Device(memory=_memory()),
    "swiotlb": _swiotlb,
    "dynamic": _dynamic,
    "restricted": _restricted,
    "strict": lambda: Device(memory=_memory(), iommu=Iommu()),
    "lazy": lambda: Device(memory=_memory(), iommu=Iommu("lazy")),
    "noncoherent": lambda: Device(memory=_memory(), iommu=Iommu(), coherent=False),
    "untrusted": _untrusted,
    "xen": _xen,
    "grant": lambda: Device(memory=_memory(), grants=GrantTable()),
    "peers": _peers,
    "registered": _registered,
    "python": lambda: Device(memory=_memory(), backend=Plain()),
    "adversary": lambda: Device(memory=_memory(), backend=Adversary(1)),
    "debug": _watched(lambda: DmaDebug()),
    "tracer": _watched(lambda: Tracer()),
    "exposure": _watched(lambda: Exposure()),
}


def _bio(dev: Device, op: str = "read") -> Bio:
    return Bio([(dev.memory.phys(0x200), 0x600), (dev.memory.phys(5 * PAGE), PAGE)], op=op)


OWNERS: dict[str, Callable[[Device], Any]] = {
    "device": lambda dev: None,
    "map": lambda dev: dev.map(_bio(dev)),
    "map_start": lambda dev: (lambda m: (m, m.next()))(dev.map_start(_bio(dev), "linux")),
    "region": lambda dev: dev.map(MemoryRegion.from_memory(dev.memory, 0, 3 * PAGE)),
    "map_sg": lambda dev: dev.map_sg(_bio(dev)),
    "map_phys": lambda dev: dev.map_phys(dev.memory.phys(0x200), 0x600, "from_device"),
    "state": lambda dev: dev.iova_try_alloc(dev.memory.phys(0), PAGE),
    "coherent": lambda dev: dev.alloc_coherent(2 * PAGE),
    "coherent-viewed": lambda dev: memoryview(dev.alloc_coherent(PAGE)),
    "hmm": lambda dev: (lambda h: (h, h.map_pfn(1, dev.memory.phys(0))))(HmmMap(dev, 8)),
    "odp": lambda dev: (lambda r: (r, r.fault(0, 2 * PAGE)))(OdpRegion(dev, dev.memory, 0, 4 * PAGE)),
    "buffer": lambda dev: HostBuffer(bytearray(5000), dev.memory),
    "buffer-mapped": lambda dev: (lambda b: (b, dev.map(Bio.from_memory(b, [(0, 5000)]))))(
        HostBuffer(bytearray(5000), dev.memory)),
}


def _nvme(**kw: Any) -> list[Any]:
    memory = PhysMemory(1 << 21)
    ctrl = NvmeController(1 << 20)
    dev = Device(memory=memory, **{**ctrl.limits, **kw})
    ctrl.attach(dev)
    nvme = Nvme(ctrl, dev)
    nvme.run([Bio([(memory.phys(0), PAGE)], op="write")])
    io = nvme.submit([Bio([(memory.phys(0), PAGE)], op="read")])
    return [nvme, io, dev]


def _hca() -> list[Any]:
    dev = Device(memory=_memory(), iommu=Iommu(), **Rnic().limits)
    hca = Rnic()
    hca.attach(dev)
    hca.connect(hca)
    pd = rnic.Pd(rnic.Context(hca, dev))
    a, b = rnic.Qp(pd), rnic.Qp(pd)
    return [pd, a, b, rnic.Mr(pd, dev.memory, 0, PAGE), rnic.FastMr(pd), rnic.Cq(pd.context), hca]


def _foreign() -> list[Any]:
    memory, other = _memory(), _memory()
    xen, theirs = XenDomain(memory), XenDomain(other, base=1 << 43)
    xen.balloon_out(memory.phys(0))
    xen.map_foreign(memory.phys(0), theirs, other.phys(0))
    del xen, theirs, other
    gc.collect()
    memory.read(memory.phys(0), PAGE)
    return [memory]


MORE: dict[str, Callable[[], Any]] = {
    "nvme": lambda: _nvme(), "nvme-strict": lambda: _nvme(iommu=Iommu()), "nvme-python": lambda: _nvme(backend=Adversary(1)),
    "hca": _hca, "xen-foreign": _foreign,
}  # fmt: skip


def everything() -> dict[str, Callable[[], Any]]:
    """Case name -> what makes its objects; None where the back end has no such thing."""
    out: dict[str, Callable[[], Any]] = {}

    def case(make: Callable[[], Device], own: Callable[[Device], Any]) -> Callable[[], Any]:
        def run() -> Any:
            dev = make()
            try:
                return [dev, own(dev)]
            except dmapath.DmaError:
                return [dev]  # this back end refuses it, which is another test's affair

        return run

    for d, make in DEVICES.items():
        for o, own in OWNERS.items():
            out[f"{d}/{o}"] = case(make, own)
    return out | MORE


# ---- how a case ends. Each of these is called in a forked child, which then leaves through the interpreter's own end


def in_a_cycle(make: Callable[[], Any]) -> None:
    """Garbage in a cycle with all it needs."""
    c = make()
    c.append(c)
    del c
    gc.collect()


def in_an_exception(make: Callable[[], Any]) -> None:
    """Held by the traceback of an exception that is kept in a local."""

    def f() -> None:
        c = make()
        try:
            raise KeyError(len(c))
        except KeyError as e:
            kept = e
            c.append(kept)

    f()
    gc.collect()


def often(make: Callable[[], Any]) -> None:
    """With the collector at work all the time."""
    gc.set_threshold(1)
    for _ in range(3):
        c = make()
        c.append(c)


def as_global(make: Callable[[], Any]) -> None:
    """Alive at the interpreter's end, by name."""
    for i, x in enumerate(make()):
        globals()[f"kept{i}"] = x


def as_global_cycle(make: Callable[[], Any]) -> None:
    """Alive at the end, in a cycle."""
    c = make()
    c.append(c)
    globals()["kept"] = c


def in_builtins(make: Callable[[], Any]) -> None:
    """Alive when all modules are gone."""
    builtins.kept = make()  # type: ignore[attr-defined]


def resurrected(make: Callable[[], Any]) -> None:
    """A finaliser of the same garbage takes it all back."""

    class Again:
        def __init__(self, c: list[Any]) -> None:
            self.c = c

        def __del__(self) -> None:
            globals()["again"] = self.c

    c = make()
    c.append(Again(c))
    del c
    gc.collect()


MODES: dict[str, Callable[[Callable[[], Any]], None]] = {
    f.__name__: f for f in (in_a_cycle, in_an_exception, often, as_global, as_global_cycle, in_builtins, resurrected)
}


def child(mode: str, make: Callable[[], Any], log: int) -> None:
    """What runs after the fork; it returns, and so leaves as any program does."""
    os.dup2(log, 2)
    signal.alarm(60)
    warnings.simplefilter("ignore", ResourceWarning)
    MODES[mode](make)


def main() -> None:
    """Fork a child for each case."""
    wrong = 0
    only = sys.argv[2:] or None
    for name, make in everything().items():
        if only and name not in only:
            continue
        with tempfile.TemporaryFile() as log:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                child(sys.argv[1], make, log.fileno())
                return
            status = os.waitpid(pid, 0)[1]
            log.seek(0)
            said = log.read().decode(errors="replace")
        if status or said:
            wrong += 1
            print(f"{sys.argv[1]} {name}: status {status:#x} {said[-300:]}")
    print(f"{len(everything())} cases, {wrong} wrong")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
