"""Whole machines by name: a memory, a device on one back end, and buffers of every kind that the machine has.

The matrix runs drivers on them, and so do tests of drivers (the pytest plug-in). Names of other packages' back ends are
found by entry points (``dmapath.plugins``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dmapath.adversary import Adversary
from dmapath.backends.base import LIVE_COUNTERS
from dmapath.backends.iommu import Iommu
from dmapath.device import Device
from dmapath.errors import DmaValueError
from dmapath.memory import PhysMemory
from dmapath.pci import ACS_RR, Fabric
from dmapath.plugins import find, names
from dmapath.swiotlb import Swiotlb
from dmapath.xen import XenDomain

__all__ = ["MACHINES", "Machine", "make", "names_of_all", "plain", "real"]

PAGE = 4096
SLOT = 4 * PAGE
HOST_SLOTS, PEER_SLOTS = 64, 4


@dataclass
class Machine:
    """A device with its memory, and ``slots``: physical addresses of buffers of 16 KiB each, of all kinds of memory there
    are (``kinds``: "host", "peer").
    """

    name: str
    memory: PhysMemory
    device: Device
    slots: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        places = list(range(HOST_SLOTS))
        random.Random(7).shuffle(places)
        self.slots = [int(self.memory.phys(i * SLOT)) for i in places] + self.slots
        self.kinds = ["host"] * HOST_SLOTS + self.kinds
        self.before = self.live()

    def live(self) -> dict[str, int]:
        """What stands now, when everything that was put off has happened."""
        if self.device.iommu is not None:
            self.device.iommu.advance(10_000_000)  # the flush queue's timer
        counters = self.device.counters()
        return {name: counters[name] for name in LIVE_COUNTERS}

    def close(self) -> None:
        """Give back what the machine holds beside memory."""
        self.stack.close()

    def leaks(self) -> dict[str, int]:
        """What stands now and did not stand when the machine was made."""
        now = self.live()
        return {name: n - self.before[name] for name, n in now.items() if n != self.before[name]}


def _memory() -> PhysMemory:
    return PhysMemory(HOST_SLOTS * SLOT, base=1 << 32)


def plain(name: str, limits: dict[str, Any], **kw: Any) -> Machine:
    """A machine with memory and a Device of these limits; further keyword arguments are the Device's."""
    memory = _memory()
    return Machine(name, memory, Device(memory=memory, **{**limits, **kw}))


def _swiotlb(name: str, limits: dict[str, Any]) -> Machine:
    memory = _memory()
    return Machine(name, memory, Device(memory=memory, swiotlb=Swiotlb(memory, slots=8192, force=True), **limits))


def _untrusted(name: str, limits: dict[str, Any]) -> Machine:
    memory = _memory()
    device = Device(memory=memory, iommu=Iommu("lazy"), untrusted=True, swiotlb=Swiotlb(memory, slots=8192), **limits)
    return Machine(name, memory, device)


def _xen(name: str, limits: dict[str, Any]) -> Machine:
    memory = _memory()
    pool = Swiotlb(memory, slots=8192)
    return Machine(name, memory, Device(memory=memory, xen=XenDomain(memory, pool=pool), swiotlb=pool, **limits))


def _peers(name: str, limits: dict[str, Any]) -> Machine:
    """Host memory, a peer below the same switch, and one behind a port that sends everything to the host bridge."""
    memory = _memory()
    switch = Fabric().root_complex(bus_offset=-0x1000000000).port().switch()
    bars = [switch.port(acs=acs).function("peer").bar(memory, PEER_SLOTS * SLOT) for acs in (None, ACS_RR)]
    device = Device(memory=memory, pci=switch.port().function("device"), iommu=Iommu("strict"), **limits)
    slots = [int(bar.phys(i * SLOT)) for i in range(PEER_SLOTS) for bar in bars]
    return Machine(name, memory, device, slots, ["peer"] * len(slots), [bars])


def real(limits: dict[str, Any], **options: Any) -> Machine:
    """A real RDMA device and its memory; ``options`` are those of ``dmapath.verbs.Verbs``. ``keep`` holds its Pd and the
    Verbs.
    """
    from dmapath import verbs

    stack = ExitStack()
    pd = stack.enter_context(verbs.Pd(stack.enter_context(verbs.Context())))
    memory = _memory()
    back = stack.enter_context(verbs.Verbs(pd, memory, **options))
    device = Device(backend=back, memory=memory, **limits)
    return Machine("verbs", memory, device, keep=[pd, back], stack=stack)


#: Machine name -> how to make it, given the limits of the hardware (keyword arguments of Device).
MACHINES: dict[str, Callable[[str, dict[str, Any]], Machine]] = {
    "direct": plain,
    "swiotlb": _swiotlb,
    "iommu-strict": lambda name, limits: plain(name, limits, iommu=Iommu("strict")),
    "iommu-lazy": lambda name, limits: plain(name, limits, iommu=Iommu("lazy")),
    "untrusted": _untrusted,
    "non-coherent": lambda name, limits: plain(name, limits, coherent=False),
    "xen": _xen,
    "p2p": _peers,
    "adversarial": lambda name, limits: plain(name, limits, backend=Adversary(11)),
}


def names_of_all() -> list[str]:
    """Every simulated machine: this package's, and a machine for each back end of other packages."""
    return [*MACHINES, *(name for name in names("backends") if name not in MACHINES)]


def make(name: str, limits: dict[str, Any] | None = None) -> Machine:
    """A fresh machine; "verbs" is a real one, on this computer's first RDMA device. DmaValueError where no machine, and no
    package's back end, is of that name.
    """
    if name == "verbs":
        return real(limits or {})
    if name in MACHINES:
        return MACHINES[name](name, limits or {})
    if name not in names("backends"):
        raise DmaValueError(f"one of {', '.join(names_of_all())}, verbs", argument="name", value=name)
    return plain(name, limits or {}, backend=find("backends", name)())
