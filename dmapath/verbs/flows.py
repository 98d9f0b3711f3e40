"""``dmapath compare --backend verbs``: one driver flow on the real device, aligned and unaligned, by every way to
register.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from dmapath.bio import Bio
from dmapath.device import Device, Mapping
from dmapath.memory import PhysMemory
from dmapath.rdma import REMOTE_ALL, cut, entries_of
from dmapath.verbs.backend import Verbs
from dmapath.verbs.queue import Qp, loopback
from dmapath.verbs.resources import Context, Mr, Pd

__all__ = ["METHODS", "flow", "rows", "sentences"]

PAGE = 4096
RANGES = (1, 8, 32, 128)
ALIGNMENTS = (("aligned", 0), ("unaligned", 512))
METHODS: dict[str, dict[str, Any]] = {
    "direct": {"mode": "direct"}, "per-range": {"mode": "per-range"}, "linear": {"mode": "linear"},
    "linear, cache": {"mode": "linear", "cache": 1 << 24},
}  # fmt: skip
ROUNDS = 5


def flow(dev: Device, request: Bio, move: Callable[[Mapping], None]) -> tuple[int, int, int, Mapping]:
    """The whole driver, the same whatever the memory and the method: map, hand the segments to the hardware, unmap. ns of
    each.
    """
    t0 = time.perf_counter_ns()
    mapping = dev.map(request)
    t1 = time.perf_counter_ns()
    try:
        move(mapping)
    finally:
        t2 = time.perf_counter_ns()
        mapping.unmap()
    return t1 - t0, t2 - t1, time.perf_counter_ns() - t2, mapping


def _row(pd: Pd, qp: Qp, far: Mr, peer: bytearray, n: int, alignment: str, method: str) -> dict[str, Any]:
    memory = PhysMemory(3 * PAGE * n + 2 * PAGE, layout="contiguous")
    shift = dict(ALIGNMENTS)[alignment]
    # every third page from the top down: neither adjacent nor in order
    places = [(3 * PAGE * (n - 1 - i) + shift, PAGE) for i in range(n)]
    view, total = memoryview(memory), PAGE * n
    good, times, sizes = True, [], (0, 0, 0, 0)
    with Verbs(pd, memory, **METHODS[method]) as verbs:
        dev = Device(backend=verbs, memory=memory)
        for _ in range(ROUNDS):
            for a, k in places:
                view[a : a + k] = os.urandom(k)
            before = dev.counters()["registrations"]
            want = b"".join(bytes(view[a : a + k]) for a, k in places)
            out = flow(dev, Bio.from_memory(memory, places, "write"), lambda m: qp.write(m, far.addr, far.rkey))
            made = dev.counters()["registrations"] - before
            good &= peer[:total] == want  # at the remote side
            peer[:total] = data = os.urandom(total)
            into = flow(dev, Bio.from_memory(memory, places, "read"), lambda m: qp.read(m, far.addr, far.rkey))
            good &= b"".join(bytes(view[a : a + k]) for a, k in places) == data
            groups = cut(entries_of(out[3].segments), qp.max_sge, pd.context.attr["max_msg_sz"])
            sizes = (made, len({s.lkey for s in out[3].segments}), sum(len(g) for g in groups), len(groups))
            times.append((out[0], out[1], into[1], out[2]))
    middle = [sorted(column)[ROUNDS // 2] for column in zip(*times, strict=True)]
    return {
        "ranges": n, "bytes": total, "alignment": alignment, "method": method, "layout": out[3].layout, "case": out[3].case,
        **dict(zip(("registrations", "keys", "sges", "work_requests"), sizes, strict=True)),
        **dict(zip(("map_ns", "write_ns", "read_ns", "unmap_ns"), middle, strict=True)), "verified": bool(good),
    }  # fmt: skip


def rows(progress: Callable[[int, int], None] = lambda done, of: None, device: str | None = None) -> list[dict[str, Any]]:
    """One row per number of ranges, alignment and method; medians of some rounds, the last of which is counted."""
    jobs = [(n, a, m) for n in RANGES for a, _ in ALIGNMENTS for m in METHODS]
    out = []
    peer = bytearray(PAGE * max(RANGES))
    with Context(device) as context, Pd(context) as pd, Mr(pd, peer, access=1 | REMOTE_ALL) as far:
        first, second = loopback(pd)
        for i, job in enumerate(jobs):
            progress(i, len(jobs))
            out.append(_row(pd, first, far, peer, *job))
        first.close()
        second.close()
    progress(len(jobs), len(jobs))
    return out


def sentences(table: list[dict[str, Any]]) -> list[str]:
    """What the figures say, computed from them."""

    def pick(method: str, alignment: str) -> dict[str, Any]:
        return next(r for r in table if (r["ranges"], r["method"], r["alignment"]) == (32, method, alignment))

    one, each = pick("linear", "unaligned"), pick("per-range", "unaligned")
    cost = {r["method"]: r["map_ns"] + r["unmap_ns"] for r in (one, each)}
    aligned = pick("linear", "aligned")
    bad = [r for r in table if not r["verified"]]
    return [
        f"32 unaligned ranges: range by range takes {each['registrations']} registrations and {each['keys']} keys, linear "
        f"{one['registrations']} and {one['keys']}, in {cost['linear'] / cost['per-range']:.2f} of the time. "
        f"Aligned, the same flow of calls gives {aligned['sges']} entry for the work request, unaligned {one['sges']}.",
        "Every byte arrived, at the remote side and back." if not bad else f"DATA MISMATCH in {len(bad)} rows: {bad[0]}",
    ]
