"""A PCIe fabric: who sits below which bridge, and so how one function's memory can be reached by another
(drivers/pci/p2pdma.c). Host bridges, root ports, switches and functions, with ACS control bits for each.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from dmapath.addr import PhysAddr, as_length, as_phys
from dmapath.errors import DmaValueError, NotSupportedError, StateError
from dmapath.memory import HostBuffer, PhysMemory

__all__ = ["ACS_CR", "ACS_EC", "ACS_RR", "Bar", "Bridge", "Fabric", "Function", "RootComplex", "Switch"]

#: ACS control bits that send a peer's request up to the host: P2P request redirect, completion redirect, egress control.
ACS_RR, ACS_CR, ACS_EC = 0x4, 0x8, 0x20
#: How a client reaches a provider (enum pci_p2pdma_map_type).
NOT_SUPPORTED, BUS_ADDR, THRU_HOST_BRIDGE = 2, 3, 4

_INTEL, _GOOGLE, _NVIDIA = 0x8086, 0x1AE0, 0x10DE
#: Host bridges that forward between their own ports only (KERNEL section 8: "require the same bridge").
_SAME_BRIDGE = {(_INTEL, d) for d in (0x3C00, 0x3C01, 0x2F00, 0x2F01)}
_ANY_BRIDGE = {(_INTEL, d) for d in (0x2020, 0x2030, 0x2031, 0x2032, 0x2033, 0x09A2, 0x0B25, 0x0CFE)} | {
    (_NVIDIA, d) for d in (0x2F95, 0x2F96, 0x2F97, 0x2F98)
}  # fmt: skip


class Node:
    """Anything with a place in the tree. ``acs``: its ACS control bits, None where it has no ACS capability."""

    def __init__(self, parent: Node | None, root: RootComplex, acs: int | None) -> None:
        self.parent, self.root, self.acs = parent, root, acs

    @property
    def redirects(self) -> bool:
        """Whether its ACS control sends a peer's request upstream (pci_bridge_has_acs_redir)."""
        return self.acs is not None and bool(self.acs & (ACS_RR | ACS_CR | ACS_EC))

    def upward(self) -> Iterator[Node]:
        """Itself, then each bridge above it up to the root port."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class Bridge(Node):
    """A port that has a bus below it: a root port, or a switch's downstream port."""

    def switch(self, *, acs: int | None = None) -> Switch:
        """A switch below it; ``acs`` is its upstream port's."""
        return Switch(self, self.root, acs)

    def function(self, name: str = "", *, acs: int | None = None) -> Function:
        """A function of the device below it; call again for the device's next function."""
        return Function(self, self.root, acs, name)


class Switch(Node):
    """A switch: its upstream port. ``port`` adds downstream ports."""

    def port(self, *, acs: int | None = None) -> Bridge:
        """A downstream port."""
        return Bridge(self, self.root, acs)


class RootComplex:
    """A host bridge, its window of memory addresses, and its root ports.

    ``bridge`` is the (vendor, device) of the first device on the root bus, by which Linux tells whether peers may talk
    through it; ``window`` the (CPU address, bytes) out of which BARs get their addresses; ``bus_offset`` what is added to
    a CPU address to make the address on the bus (modulo 2**64).
    """

    def __init__(self, fabric: Fabric, bridge: tuple[int, int], window: tuple[int, int], bus_offset: int) -> None:
        self.fabric, self.bridge, self.bus_offset = fabric, bridge, bus_offset % 2**64
        self.window = (as_phys(window[0], "window"), as_length(window[1], "window"))
        if (self.window[0] | self.window[1] | self.bus_offset) & 4095:
            raise DmaValueError("page aligned", argument="window", value=window)
        if self.window[0] + self.window[1] > 2**64 or self.bus_window[1] >= 2**64:
            raise DmaValueError("a window ends at 2**64 at most, for the CPU and on the bus", argument="window",
                                value=window)  # fmt: skip
        self._next = self.window[0]

    def port(self, *, acs: int | None = None) -> Bridge:
        """A root port."""
        return Bridge(None, self, acs)

    def function(self, name: str = "", *, acs: int | None = None) -> Function:
        """A function on the root bus itself."""
        return Function(None, self, acs, name)

    def place(self, size: int) -> int:
        """CPU address for a BAR of so many bytes: naturally aligned in the window."""
        align = max(4096, 1 << (size - 1).bit_length())
        at = -(-self._next // align) * align
        if at + size > self.window[0] + self.window[1]:
            raise StateError("the host bridge's window is full", argument="size", value=size)
        self._next = at + size
        return at

    @property
    def bus_window(self) -> tuple[int, int]:
        """First and last bus address of the window."""
        first = (self.window[0] + self.bus_offset) % 2**64
        return first, first + self.window[1] - 1


class Function(Node):
    """A PCI function: a device that maps memory, or one whose BAR others may reach."""

    def __init__(self, parent: Node | None, root: RootComplex, acs: int | None, name: str) -> None:
        super().__init__(parent, root, acs)
        self.name = name
        #: False: its BARs must not be mapped (the kernel's non_mappable_bars).
        self.mappable_bars = True

    def __repr__(self) -> str:
        return f"Function({self.name!r})"

    def distance(self, provider: Function) -> int:
        """Hops to a provider: 0 itself, 2 a sibling function, 4 the same switch; -1 where peers cannot talk."""
        kind, hops = _relation(provider, self)
        return -1 if kind == NOT_SUPPORTED else hops

    def reach(self, provider: Function) -> int:
        """How this function reaches a provider's memory: BUS_ADDR, THRU_HOST_BRIDGE or NOT_SUPPORTED."""
        return _relation(provider, self)[0]

    def bar(self, memory: PhysMemory, size: int) -> Bar:
        """Memory of this function that peers may use (pci_p2pdma_add_resource)."""
        return Bar(self, memory, size)


def _relation(provider: Function, client: Function) -> tuple[int, int]:
    """Kind and distance (calc_map_type_and_dist): meet on the way up, and mind every ACS redirect passed."""
    if provider.root.fabric is not client.root.fabric:
        return NOT_SUPPORTED, -1
    path = list(client.upward())
    redirected = False
    climbed = 0
    for node in provider.upward():
        redirected |= node.redirects
        if node in path:
            below = path.index(node)
            redirected |= any(n.redirects for n in path[:below])
            hops = climbed + below
            return (_through_host(provider, client) if redirected else BUS_ADDR), hops
        climbed += 1
    return _through_host(provider, client), climbed + len(path)


def _through_host(provider: Function, client: Function) -> int:
    a, b = provider.root, client.root
    if a.fabric.cpu == "zen":
        return THRU_HOST_BRIDGE
    listed = all(r.bridge in _SAME_BRIDGE | _ANY_BRIDGE or r.bridge[0] == _GOOGLE for r in (a, b))
    if a is not b and (a.bridge in _SAME_BRIDGE or b.bridge in _SAME_BRIDGE):
        listed = False
    return THRU_HOST_BRIDGE if listed else NOT_SUPPORTED


class Fabric:
    """The machine's PCIe: one or more root complexes. ``cpu`` "zen" (AMD family 0x17 on) forwards between any peers."""

    def __init__(self, cpu: str = "intel") -> None:
        if cpu not in ("intel", "zen"):
            raise DmaValueError("intel or zen", argument="cpu", value=cpu)
        self.cpu = cpu

    def root_complex(
        self, bridge: tuple[int, int] = (_INTEL, 0x2020), *, window: tuple[int, int] = (0x8000000000, 1 << 36),
        bus_offset: int = 0,
    ) -> RootComplex:  # fmt: skip
        """A host bridge; see RootComplex."""
        return RootComplex(self, bridge, window, bus_offset)


class Bar:
    """A function's memory BAR as peer-to-peer memory of a machine: it holds bytes, has physical addresses, and is mapped
    like any memory; where peers reach it directly they use ``bus`` addresses.
    """

    def __init__(self, function: Function, memory: PhysMemory, size: int) -> None:
        if not function.mappable_bars:
            raise NotSupportedError("the function's BARs must not be mapped (non_mappable_bars)", argument="function",
                                    value=function)  # fmt: skip
        if as_length(size) & 4095:
            raise DmaValueError("a multiple of 4096", argument="size", value=size)
        self.function, self.memory, self.size = function, memory, size
        self.bytes = mmap.mmap(-1, size)
        self._start = function.root.place(size)
        self._frames = HostBuffer(self.bytes, memory, layout="contiguous", phys=self._start, uncached=True)
        memory.add_peer(self)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Bar({self.function.name!r}, {self._start:#x}+{self.size:#x})"

    @property
    def bus_offset(self) -> int:
        """Bus address minus CPU address, modulo 2**64."""
        return self.function.root.bus_offset

    def phys(self, offset: int = 0) -> PhysAddr:
        """Physical address of a byte."""
        if not 0 <= offset < self.size:
            raise DmaValueError(f"below {self.size}", argument="offset", value=offset)
        return PhysAddr(self._start + offset)

    def bus(self, offset: int = 0) -> int:
        """The same byte's address on the PCI bus."""
        return (int(self.phys(offset)) + self.bus_offset) % 2**64

    def vecs(self, offset: int = 0, length: int | None = None) -> list[tuple[PhysAddr, int]]:
        """One run: list of (PhysAddr, bytes)."""
        length = as_length(self.size - offset if length is None else length, "length")
        if offset < 0 or offset + length > self.size:
            raise DmaValueError(f"offset + length within {self.size} bytes", argument="length", value=length)
        return [(self.phys(offset), length)]
