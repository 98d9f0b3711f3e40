"""What registering memory costs: method by method, size by size, aligned and not, whole and scattered.

On verbs the clock is real, and a plain C loop of ibv_reg_mr runs beside in the same rounds. On the simulated IOMMU counts
are exact and hardware time is modelled from published costs.
"""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dmapath import _bench
from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio
from dmapath.costs import modelled_ns
from dmapath.device import Device
from dmapath.errors import DmaError
from dmapath.memory import PhysMemory
from dmapath.rdma import cut, entries_of

if TYPE_CHECKING:
    from dmapath.verbs import Pd

__all__ = ["METHODS", "SCATTER", "Case", "cases", "json_object", "rows"]

PAGE = 4096
METHODS = ("direct", "per-range", "linear", "cache")
SCATTER = ("contiguous", "pages", "random")
#: More ranges than these are not registered one by one: each takes some 10 us, and devices have few keys.
MANY = 16384


@dataclass(frozen=True)
class Case:
    """What is registered: bytes, bytes off the page, how its pages lie, size of pages that hold it."""

    size: int
    align: int
    scatter: str
    page_size: int

    def arena(self) -> PhysMemory:
        """A machine with room for it; huge pages lie whole."""
        step = 1 if self.scatter == "contiguous" else 2
        pages = -(-(self.size + self.align) // self.page_size) + 1
        huge = self.page_size > PAGE
        return PhysMemory(step * pages * self.page_size, layout="huge" if huge else "contiguous", seed=1,
                          backing="2m" if huge else "4k")  # fmt: skip

    def places(self) -> list[tuple[int, int]]:
        """Where its bytes lie in the arena: one run, every other page in order, or every other page in random order."""
        if self.scatter == "contiguous":
            return [(self.align, self.size)]
        pages = -(-(self.size + self.align) // self.page_size)
        order = list(range(pages))
        if self.scatter == "random":
            random.Random(self.size).shuffle(order)
        out, left, skip = [], self.size, self.align
        for i in order:
            n = min(left, self.page_size - skip)
            out.append((2 * self.page_size * i + skip, n))
            left, skip = left - n, 0
        return [p for p in out if p[1]]


def cases(sizes: Sequence[int], aligns: Sequence[int], scatters: Sequence[str], page_size: int) -> list[Case]:
    """Each size with each alignment and scatter."""
    return [Case(size, align, scatter, page_size) for size in sizes for align in aligns for scatter in scatters]


def _rounds(case: Case) -> int:
    return max(3, min(101, (32 << 20) // case.size))


# ---- simulated ------------------------------------------------------------------------------------------------------


def _sim_row(case: Case, method: str, op: str) -> dict[str, Any]:
    memory = case.arena()
    dev = Device(iommu=None if method == "direct" else Iommu(), memory=memory)
    bio = Bio.from_memory(memory, case.places(), op)
    each = method == "per-range"
    before = dev.counters()
    if each:
        held = [(dev.map_phys(p, n), n) for p, n in bio.vecs]
        segments = len(held)
        for addr, n in held:
            dev.unmap_phys(addr, n)
    else:
        with dev.map(bio) as m:
            segments = len(m)
    after = dev.counters()
    spent = {k: after[k] - before[k] for k in after}
    reg, dereg = _bench.time_request(dev, bio, "none" if each else "unified", _rounds(case))
    allocs, calls = spent["iova_allocs"], spent["maps"] + spent["links"]
    return {
        "ranges": len(bio.vecs), "registrations": max(1, allocs), "lkeys": max(1, allocs), "sges": segments,
        "pinned_bytes": sum(spent[f"ptes_{k}"] << s for k, s in (("4k", 12), ("2m", 21), ("1g", 30))),
        "reg_ns": reg, "dereg_ns": dereg,
        "modelled_ns": round(
            modelled_ns(
                {
                    "iova_alloc": allocs,
                    "map_call": calls,
                    "sync": spent["syncs"],
                    "unmap_call": spent["unmaps"] + spent["unlinks"],
                    "invalidation": spent["invalidations"],
                }
            )
        ),
    }  # fmt: skip


# ---- real -----------------------------------------------------------------------------------------------------------


def _verbs_row(pd: Pd, case: Case, method: str, op: str, access: int | None, threads: int) -> dict[str, Any]:
    from dmapath.verbs import LOCAL_WRITE, REMOTE_READ, REMOTE_WRITE, Verbs, _plain

    memory = case.arena()
    places = case.places()
    if method == "per-range" and len(places) > MANY:
        raise DmaError(f"{len(places)} ranges are more than {MANY}, the most that are registered one by one here")
    memoryview(memory)[:] = bytes(len(memory))  # in memory before the clock starts
    rounds = _rounds(case)
    mode = {"cache": "linear"}.get(method, method)
    options = {"mode": mode, "cache": len(memory) * 4 if method == "cache" else 0, "access": access}
    bio = Bio.from_memory(memory, places, op)
    with Verbs(pd, memory, **options) as verbs:  # type: ignore[arg-type]
        dev = Device(backend=verbs, memory=memory)
        with dev.map(bio) as m:
            counters = dev.counters()
            row: dict[str, Any] = {
                "ranges": len(bio.vecs), "registrations": counters["registrations"],
                "lkeys": len({s.lkey for s in m.segments}),
                "sges": sum(len(g) for g in cut(entries_of(m.segments), 1 << 30, 1 << 62)),
                "pinned_bytes": counters["registered_live"],
            }  # fmt: skip
        if threads == 1:
            reg, dereg = _bench.time_request(dev, bio, "unified", rounds)
        else:
            reg, dereg = _threaded(lambda: _bench.time_request(dev, bio, "unified", rounds), threads)
        row |= {"reg_ns": reg, "dereg_ns": dereg}
    plain = access
    if plain is None:
        plain = REMOTE_READ if op == "write" else LOCAL_WRITE | REMOTE_WRITE
    if len(places) <= MANY:
        row["plain_reg_ns"], row["plain_dereg_ns"] = _plain.register(pd, memory, places, plain, rounds)
        row["ratio"] = round((row["reg_ns"] + row["dereg_ns"]) / (row["plain_reg_ns"] + row["plain_dereg_ns"]), 3)
    return row


def _threaded(measure: Callable[[], tuple[int, int]], threads: int) -> tuple[int, int]:
    """The same from several threads at once: medians over them."""
    got: list[tuple[int, int]] = []
    wrong: list[BaseException] = []

    def one() -> None:
        try:
            got.append(measure())
        except BaseException as e:
            wrong.append(e)

    running = [threading.Thread(target=one) for _ in range(threads)]
    for t in running:
        t.start()
    for t in running:
        t.join()
    if wrong:
        raise wrong[0]
    return int(statistics.median(r for r, _ in got)), int(statistics.median(d for _, d in got))


def rows(
    backend: str, every: Sequence[Case], methods: Sequence[str], *, op: str = "read", access: int | None = None,
    threads: int = 1, device: str | None = None, progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per case and method, as it is measured; a row that cannot be has its reason under ``error``."""
    jobs = [(c, m) for c in every for m in methods]
    pd = None
    if backend == "verbs":
        from dmapath.verbs import Context, Pd

        pd = Pd(Context(device))
    for i, (case, method) in enumerate(jobs):
        progress(i, len(jobs))
        row: dict[str, Any] = {"backend": backend, "method": method, **asdict(case), "access": access, "threads": threads,
                               "error": None}  # fmt: skip
        try:
            if pd is not None:
                row |= _verbs_row(pd, case, method, op, access, threads)
            elif method == "cache":
                raise DmaError("the simulated IOMMU registers nothing, and so has nothing to keep")
            else:
                row |= _sim_row(case, method, op)
            total = row["reg_ns"] + row["dereg_ns"]
            row["ns_per_page"] = round(total / -(-case.size // PAGE), 1)
            row["ns_per_byte"] = round(total / case.size, 4)
        except DmaError as e:
            row["error"] = str(e)
        yield row
    progress(len(jobs), len(jobs))


def json_object(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that ``--json`` writes."""
    return {"version": 1, "rows": table}
