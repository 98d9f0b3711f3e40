"""What real RDMA costs through dmapath, beside plain C, pyverbs and perftest in the same run. Run by scripts/bench --verbs.

It runs in a guest whose clock counts instructions (QEMU's -icount): 1 ns is one instruction, and call costs repeat.
Throughput does not: soft-RoCE's kernel threads and the poller take turns, so bandwidths are interleaved medians with their
spread.
"""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dmapath import Bio, Device, PhysMemory, _bench
from dmapath.verbs import LOCAL_WRITE, REMOTE_ALL, REMOTE_WRITE, Batch, Context, Mr, Pd, Qp, Verbs, _plain, loopback

PAGE = 4096
RIGHTS = LOCAL_WRITE | REMOTE_WRITE
console = Console(width=118, highlight=False, markup=False)


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text."""
    out = Table(title=title, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    return out


def median(call: Callable[[], float], rounds: int) -> float:
    """Of some calls, after one that does not count."""
    call()
    return statistics.median(call() for _ in range(rounds))


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call's nanoseconds instead of its result."""

    def run() -> float:
        start = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - start

    return run


def registration(pd: Pd) -> None:
    """Register and deregister, plain C and through the back end in turn; and what Python callers pay."""
    t = table("register and deregister, instructions (thousands)", "bytes", "plain C", "map_phys", "ratio", "request",
              "ratio", "linear", "ratio", "dev.map()", "Mr()", "pyverbs")  # fmt: skip
    from pyverbs.device import Context as TheirContext
    from pyverbs.mr import MR
    from pyverbs.pd import PD

    theirs = PD(TheirContext(name=pd.context.name))
    memory = PhysMemory(17 << 20)
    memoryview(memory)[:] = bytes(len(memory))
    with Mr(pd, memory, access=RIGHTS) as all_of_it:
        address = int(all_of_it.addr)
    for size, rounds in ((PAGE, 41), (64 << 10, 31), (1 << 20, 11), (16 << 20, 5)):
        for shift in (0, 100):
            bio = Bio.from_memory(memory, [(shift, size)], "read")
            with Verbs(pd, memory, mode="per-range") as a, Verbs(pd, memory, mode="linear") as b:
                devs = [Device(backend=x, memory=memory) for x in (a, b)]
                seen: list[list[float]] = [[], [], [], []]
                for _ in range(5):
                    seen[0].append(sum(_plain.register(pd, memory, [(shift, size)], RIGHTS, rounds)))
                    seen[1].append(sum(_bench.time_request(devs[0], bio, "none", rounds)))
                    for i, dev in enumerate(devs, 2):
                        seen[i].append(sum(_bench.time_request(dev, bio, "unified", rounds)))
                plain, *others = (statistics.median(s) for s in seen)

                def through_python(dev: Device = devs[1], bio: Bio = bio) -> None:
                    with dev.map(bio):
                        pass

                def long_lived(shift: int = shift, size: int = size) -> None:
                    Mr(pd, memory, shift, size, access=RIGHTS).dereg()

                view = address

                def pyverbs(at: int = view + shift, size: int = size) -> None:
                    MR(theirs, size, RIGHTS, address=at).close()

                python = [median(timed(f), rounds) for f in (through_python, long_lived, pyverbs)]
            ratios = [word for x in others for word in (f"{x / 1000:.1f}", f"{x / plain:.3f}")]
            t.add_row(f"{size >> 10}K{f' + {shift}' if shift else ''}", f"{plain / 1000:.1f}", *ratios,
                      *(f"{p / 1000:.1f}" for p in python))  # fmt: skip
    console.print(t)


def scattered(pd: Pd) -> None:
    """32 scattered pages: a key for each, or one."""
    memory = PhysMemory(64 * 2 * PAGE)
    memoryview(memory)[:] = bytes(len(memory))
    t = table("32 scattered pages, instructions (thousands)", "method", "map", "unmap", "both", "keys", "entries")
    for shift in (0, 512):
        for mode, cache in (("per-range", 0), ("linear", 0), ("linear", 1 << 22)):
            places = [(2 * PAGE * i + shift, PAGE) for i in range(31, -1, -1)]
            with Verbs(pd, memory, mode=mode, cache=cache) as verbs:  # type: ignore[arg-type]
                dev = Device(backend=verbs, memory=memory)
                bio = Bio.from_memory(memory, places, "read")
                reg, dereg = _bench.time_request(dev, bio, "unified", 21)
                with dev.map(bio) as m:
                    keys, entries = len({s.lkey for s in m}), len(m)
            name = f"{mode}{', cached' if cache else ''}, {'unaligned' if shift else 'aligned'}"
            t.add_row(
                name, f"{reg / 1000:.1f}", f"{dereg / 1000:.1f}", f"{(reg + dereg) / 1000:.1f}", str(keys), str(entries)
            )
    console.print(t)


def own_time() -> int:
    """Processor time of this thread: the device's kernel threads, which run in the midst of calls, are not in it."""
    return time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID)


def calls(pd: Pd) -> None:
    """Build, post and poll per RDMA WRITE, the device's own work left out by a pause before the poll."""
    look = median(lambda: -(own_time() - own_time()), 31)  # what a look at the clock adds
    pair = loopback(pd, max_send_wr=128)
    qp = pair[0]
    buf = bytearray(2 * PAGE)
    t = table(
        "per RDMA WRITE, instructions", "batch", "plain C", "dmapath", "ratio", "pyverbs, new requests", "of dmapath's"
    )
    with Mr(pd, buf, access=LOCAL_WRITE | REMOTE_ALL) as mr:
        for n in (1, 16, 64):
            where = {
                "addr": int(mr.addr),
                "lkey": mr.lkey,
                "remote_addr": int(mr.addr) + PAGE,
                "rkey": mr.rkey,
                "length": 64,
            }
            writer = _plain.Writer(qp, batch=n, **where)
            batch = Batch(n, **where)

            def plain(writer: _plain.Writer = writer) -> float:
                return sum(writer.parts(60_000_000)) - 3 * look

            def ours(batch: Batch = batch) -> float:
                start = own_time()
                want = qp.post_batch(batch)
                posted = own_time() - start
                time.sleep(0.06)
                start = own_time()
                qp.send_cq.drain(want)
                return posted + own_time() - start - 2 * look

            a, b = median(plain, 15) / n, median(ours, 15) / n
            c = _pyverbs_calls(pd, n) / n
            t.add_row(str(n), f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}", f"{c:.0f}", f"{c / b:.0f}")
    for each in pair:
        each.close()
    console.print(t)


def _pyverbs_calls(pd: Pd, n: int) -> float:
    """The same through pyverbs' own objects, made anew for each batch as its users do."""
    import pyverbs.enums as e
    from pyverbs.cq import CQ
    from pyverbs.device import Context as TheirContext
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.qp import QP, QPCap, QPInitAttr
    from pyverbs.wr import SGE, SendWR

    from dmapath.verbs import Cq

    ctx = TheirContext(name=pd.context.name)
    their_pd = PD(ctx)
    cq = CQ(ctx, 512)
    cap = QPCap(max_send_wr=128, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
    qps = [QP(their_pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=cap)) for _ in range(2)]
    mr = MR(their_pd, 2 * PAGE, LOCAL_WRITE | REMOTE_ALL)
    mine = Context(ctx)
    my_pd = Pd(their_pd, context=mine)
    my_cq = Cq(cq, context=mine)
    first, second = (Qp(my_pd, my_cq, of=q) for q in qps)
    first.connect(second.info)
    second.connect(first.info)

    def once() -> float:
        start = own_time()
        chain: list[Any] = []  # it keeps no reference from one to the next
        for i in range(n):
            sge = SGE(mr.buf, 64, mr.lkey)
            flags = e.IBV_SEND_SIGNALED  # all of them, as its own examples do
            wr = SendWR(wr_id=i, opcode=e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[sge], send_flags=flags)
            wr.set_wr_rdma(mr.rkey, mr.buf + PAGE)
            if chain:
                chain[-1].next_wr = wr
            chain.append(wr)
        qps[0].post_send(chain[0])
        spent = own_time() - start
        time.sleep(0.06)
        start = own_time()
        got = 0
        while got < n:
            got += cq.poll(n - got)[0]
        return spent + own_time() - start

    out = median(once, 7)
    first.close()
    second.close()
    ctx.close()
    return out


def bandwidth(pd: Pd) -> None:
    """RDMA WRITE throughput: plain C, dmapath and ib_write_bw in turn."""
    pair = loopback(pd, max_send_wr=128)
    buf = bytearray(2 << 20)
    t = table("RDMA WRITE, MB per second of the guest's clock: medians (least to most)", "bytes", "plain C", "dmapath",
              "of C", "ib_write_bw", "dmapath of it")  # fmt: skip
    with Mr(pd, buf, access=LOCAL_WRITE | REMOTE_ALL) as mr:
        for size, n in ((PAGE, 64), (64 << 10, 32), (1 << 20, 8)):
            where = {"addr": int(mr.addr), "lkey": mr.lkey, "remote_addr": int(mr.addr) + (1 << 20), "rkey": mr.rkey,
                     "length": size}  # fmt: skip
            writer, batch = _plain.Writer(pair[0], batch=n, **where), Batch(n, **where)
            a: list[float] = []
            b: list[float] = []
            c: list[float] = []
            for k in range(9):
                a.append(size * n * 1000 / writer.run())
                b.append(size * n * 1000 / timed(lambda batch=batch: pair[0].run(batch))())  # type: ignore[misc]
                if k % 3 == 0:
                    c += _perftest(pd, size, 4 * n)
            ratio = statistics.median(b) / statistics.median(a)
            row = [f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" if x else "none" for x in (a, b, c)]
            beside = f"{statistics.median(b) / statistics.median(c):.2f}" if c else "-"
            t.add_row(f"{size >> 10}K", row[0], row[1], f"{ratio:.3f}", row[2], beside)
    for each in pair:
        each.close()
    console.print(t)


def _perftest(pd: Pd, size: int, rounds: int) -> list[float]:
    """What ib_write_bw says, in MB (10**6) per second; nothing where it did not finish (it prints 0.00 at times)."""
    words = ["ib_write_bw", "-d", pd.context.name, "-x", str(pd.context.gid_index()), "-s", str(size), "-n",
             str(max(rounds, 5)), "-F", "--report_gbits"]  # fmt: skip
    try:
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                for _ in range(200):  # until it listens, on its port 18515
                    if re.search(
                        r":4853 0{8,32}:0000 0A", Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
                    ):
                        break
                    time.sleep(0.05)
                done = subprocess.run([*words, "10.10.0.1"], capture_output=True, text=True, timeout=120, check=False)
            finally:
                server.kill()
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(rf"^\s*{size}\s+\d+\s+[\d.]+\s+([\d.]+)", done.stdout, re.M)
    return [float(x) * 1000 / 8 for x in found if float(x)]


def main() -> None:
    """Everything."""
    console.print(
        f"soft-RoCE, Linux {platform.release()}, Python {platform.python_version()}; 1 ns of this clock is 1 instruction\n"
    )
    with Context() as ctx, Pd(ctx) as pd:
        registration(pd)
        scattered(pd)
        calls(pd)
        bandwidth(pd)


if __name__ == "__main__":
    main()
