"""Both drivers on every machine, with memory aligned, unaligned and mixed; and what shows that they are written once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmapath import (
    Bio,
    CompletionError,
    Device,
    DmaError,
    DmaValueError,
    FaultInjector,
    Request,
    StateError,
    machines,
    matrix,
)
from dmapath.drivers.rblk import Rblk
from dmapath.rdma import STATUS

HERE = Path(__file__).parent
SRC = Path(os.environ.get("DMAPATH_SRC", HERE.parent))
FIELDS = {"driver", "backend", "memory", "alignment", "op", "case", "layout", "verified", "leaks"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return matrix.rows(list(machines.MACHINES))


def test_every_cell_moved_every_byte_and_left_nothing(rows: list[dict[str, Any]]) -> None:
    assert [r for r in rows if not r["verified"] or r["leaks"]] == []
    seen = {(r["driver"], r["backend"], r["alignment"], r["op"]) for r in rows}
    assert len(seen) == 2 * len(machines.MACHINES) * 3 * 2
    assert all(set(r) >= FIELDS for r in rows)
    assert {r["registration"] for r in rows if r["driver"] == "rblk"} == set(matrix.REGISTRATIONS)


def test_the_cases_are_those_of_explain(rows: list[dict[str, Any]]) -> None:
    cases = {r["case"] for r in rows if r["driver"] == "nvme"}
    assert cases == {"direct", "iommu-aligned", "iommu-aligned-p2p", "swiotlb-multi", "iommu-unaligned"}
    for name in ("direct", "swiotlb", "iommu-strict", "iommu-lazy", "xen", "p2p"):
        m = machines.make(name)
        for alignment in matrix.ALIGNMENTS:
            told = m.device.explain(matrix.requests(m, alignment, "write")[-1])
            mine = {(r["case"], r["layout"]) for r in rows
                    if (r["driver"], r["backend"], r["alignment"]) == ("nvme", name, alignment)}  # fmt: skip
            assert mine == {(told.case, told.layout)}, (name, alignment)


def test_the_table_is_in_the_docs(rows: list[dict[str, Any]]) -> None:
    root = SRC if (SRC / "docs").exists() else HERE.parent
    text = (root / "docs" / "matrix.md").read_text()
    for line in matrix.markdown(rows).splitlines():
        assert line in text, line


FORBIDDEN = re.compile(
    r"\bif\b[^:\n]*(align|\boff(set)?\b|0xfff|\bPAGE\b|granule|iommu|swiotlb|xen|p2p|peer|bounce|bus_addr|backend|layout|kind|case|verbs|"
    r"coherent|merge_boundary|use_iova|need_unmap)", re.IGNORECASE)  # fmt: skip
WORDS = re.compile(
    r"\b(iommu|swiotlb|xen|p2p|bounce\w*|dma_use_iova|need_unmap|merge_boundary|is_bounced|sync_for_\w+)\b", re.IGNORECASE
)


@pytest.mark.parametrize("name", ["nvme.pyx", "rblk.py"])
def test_a_driver_asks_neither_alignment_nor_memory_nor_back_end(name: str) -> None:
    source = (SRC / "dmapath" / "drivers" / name).read_text()
    code = "\n".join(line.split("#")[0] for line in re.sub(r'"""(?:.|\n)*?"""', "", source).splitlines())
    assert not FORBIDDEN.search(code), FORBIDDEN.search(code)
    assert not WORDS.search(code), WORDS.search(code)
    imported = re.findall(r"^(?:from|cimport|import)\s+(dmapath[\w.]*)", code, re.M)
    assert not [m for m in imported if re.search(r"backends|verbs|iommu|swiotlb|xen|pci|devices", m)], imported


def test_the_grep_would_find_one() -> None:
    for line in ("    if addr & 0xfff:", "    if dev.iommu is not None:", "  x = 1 if layout == 2 else 0", "if off % PAGE:"):
        assert FORBIDDEN.search(line), line


@pytest.mark.parametrize("args", [["--backend", "direct"], ["--backend", "p2p", "--markdown"]])
def test_the_command(args: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "dmapath.cli", "matrix", *args], text=True, capture_output=True, check=True)
    assert "rblk, window" in done.stdout
    assert "WRONG" not in done.stdout
    assert ("nothing was left behind" in done.stdout) != ("--markdown" in args)


def test_the_command_as_json(tmp_path: Path) -> None:
    base = [sys.executable, "-m", "dmapath.cli", "matrix", "--backend", "iommu-lazy"]
    done = subprocess.run([*base, "--json", "-"], text=True, capture_output=True, check=True)
    data = json.loads(done.stdout)
    assert (data["version"], len(data["rows"])) == (1, 24)
    subprocess.run([*base, "--json", str(tmp_path / "rows.json")], capture_output=True, check=True)
    assert json.loads((tmp_path / "rows.json").read_text()) == data
    bad = subprocess.run([*base[:-1], "floppy"], text=True, capture_output=True, check=False)
    assert (bad.returncode, "one of direct" in bad.stderr) == (2, True)


# ---- rblk by itself


def test_rblk_keeps_requests_in_flight_and_splits_long_ones() -> None:
    rig = matrix.rblk_rig("iommu-strict", "window")
    driver: Rblk = rig.driver
    m = rig.machine
    for at in m.slots:
        m.memory.write(at, os.urandom(machines.SLOT))
    bios = [Bio([(at, machines.SLOT)], op="write", sector=32 * i) for i, at in enumerate(m.slots[:30])]
    io = driver.submit(bios)
    assert driver.in_flight == driver.queue_depth
    io.wait()
    assert bytes(rig.disk[: 30 * machines.SLOT]) == b"".join(m.memory.read(at, machines.SLOT) for at in m.slots[:30])
    driver.max_bytes = 8192
    long = Bio([(m.slots[0], machines.SLOT)], op="read")
    assert len(driver.run(long).commands) == 2
    merged = Request([Bio([(at, 512)], op="write", sector=i) for i, at in enumerate(m.slots[3:5])])
    driver.run(merged)
    assert bytes(rig.disk[:1024]) == b"".join(m.memory.read(p, n) for p, n in merged.vecs)
    for wrong in (Bio([(m.slots[0], 100)]), Bio([(m.slots[0], 512)], sector=matrix.DISK // 512), Bio([])):
        with pytest.raises(DmaValueError):
            driver.submit(wrong)
    assert rig.close() == 0
    with pytest.raises(StateError, match="closed"):
        driver.submit(long)


def test_rblk_tries_again_what_nobody_answered_and_reports_the_rest() -> None:
    rig = matrix.rblk_rig("direct", "request")
    driver, m = rig.driver, rig.machine
    near = driver.qp
    hca = near.pd.context.hca
    bios = [Bio([(at, 4096)], op="write", sector=8 * i) for i, at in enumerate(m.slots[:4])]
    calls = []

    def recover() -> None:
        calls.append(1)
        if len(calls) == 2:
            hca.connect(far)
        near.recover()

    far = rig.far
    driver._recover = recover
    hca.disconnect()
    io = driver.submit(bios)
    io.wait()
    assert not io.errors
    assert driver.counters()["recoveries"] == len(calls) == 2
    assert bytes(rig.disk[:16384]) == b"".join(m.memory.read(at, 4096) for at in m.slots[:4])
    driver.rkey ^= 1  # somebody took the region away
    io = driver.submit(bios[:2])
    with pytest.raises(CompletionError) as e:
        io.wait()
    assert e.value.status == STATUS["rem_access"]
    assert rig.close() == 0


@pytest.mark.parametrize("registration", list(matrix.REGISTRATIONS))
def test_every_failure_under_rblk_unwinds(registration: str) -> None:
    for nth in range(1, 40):
        rig = matrix.rblk_rig("iommu-strict", registration)
        m, driver = rig.machine, rig.driver
        bio = matrix.requests(m, "mixed", "write")[0]
        device: Device = m.device
        faults = device.attach(FaultInjector(None, nth))
        with contextlib.suppress(DmaError):
            driver.run(bio)
        fired = faults.left == 0
        device.detach(faults)
        driver.run(bio)
        assert bytes(rig.disk[: bio.total]) == b"".join(m.memory.read(p, n) for p, n in bio.vecs)
        assert rig.close() == 0
        if not fired:
            return
    raise AssertionError("it makes fewer calls than that")
