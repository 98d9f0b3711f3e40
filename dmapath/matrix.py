"""Every driver on every machine, with memory aligned and not: the data byte by byte, what is left behind, and how it was
mapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from dmapath import machines
from dmapath.bio import Bio
from dmapath.device import Device
from dmapath.devices.nvme import NvmeController
from dmapath.devices.rnic import Rnic
from dmapath.drivers import rnic
from dmapath.drivers.nvme import Nvme
from dmapath.drivers.rblk import Rblk
from dmapath.drivers.registered import Registered
from dmapath.memory import PhysMemory
from dmapath.rdma import REMOTE_ALL

__all__ = ["ALIGNMENTS", "DRIVERS", "REGISTRATIONS", "markdown", "requests", "rows"]

PAGE = 4096
DISK = 1 << 20
DRIVERS = ("nvme", "rblk")
#: How rblk's memory comes to its keys: a key for each range of each request, one key for a window of the whole request, or
#: ranges that stay registered. Options of the registering back end.
REGISTRATIONS: dict[str, dict[str, Any]] = {
    "request": {"mode": "per-range"},
    "window": {"mode": "linear"},
    "cache": {"mode": "per-range", "cache": 1 << 20},
}
#: Ranges of a request as (offset in a buffer, bytes).
ALIGNMENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "aligned": ((0, PAGE), (PAGE, PAGE), (0, 2 * PAGE), (0, PAGE)),
    "unaligned": ((0x200, 0xE00), (0x604, 0x1000), (0xA00, 0x200), (0x10, 0x1FF0), (0x800, 0x10)),
    "mixed": ((0, PAGE), (0x200, 0xE00), (0, 2 * PAGE), (0x7FC, 0x200), (0, PAGE)),
}
REQUESTS = 3  # in flight together


class Rig:
    """A driver on a machine, and the disk as its hardware keeps it."""

    def __init__(self, machine: machines.Machine, driver: Any, disk: memoryview, extra: Callable[[], int],
                 stack: ExitStack) -> None:  # fmt: skip
        self.machine, self.driver, self.disk, self._extra, self._stack = machine, driver, disk, extra, stack
        #: Of rblk: the far HCA, where it is simulated, and the far queue pair.
        self.far: Any = None
        self.peer: Any = None

    def close(self) -> int:
        """Take it apart; how many things were left behind."""
        self._stack.close()
        return len(self.machine.leaks()) + self._extra()


def nvme_rig(backend: str, **options: Any) -> Rig:
    """The NVMe driver on a simulated controller; ``options`` are the controller's."""
    controller = NvmeController(DISK, order="random", **options)
    machine = machines.make(backend, controller.limits)
    controller.attach(machine.device)
    stack = ExitStack()
    driver = stack.enter_context(Nvme(controller, machine.device))
    return Rig(machine, driver, controller.media, lambda: driver.in_flight, stack)


def rblk_rig(backend: str, registration: str) -> Rig:
    """The RDMA block driver on two simulated HCAs; the near one's memory is mapped by the back end."""
    if backend == "verbs":
        return _verbs_rig(registration)
    hcas = Rnic(), Rnic()
    hcas[0].connect(hcas[1])
    machine = machines.make(backend, hcas[0].limits)
    below, far_memory = machine.device, PhysMemory(DISK)
    far = Device(memory=far_memory)
    stack = ExitStack()
    pds = []
    for hca, device in zip(hcas, (below, far), strict=True):
        hca.attach(device)
        pds.append(rnic.Pd(stack.enter_context(rnic.Context(hca, device))))
    region = stack.enter_context(rnic.Mr(pds[1], far_memory, access=1 | REMOTE_ALL))
    keys = stack.enter_context(Registered(pds[0], **REGISTRATIONS[registration]))
    near, other = (stack.enter_context(rnic.Qp(pd)) for pd in pds)
    near.connect(other.qp_num)
    other.connect(near.qp_num)
    device = Device(backend=keys, memory=machine.memory, pci=below.pci, swiotlb=below.swiotlb, **hcas[0].limits)
    driver = stack.enter_context(Rblk(device, near, region.addr, region.rkey, DISK))
    rig = Rig(machine, driver, memoryview(far_memory), lambda: sum(h.counters()["keys_live"] for h in hcas), stack)
    rig.far, rig.peer = hcas[1], other
    return rig


def _verbs_rig(registration: str) -> Rig:
    """The same driver on real RDMA: only what it is given differs."""
    from dmapath import verbs

    options = dict(REGISTRATIONS[registration])
    if "cache" in options:
        options["mode"] = "linear"  # there it is windows that are kept
    machine = machines.real({}, **options)
    pd, back = machine.keep
    stack, disk = ExitStack(), bytearray(DISK)
    stack.callback(machine.close)
    region = stack.enter_context(verbs.Mr(pd, disk, access=1 | REMOTE_ALL))
    near, other = (stack.enter_context(qp) for qp in verbs.loopback(pd))
    driver = stack.enter_context(Rblk(machine.device, near, region.addr, region.rkey, DISK))

    def left() -> int:
        counters = back.counters()
        return int(counters["registered_live"]) + (other.outstanding != 0)

    rig = Rig(machine, driver, memoryview(disk), left, stack)
    rig.peer = other
    return rig


def requests(machine: machines.Machine, alignment: str, op: str) -> list[Bio]:
    """Requests over buffers of their own, of every kind of memory in turn."""
    host = [at for at, kind in zip(machine.slots, machine.kinds, strict=True) if kind == "host"]
    peer = [at for at, kind in zip(machine.slots, machine.kinds, strict=True) if kind == "peer"]
    out, sector = [], 0
    for _ in range(REQUESTS):
        vecs = []
        for i, (offset, n) in enumerate(ALIGNMENTS[alignment]):
            slots = peer if peer and i % 2 else host
            vecs.append((slots.pop() + offset, n))
        out.append(Bio(vecs, op=op, sector=sector))
        sector += out[-1].total // 512 + 3
    return out


def _verify(rig: Rig, bios: list[Bio], op: str) -> bool:
    """Move known bytes and look at every byte from the other side, those around the requests too."""
    machine = rig.machine
    for at in machine.slots:
        machine.memory.write(at, os.urandom(machines.SLOT))
    rig.disk[:] = os.urandom(len(rig.disk))
    disk, cpu = bytearray(rig.disk), {at: bytearray(machine.memory.read(at, machines.SLOT)) for at in machine.slots}
    for bio in bios:
        at = bio.sector * 512
        for phys, n in bio.vecs:
            slot = next(s for s in machine.slots if s <= int(phys) < s + machines.SLOT)
            off = int(phys) - slot
            if op == "write":
                disk[at : at + n] = cpu[slot][off : off + n]
            else:
                cpu[slot][off : off + n] = disk[at : at + n]
            at += n
    rig.driver.run(bios)
    return bytes(rig.disk) == bytes(disk) and all(machine.memory.read(at, len(want)) == want for at, want in cpu.items())


def row(driver: str, backend: str, registration: str, alignment: str, op: str) -> dict[str, Any]:
    """One cell, on fresh hardware."""
    rig = nvme_rig(backend) if driver == "nvme" else rblk_rig(backend, registration)
    bios = requests(rig.machine, alignment, op)
    verified = _verify(rig, bios, op)
    told = rig.driver.told
    if registration == "cache":
        verified = _verify(rig, bios, op) and verified  # from the cache this time
    kinds = "host + peers" if "peer" in rig.machine.kinds else "host"
    return {
        "driver": driver, "backend": backend, "registration": registration, "memory": kinds,
        "alignment": alignment, "op": op,
        "case": told["case"], "layout": told["layout"], "segments": told["segments"], "verified": verified,
        "leaks": rig.close(),
    }  # fmt: skip


def cells(backends: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """What ``row`` is called with; verbs is rblk's alone."""
    for driver in DRIVERS:
        for backend in backends:
            if driver == "nvme" and backend == "verbs":
                continue
            for registration in REGISTRATIONS if driver == "rblk" else ("-",):
                for alignment in ALIGNMENTS:
                    for op in ("read", "write"):
                        yield driver, backend, registration, alignment, op


def rows(backends: list[str], progress: Callable[[int, int], None] = lambda done, of: None) -> list[dict[str, Any]]:
    """One row per driver, back end, registration, alignment and operation."""
    jobs = list(cells(backends))
    out = []
    for i, job in enumerate(jobs):
        progress(i, len(jobs))
        out.append(row(*job))
    progress(len(jobs), len(jobs))
    return out


def table(every: list[dict[str, Any]]) -> list[list[str]]:
    """Lines for people: driver, registration, back end, memory; then for each alignment how it was mapped, read / written
    where that differs, and whether every byte was right and nothing was left.
    """
    out = []
    keys = dict.fromkeys((r["driver"], r["registration"], r["backend"], r["memory"]) for r in every)
    for key in keys:
        line = [key[0] if key[1] == "-" else f"{key[0]}, {key[1]}", key[2], key[3]]
        for alignment in ALIGNMENTS:
            mine = [r for r in every if (r["driver"], r["registration"], r["backend"], r["memory"]) == key
                    and r["alignment"] == alignment]  # fmt: skip
            how = " / ".join(dict.fromkeys(f"{r['layout']} ({r['case']})" for r in mine))
            good = "" if all(r["verified"] and not r["leaks"] for r in mine) else " WRONG"
            line.append(how + good)
        out.append(line)
    return out


HEADINGS = ["driver", "back end", "memory", *ALIGNMENTS]


def markdown(every: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/matrix.md."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *table(every)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
