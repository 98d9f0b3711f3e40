"""What an I/O costs through the NVMe driver and the simulated controller. Run by scripts/bench.

Instructions are callgrind's, of the driver with its mapping and of the controller apart (the difference of a long and a
short run). The peer is what Linux 7.3.4's own mapping code takes for the same request, measured apart (as in bench.py) with
an empty IOTLB, as ours for that figure; in the driver's own figure the IOTLB is in use, and each unmap looks through it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dmapath import Bio, Device, Iommu, PhysMemory, _bench
from dmapath.devices.nvme import NvmeController
from dmapath.drivers.nvme import Nvme

PAGE = 4096
DEPTH, IOS = 32, 64
#: name -> (IOMMU, ranges, form), Linux's instructions to map and unmap that request: one page by the classic calls, 32 bvecs
#: by the block layer. Without an IOMMU Linux's calls are arithmetic and were not measured.
CASES: dict[str, tuple[tuple[str, int, str], int | None]] = {
    "4 KiB, no IOMMU, PRP": (("direct", 1, "prp"), None),
    "4 KiB, no IOMMU, SGL": (("direct", 1, "sgl"), None),
    "4 KiB, strict, PRP": (("strict", 1, "prp"), 1260),
    "4 KiB, strict, SGL": (("strict", 1, "sgl"), 1260),
    "128 KiB in 32 pages, no IOMMU, PRP": (("direct", 32, "prp"), None),
    "128 KiB in 32 pages, no IOMMU, SGL": (("direct", 32, "sgl"), None),
    "128 KiB in 32 pages, strict, PRP": (("strict", 32, "prp"), 15996),
    "128 KiB in 32 pages, strict, SGL": (("strict", 32, "sgl"), 15996),
}


def rig(iommu: str, ranges: int, form: Any) -> tuple[Nvme, list[Bio]]:
    """A driver, and reads over buffers of their own: every second page, from the top down."""
    memory = PhysMemory(2 * PAGE * ranges * IOS)
    controller = NvmeController(IOS * ranges * PAGE)
    device = Device(memory=memory, iommu=Iommu("strict") if iommu == "strict" else None, **controller.limits)
    controller.attach(device)
    driver = Nvme(controller, device, queue_depth=DEPTH, form=form)
    places = [[(2 * PAGE * (i * ranges + ranges - 1 - k), PAGE) for k in range(ranges)] for i in range(IOS)]
    return driver, [Bio.from_memory(memory, p, "read", sector=i * ranges * 8) for i, p in enumerate(places)]


def once(iommu: str, ranges: int, form: str, rounds: int) -> float:
    """Ns per I/O of ``rounds`` times the batch."""
    driver, bios = rig(iommu, ranges, form)
    io = driver.run(bios)
    start = time.perf_counter_ns()
    driver.repeat(io, rounds)
    spent = (time.perf_counter_ns() - start) / rounds / io.commands
    driver.close()
    return spent


def mapping_ns(iommu: str, ranges: int) -> float:
    """Ns to map one of the requests, read its segments and unmap it."""
    driver, bios = rig(iommu, ranges, "auto")
    return min(_bench.run("request", driver.device, bios[0], 2000) for _ in range(5))


def instructions(spec: tuple[str, int, str], part: str) -> float:
    """Per I/O: of the "driver" without the device, of the "device", or of "mapping" alone."""
    toggles = {
        "driver": ["*Nvme*repeat*", "nvme_work"],  # the second toggles off what the first turned on
        "device": ["nvme_work"],
        "mapping": ["*_bench*run*"],
    }[part]
    seen = []
    for rounds in (2, 22):
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no",
             *(f"--toggle-collect={'' if t == 'nvme_work' else '__pyx_pw_'}{t}" for t in toggles),
             sys.executable, __file__, part, *map(str, spec), str(rounds)],
            capture_output=True, text=True, check=True)  # fmt: skip
        seen.append(int(re.findall(r"Collected : (\d+)", done.stderr)[-1]))
    return (seen[1] - seen[0]) / 20 / (1 if part == "mapping" else IOS)


def nvme(console: Console) -> None:
    """The tables."""
    table = Table(
        title=f"per I/O through the NVMe driver, queue depth {DEPTH}, data moved", title_justify="left", pad_edge=False
    )
    for name in ("I/O", "ns", "thousand I/Os a second", "driver and mapping", "mapping", "Linux", "ratio", "controller",
                 "mapping's share of time"):  # fmt: skip
        table.add_column(name, justify="left" if name == "I/O" else "right", no_wrap=name in ("I/O", "ns"))
    counting = shutil.which("valgrind") is not None
    for name, (spec, linux) in track(CASES.items(), console=Console(stderr=True), transient=True):
        rounds = 400 if spec[1] == 1 else 40
        ns = min(once(*spec, rounds) for _ in range(5))
        share = f"{100 * mapping_ns(*spec[:2]) / ns:.0f} %"
        ir = {part: instructions(spec, part) for part in ("driver", "mapping", "device")} if counting else {}
        words = [f"{ir[part]:.0f}" if ir else "-" for part in ("driver", "mapping", "device")]
        ratio = f"{ir['mapping'] / linux:.2f}" if ir and linux else ""
        table.add_row(name, f"{ns:.0f}", f"{1e6 / ns:.0f}", *words[:2], str(linux or "-"), ratio, words[2], share)
    console.print(table)


def main() -> None:
    """One case for callgrind: PART IOMMU RANGES FORM ROUNDS."""
    part, iommu, ranges, form, rounds = sys.argv[1:]
    if part == "mapping":  # on a device of the same kind whose IOTLB is empty, as in the peer
        driver, bios = rig(iommu, int(ranges), form)
        device = driver.device.fresh()
        _bench.run("request", device, bios[0], 2)
        _bench.run("request", device, bios[0], int(rounds))
    else:
        once(iommu, int(ranges), form, int(rounds))


if __name__ == "__main__":
    main()
