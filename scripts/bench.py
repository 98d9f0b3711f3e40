"""What the hot paths cost. Run by scripts/bench.

Instructions are callgrind's, per operation: the difference of a long and a short run, so that start-up cancels out. The
peer of each is Linux 7.3.4's own C code compiled in user space with gcc 12 -O2, measured apart, one thread, no locks;
ours takes its real locks (per-CPU cache, IOTLB) and counts every event. The IOTLB is empty in both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_nvme import nvme
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dmapath
from dmapath import Bio, Device, DmaEngine, Iommu, MemoryRegion, PhysMemory, Swiotlb, _bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
PAGE = 4096

Spec = tuple[str, int, int, int, str]
#: name -> (operation, ranges, offset, bytes of each, policy), Linux's instructions
OPERATIONS: dict[str, tuple[Spec, int | None]] = {
    "IOVA alloc+free, 1 page (cache)": (("iova", 1, 0, 1, ""), 88),
    "IOVA alloc+free, 8 pages (cache)": (("iova", 1, 0, 8, ""), 106),
    "IOVA alloc+free, 32 pages (cache)": (("iova", 1, 0, 32, ""), 99),
    "IOVA alloc+free, 64 pages (tree)": (("iova", 1, 0, 64, ""), 305),
    "two-step, 1 link": (("two-step", 1, 0, PAGE, ""), 1104),
    "two-step, 8 links": (("two-step", 8, 0, PAGE, ""), 3684),
    "two-step, 32 links": (("two-step", 32, 0, PAGE, ""), 12461),
    "two-step, 8 links as one vector": (("two-step-vec", 8, 0, PAGE, ""), 3684),
    "two-step, 32 links as one vector": (("two-step-vec", 32, 0, PAGE, ""), 12461),
    "classic map+unmap, 1": (("classic", 1, 0, PAGE, ""), 1260),
    "classic map+unmap, 32": (("classic", 32, 0, PAGE, ""), 40103),
    "swiotlb map+unmap, 512 bytes, one copy": (("bounce", 1, 0, 512, ""), 2152),
    "swiotlb map+unmap, 4 KiB, one copy": (("bounce", 1, 0, PAGE, ""), 2530),
    "request, 32 bvecs aligned, unified": (("request", 32, 0, PAGE, "unified"), 15996),
    "request, 32 bvecs unaligned, unified": (("request", 32, 0x200, 0x600, "unified"), 44963),
    "request, 32 bvecs of 2 pages, unified": (("request", 32, 0x200, PAGE, "unified"), None),
    "request, 32 bvecs aligned, linux": (("request", 32, 0, PAGE, "linux"), 15996),
    "request, 32 bvecs unaligned, linux": (("request", 32, 0x200, 0x600, "linux"), 44963),
}


def stripes(n: int, offset: int, length: int) -> Bio:
    """N ranges, three pages apart and from the top down: scattered, none adjacent."""
    return Bio.from_phys([(0x100000 + 3 * (n - i) * PAGE + offset, length) for i in range(n)], op="write")


def run(op: str, n: int, offset: int, length: int, policy: str, rounds: int) -> float:
    """Ns per operation."""
    dev = Device(iommu=Iommu())
    if op == "iova":
        dev.backend.alloc_free_loop(length, 2)
        start = time.perf_counter_ns()
        dev.backend.alloc_free_loop(length, rounds)
        return (time.perf_counter_ns() - start) / rounds
    bio = stripes(n, offset, length)
    if op == "bounce":
        memory = PhysMemory(1 << 20, base=0x100000)
        dev = Device(memory=memory, swiotlb=Swiotlb(memory, slots=512, force=True), min_align_mask=0xFFF)
        op = "classic"
    _bench.run(op, dev, bio, 2, policy or "unified")
    return _bench.run(op, dev, bio, rounds, policy or "unified")


def instructions(spec: Spec) -> int | None:
    """Per operation, by callgrind; None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    loop = "alloc_free_loop" if spec[0] == "iova" else "_bench*run"
    seen = []
    for rounds in (100, 1100):
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no",
             f"--toggle-collect=__pyx_pw_*{loop}*",
             sys.executable, __file__, "--once", *map(str, spec), str(rounds)],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        seen.append(int(re.findall(r"Collected : (\d+)", done.stderr)[-1]))
    return round((seen[1] - seen[0]) / 1000)


def hot_paths(console: Console) -> None:
    """The table of operations."""
    table = Table(title="per operation, strict IOMMU", title_justify="left", pad_edge=False)
    for name in ("operation", "ns here", "instructions", "Linux", "ratio"):
        table.add_column(name, justify="left" if name == "operation" else "right", no_wrap=True)
    for name, (spec, linux) in track(OPERATIONS.items(), console=Console(stderr=True), transient=True):
        ns = min(run(*spec, 20000) for _ in range(5))
        ir = instructions(spec)
        ratio = f"{ir / linux:.2f}" if ir and linux else ""
        table.add_row(name, f"{ns:.0f}", str(ir or "-"), str(linux or "-"), ratio)
    console.print(table)
    if shutil.which("valgrind") is None:
        console.print("no instruction counts: valgrind is missing (apt-get install valgrind)")


def large_regions(console: Console) -> None:
    """1 GiB of scattered pages, of 2 MiB pages, and 1 TiB of 1 GiB pages."""
    table = Table(title="large regions", title_justify="left", pad_edge=False)
    for name in ("region", "map us", "ns per page", "page table, bytes per page"):
        table.add_column(name, justify="left" if name == "region" else "right", no_wrap=True)
    regions = (("1 GiB of scattered 4 KiB pages", PAGE, 1 << 18), ("1 GiB of scattered 2 MiB pages", 2 << 20, 512),
               ("1 TiB of 1 GiB pages", 1 << 30, 1024))  # fmt: skip
    for name, page, count in regions:
        step = page if page == 1 << 30 else 2 * page
        region = MemoryRegion([((1 << 40) + i * step, page) for i in range(count)], length=page * count)
        dev = Device(iommu=Iommu(), forcedac=True, dma_mask=2**52 - 1)
        best = min(_bench.time_request(dev, region, "unified", 3)[0] for _ in range(3))
        with dev.map(region):
            memory = dev.backend.stats()["page_table_bytes"] / count
        table.add_row(name, f"{best / 1000:.1f}", f"{best / count:.1f}", f"{memory:.3f}")
    console.print(table)


def python_level(console: Console) -> None:
    """``with dev.map(bio)`` of 32 ranges, iterated, against the reference model."""
    import model

    dev, ref = Device(iommu=Iommu()), model.Device()
    for name, bio in (("aligned", stripes(32, 0, PAGE)), ("unaligned", stripes(32, 0x200, 0x600))):
        vecs = [(int(p), n) for p, n in bio.vecs]

        def ours(bio: Bio = bio) -> None:
            with dev.map(bio) as m:
                for _ in m:
                    pass

        def plain(vecs: list[tuple[int, int]] = vecs) -> None:
            m = ref.map(vecs, "unified")
            for _ in m.segments:
                pass
            m.unmap()

        a, b = best_of(ours, 2000), best_of(plain, 20)
        console.print(f"with dev.map(bio) of 32 {name} ranges, iterated: {a / 1000:.2f} us, "
                      f"{b / a:.0f} times as fast as the plain-Python model ({b / 1000:.0f} us)")  # fmt: skip


def best_of(call: object, rounds: int) -> float:
    """Ns per call, the best of seven runs."""
    assert callable(call)
    out = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(rounds):
            call()
        out.append((time.perf_counter_ns() - start) / rounds)
    return min(out)


def engine(console: Console) -> None:
    """128 KiB in 32 scattered pages, by DMA and by memcpy, interleaved."""
    memory = PhysMemory(1 << 20, layout="scattered", seed=1)
    dev = Device(iommu=Iommu(), memory=memory)
    pages = [(i * 3 % 256 * PAGE, PAGE) for i in range(32)]
    with dev.map(Bio.from_memory(memory, pages, "write")) as m:
        DmaEngine(dev).read(m.segments)
        runs = [_bench.dma_against_memcpy(dev, m.segments, pages, 2000) for _ in range(15)]
    dma, copy = (sorted(r[i] for r in runs) for i in range(2))
    ratios = sorted(b / a for a, b in runs)
    console.print(
        f"DMA read of 128 KiB in 32 scattered pages: {dma[7]} ns, {ratios[7]:.2f} of memcpy's speed over the same pages "
        f"({copy[7]} ns); medians of 15 interleaved runs, ratios {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


def bounce(console: Console) -> None:
    """Mapping and unmapping through a pool, against memcpy of the same bytes."""
    memory = PhysMemory(1 << 20)
    dev = Device(memory=memory, swiotlb=Swiotlb(memory, slots=512, force=True), min_align_mask=0xFFF)
    words = []
    for kib in (4, 16, 64, 128):
        ratios = sorted(b / a for a, b in (_bench.bounce_against_memcpy(dev, 0, kib << 10, 300) for _ in range(9)))
        words.append(f"{kib} KiB {ratios[4]:.2f}")
    console.print(f"swiotlb map+unmap, one copy, of memcpy's speed over the same bytes: {', '.join(words)} (medians of 9)")


def main() -> None:
    """Everything, or one operation for callgrind."""
    if sys.argv[1:2] == ["--once"]:
        op, n, offset, length, policy, rounds = sys.argv[2:]
        run(op, int(n), int(offset), int(length), policy, int(rounds))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(f"dmapath {dmapath.__version__}, Python {sys.version.split()[0]}\n")
    hot_paths(console)
    large_regions(console)
    python_level(console)
    engine(console)
    bounce(console)
    nvme(console)


if __name__ == "__main__":
    main()
