from typing import Any

COUNTERS: tuple[str, ...]
LIVE_COUNTERS: tuple[str, ...]

class Backend:
    name: str
    def counters(self) -> dict[str, int]: ...

def carries_ops(owner: object) -> bool: ...

class CapsuleBackend(Backend):
    def __init__(self, owner: Any) -> None: ...
