from collections.abc import Sequence

from dmapath.memory import PhysMemory
from dmapath.verbs.queue import Qp
from dmapath.verbs.resources import Pd

def register(
    pd: Pd, memory: PhysMemory, places: Sequence[tuple[int, int]], access: int, rounds: int
) -> tuple[int, int]: ...

class Writer:
    def __init__(
        self, qp: Qp, *, addr: int, lkey: int, remote_addr: int, rkey: int, length: int, batch: int
    ) -> None: ...
    def run(self) -> int: ...
    def parts(self, wait_ns: int) -> tuple[int, int, int]: ...
