"""Tests on a real RDMA device: ``dmapath rxe test`` runs them on soft-RoCE in a throw-away guest, as scripts/test does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmapath import Device, PhysMemory
from dmapath.verbs import Context, Pd, Qp, Verbs, devices, loopback

if not devices():
    pytest.exit("tests/verbs wants an RDMA device: `dmapath rxe test` brings soft-RoCE in a guest", returncode=2)

RIGHTS = 1 | 2 | 4 | 8


@pytest.fixture(scope="session")
def ctx() -> Iterator[Context]:
    yield Context()


@pytest.fixture
def pd(ctx: Context) -> Iterator[Pd]:
    with Pd(ctx) as made:
        yield made
        gc.collect()  # closing it proves that nothing of it was left


@pytest.fixture
def pair(pd: Pd) -> Iterator[tuple[Qp, Qp]]:
    first, second = loopback(pd)
    yield first, second
    first.close()
    second.close()


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
