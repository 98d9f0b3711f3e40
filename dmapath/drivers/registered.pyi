from types import TracebackType
from typing import Literal

from dmapath.drivers.rnic import Pd

MODES: tuple[str, ...]

class Registered:
    mode: str
    dma_ops: object
    def __init__(
        self,
        pd: Pd,
        *,
        mode: Literal["linear", "per-range"] = "linear",
        cache: int = 0,
        access: int = 1,
        slots: int = 64,
        max_pages: int = 512,
    ) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Registered: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
