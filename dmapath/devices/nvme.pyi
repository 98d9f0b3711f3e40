from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from dmapath.device import Device

@dataclass(frozen=True)
class NvmeErrorEntry:
    count: int
    queue: int
    command: int
    status: int
    byte: int
    bit: int
    lba: int
    nsid: int
    @property
    def name(self) -> str: ...

class NvmeController:
    device: Any  # Device or None
    mmio: object
    media: memoryview
    metadata: memoryview
    block_size: int
    metadata_size: int
    mdts: int
    sgl: bool
    def __init__(
        self,
        media: int | str | PathLike[str] | Any = 67108864,
        *,
        block_size: int = 512,
        metadata_size: int = 0,
        mdts: int = 10,
        sgl: bool = True,
        metadata_sgl: bool = True,
        order: Literal["fifo", "random"] = "fifo",
        seed: int = 1,
    ) -> None: ...
    @property
    def blocks(self) -> int: ...
    @property
    def limits(self) -> dict[str, Any]: ...
    def attach(self, device: Device) -> None: ...
    def work(self) -> int: ...
    def fail_next(self, n: int, status: int = 130) -> None: ...
    @property
    def errors(self) -> list[NvmeErrorEntry]: ...
    @property
    def fatal(self) -> bool: ...
    def counters(self) -> dict[str, int]: ...
