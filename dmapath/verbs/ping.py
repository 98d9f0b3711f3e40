"""Two sides over a real network, as rdma-core's ibv_rc_pingpong: map through the wrapper, write, read, compare.

The side that is given no host waits for the other; both run the same requests at each other and check every byte.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dmapath.bio import Bio
from dmapath.device import Device, Segment
from dmapath.errors import DmaValueError
from dmapath.memory import PhysMemory
from dmapath.verbs.backend import Verbs
from dmapath.verbs.exchange import accept, dial, meet, tell
from dmapath.verbs.queue import Qp
from dmapath.verbs.resources import Context, Pd

__all__ = ["Report", "ping"]

PAGE = 4096


@dataclass(frozen=True)
class Report:
    """What was moved: rounds, bytes each way, ns of each round in the median, whether every byte was right."""

    rounds: int
    bytes: int
    round_ns: int
    layout: str
    segments: int
    verified: bool


def _pattern(side: int, step: int, n: int) -> bytes:
    return random.Random(f"{side} {step}").randbytes(n)


def ping(
    host: str | None = None, *, port: int = 18515, device: str | None = None, size: int = 65536, rounds: int = 20,
    align: int = 0, mode: Literal["linear", "per-range", "direct"] = "linear", timeout: float = 60.0,
) -> Report:  # fmt: skip
    """Meet the other side and exchange ``rounds`` times ``size`` bytes from scattered pages, ``align`` bytes off page
    starts.

    Each round both sides write into the other's memory and read the other's own. Raises VerbsError or
    CompletionError as soon as something fails.
    """
    pages = -(-size // PAGE)
    memory = PhysMemory(8 * (pages + 1) * PAGE, layout="scattered", seed=1)
    view = memoryview(memory)
    # every other page from the top down, for what goes out; what comes in is one range
    out = [(2 * PAGE * i + align, min(PAGE, size - k * PAGE)) for k, i in enumerate(range(pages - 1, -1, -1))]
    half = 4 * (pages + 1) * PAGE
    sock = accept(port, timeout=timeout) if host is None else dial(host, port, timeout=timeout)
    side = 0 if host is None else 1
    with sock, Context(device) as context, Pd(context) as pd, Verbs(pd, memory, mode=mode) as verbs, Qp(pd) as qp:
        dev = Device(backend=verbs, memory=memory)
        incoming = dev.map(Bio.from_memory(memory, [(half, size)], "read"))
        exposed = dev.map(Bio.from_memory(memory, out, "write"))
        near, far = list(exposed.segments), list(incoming.segments)
        theirs = meet(sock, qp, {
            "in": [(int(s.addr), s.length, s.rkey) for s in far], "out": [(int(s.addr), s.length, s.rkey) for s in near],
            "size": size, "rounds": rounds,
        })  # fmt: skip
        if (theirs["size"], theirs["rounds"]) != (size, rounds):
            raise DmaValueError(
                f"as the other side has it: {theirs['rounds']} rounds of {theirs['size']} bytes", argument="size", value=size
            )
        times, good = [], True
        for step in range(rounds):
            at = 0
            data = _pattern(side, step, size)
            for a, n in out:
                view[a : a + n] = data[at : at + n]
                at += n
            tell(sock, {"step": step})  # both have written their own memory
            start = time.perf_counter_ns()
            _move("write", qp, near, theirs["in"])
            times.append(time.perf_counter_ns() - start)
            tell(sock, {"written": step})
            want = _pattern(1 - side, step, size)
            good &= bytes(view[half : half + size]) == want
            view[half : half + size] = bytes(size)
            _move("read", qp, far, theirs["out"])
            good &= bytes(view[half : half + size]) == want
            tell(sock, {"read": step})
        exposed.unmap()
        incoming.unmap()
    return Report(rounds, size, sorted(times)[rounds // 2], exposed.layout, len(near), good)


def _move(opcode: str, qp: Qp, near: Sequence[Segment], remote: Sequence[tuple[int, int, int]]) -> None:
    """RDMA WRITE or READ between local segments and remote ranges (address, bytes, rkey) of as many bytes, in order."""
    left = [[int(s.addr), s.length, s.lkey] for s in reversed(near)]
    for addr, n, rkey in remote:
        mine, need = [], n
        while need:
            entry = left[-1]
            part = min(need, entry[1])
            mine.append((entry[0], part, entry[2]))
            entry[0], entry[1], need = entry[0] + part, entry[1] - part, need - part
            if not entry[1]:
                left.pop()
        qp.wait(qp.post(opcode, mine, addr, rkey))
