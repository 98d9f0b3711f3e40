from dmapath.memory import PhysMemory

class Swiotlb:
    memory: PhysMemory | None
    slots: int
    areas: int
    base: int
    force: bool
    dynamic: bool
    restricted: bool
    def __init__(
        self,
        memory: PhysMemory | None = None,
        *,
        slots: int = 32768,
        areas: int = 1,
        base: int = 1073741824,
        force: bool = False,
        dynamic: bool = False,
        restricted: bool = False,
    ) -> None: ...
    def __contains__(self, phys: int) -> bool: ...
    def fresh(self) -> Swiotlb: ...
    def max_mapping_size(self, min_align_mask: int = 0) -> int: ...
    @property
    def used(self) -> int: ...
    def counters(self) -> dict[str, int]: ...
    def fail_nth(self, n: int) -> int: ...
