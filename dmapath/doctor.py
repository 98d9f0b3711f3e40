"""What this machine has for the real thing: RDMA devices and what they can, pyverbs, memlock, huge pages, IOMMU, guests; and
what to do about what is not there.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dmapath.guest import KERNELS, cache_dir, find_kernel, missing_packages
from dmapath.guest.vm import kvm_usable

__all__ = ["Finding", "examine"]


class Finding(NamedTuple):
    """One thing that was looked at: what, how it is, and what to do ("": nothing)."""

    what: str
    state: str
    advice: str


def _verbs() -> Iterator[Finding]:
    try:
        from dmapath.verbs import FEATURES, Context, Pd, devices, self_test
        from dmapath.verbs.bridge import pyverbs_problem
    except ImportError as e:
        yield Finding("libibverbs", "missing", str(e))
        return
    problem = pyverbs_problem()
    yield Finding("pyverbs", "usable" if problem is None else "not usable", problem or "")
    names = devices()
    if not names:
        yield Finding("RDMA devices", "none", "dmapath guest run --rxe -- CMD has soft-RoCE; or, with the module rdma_rxe: "
                      "rdma link add rxe0 type rxe netdev DEV")  # fmt: skip
    for name in names:
        with Context(name) as ctx, Pd(ctx) as pd:
            attr = ctx.attr
            yield Finding(f"device {name}", f"{'soft-RoCE' if ctx.is_rxe else 'hardware'}, path MTU {attr['mtu']}, "
                          f"{attr['max_sge']} entries in a work request, messages to {attr['max_msg_sz']} bytes, "
                          f"port {'active' if attr['port_state'] == 4 else 'down'}",
                          "" if attr["port_state"] == 4 else "bring the port or its network interface up")  # fmt: skip
            gids = ", ".join(f"{i}: {_gid(gid)}" for i, gid in ctx.gids())
            yield Finding(f"{name}, GIDs", gids or "none", "" if gids else "give its network interface an address")
            yield Finding(f"{name}, on-demand paging", "claimed" if attr["odp"] else "not claimed", "")
            if attr["port_state"] != 4:
                continue
            for feature in FEATURES:
                found = self_test(pd, feature)
                yield Finding(f"{name}, self-test of {feature}", "passed" if found is None else "failed", found or "")


def _gid(gid: bytes) -> str:
    if gid[:12] == bytes(10) + b"\xff\xff":
        return ".".join(str(b) for b in gid[12:])
    return re.sub(r"(:0{1,4})+", ":", ":".join(gid[i : i + 2].hex() for i in range(0, 16, 2)), count=1)


def _memory() -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    root = os.geteuid() == 0
    small = limit != resource.RLIM_INFINITY and limit < 64 << 20 and not root
    words = "none" if limit == resource.RLIM_INFINITY else f"{limit} bytes{' (root is free of it)' if root else ''}"
    yield Finding("memlock limit", words,
                  "raise it for what is to be registered: ulimit -l, or limits.conf" if small else "")  # fmt: skip
    info = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.M))
    huge = int(info.get("HugePages_Total", 0))
    yield Finding("huge pages", f"{huge} of {int(info.get('Hugepagesize', 0))} KiB, {info.get('HugePages_Free', 0)} free",
                  "" if huge else "for PhysMemory(backing='2m'): sysctl vm.nr_hugepages=N")  # fmt: skip


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    version = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    yield Finding("kernel", f"{release}, {'with' if version >= (6, 16) else 'without'} the two-step DMA API (6.16)", "")
    groups = Path("/sys/kernel/iommu_groups")
    count = len(list(groups.iterdir())) if groups.is_dir() else 0
    yield Finding("IOMMU", f"{count} groups" if count else "none in use",
                  "" if count else "dmapath guest run --iommu strict has an emulated one")  # fmt: skip


def _guests() -> Iterator[Finding]:
    lacking = missing_packages()
    yield Finding("guests", "ready" if not lacking else f"missing: {', '.join(lacking)}",
                  f"dmapath guest prepare, or apt-get install {' '.join(lacking)}" if lacking else "")  # fmt: skip
    for name in KERNELS:
        kept = find_kernel(name, missing_ok=True)
        yield Finding(f"guest kernel {name}", kept.release if kept else f"not in {cache_dir()}",
                      "" if kept else f"dmapath guest prepare --kernel {name}")  # fmt: skip
    yield Finding(
        "guest speed", "KVM" if kvm_usable() else "software emulation, about 20 times slower than this machine", ""
    )


def examine() -> list[Finding]:
    """Look at everything; opens each RDMA device and runs its self-tests."""
    return [*_verbs(), *_memory(), *_kernel(), *_guests()]
