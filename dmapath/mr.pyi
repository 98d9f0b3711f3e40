from collections.abc import Iterable, Sequence

from dmapath.addr import DmaAddr
from dmapath.device import Segment
from dmapath.memory import PhysMemory
from dmapath.request import Mappable

PAGE: int
LOCAL_WRITE: int
REMOTE_WRITE: int
REMOTE_READ: int
REMOTE_ATOMIC: int
MW_BIND: int
ZERO_BASED: int
ON_DEMAND: int
HUGETLB: int
FLUSH_GLOBAL: int
FLUSH_PERSISTENT: int
RELAXED_ORDERING: int
WRITABLE: int

_Segments = Sequence[Segment] | Sequence[tuple[int, int]]

def check_rights(access: int) -> int: ...
def check_access(access: int) -> int: ...

class MemoryRegion(Mappable):
    offset: int
    length: int
    iova: int
    access: int
    writable: bool
    def __init__(
        self,
        pages: Iterable[tuple[int, int]],
        *,
        length: int,
        offset: int = 0,
        iova: int | None = None,
        access: int = 1,
    ) -> None: ...
    @classmethod
    def from_memory(
        cls, memory: PhysMemory, offset: int, length: int, *, iova: int | None = None, access: int = 1
    ) -> MemoryRegion: ...
    def rereg(self, access: int) -> None: ...
    def best_page_size(self, segments: _Segments, page_sizes: int) -> int: ...
    def mtt(self, segments: _Segments, page_size: int) -> list[DmaAddr]: ...

class FastMr:
    index: int
    pd: object
    max_pages: int
    page_size: int
    state: str
    key: int
    access: int
    iova: DmaAddr
    length: int
    pages: list[DmaAddr]
    def __init__(self, index: int, pd: object, *, max_pages: int = 256, page_size: int = 4096) -> None: ...
    def map(self, segments: Sequence[Segment] | Sequence[tuple[int, int]], *, sg_offset: int = 0) -> int: ...
    def reg(self, key: int, pd: object, access: int) -> None: ...
    def invalidate(self, key: int) -> None: ...
    def check(self, iova: int, length: int, access: int = 0) -> None: ...

def find_best_pgsz(segments: _Segments, offset: int, length: int, virt: int, page_sizes: int) -> int: ...
def find_best_pgoff(segments: _Segments, offset: int, length: int, page_sizes: int, mask: int) -> int: ...
def dma_blocks(segments: _Segments, offset: int, length: int, virt: int, page_size: int) -> list[DmaAddr]: ...
def sg_to_pages(
    segments: _Segments,
    *,
    page_size: int = 4096,
    sg_offset: int = 0,
    max_pages: int | None = None,
    kernel_quirks: bool = False,
) -> tuple[int, DmaAddr, int, list[DmaAddr], int]: ...
