"""What the tests of real RDMA share."""

from __future__ import annotations

from pathlib import Path

from dmapath import Device, PhysMemory
from dmapath.verbs import LOCAL_WRITE, REMOTE_ALL, Pd, Verbs

RIGHTS = LOCAL_WRITE | REMOTE_ALL


class Machine:
    """A device on verbs with its memory, and the promise that nothing stays mapped."""

    def __init__(self, pd: Pd, mode: str = "linear", size: int = 1 << 20, layout: str = "scattered",
                 backing: str = "4k", **kw: object) -> None:  # fmt: skip
        self.memory = PhysMemory(size, layout=layout, seed=4, backing=backing)  # type: ignore[arg-type]
        self.verbs = Verbs(pd, self.memory, mode=mode, **kw)  # type: ignore[arg-type]
        self.dev = Device(backend=self.verbs, memory=self.memory)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        left = self.live()
        self.verbs.close()
        c = self.dev.counters()
        if exc[0] is None:
            assert not any(left.values()), left
            assert c["registered_live"] == 0
            assert c["registrations"] == c["deregistrations"]
            assert c["iova_allocs"] == c["iova_frees"]

    def live(self) -> dict[str, int]:
        c = self.dev.counters()
        return {k: c[k] for k in ("iova_live", "iova_live_bytes", "mapped_bytes")}


def pinned() -> int:
    """Bytes that this process has pinned."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPin:"))
