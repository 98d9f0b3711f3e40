from collections.abc import Iterable

from dmapath.device import Device
from dmapath.limits import QueueLimits
from dmapath.memory import HostBuffer, PhysMemory
from dmapath.request import Mappable

class Bio(Mappable):
    op: str
    sector: int
    integrity: Bio | None
    def __init__(
        self,
        vecs: Iterable[tuple[int, int]],
        *,
        op: str = "read",
        sector: int = 0,
        integrity: Iterable[tuple[int, int]] | Bio | None = None,
    ) -> None: ...
    @classmethod
    def from_phys(cls, vecs: Iterable[tuple[int, int]], op: str = "read", sector: int = 0) -> Bio: ...
    @classmethod
    def from_memory(
        cls,
        memory: PhysMemory | HostBuffer,
        ranges: Iterable[tuple[int, int]],
        op: str = "read",
        sector: int = 0,
    ) -> Bio: ...
    def split(self, limits: Device | QueueLimits, *, max_bytes: int | None = None, block_size: int = 512) -> list[Bio]: ...

class Request(Mappable):
    op: str
    bios: tuple[Bio, ...]
    integrity: Bio | None
    @property
    def sector(self) -> int: ...
    def __init__(self, bios: Iterable[Bio]) -> None: ...
    def nr_phys_segments(self, limits: Device) -> int: ...
