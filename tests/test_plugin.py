"""The pytest plug-in, as a user of it sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dmapath import machines

PLUGIN = ("-p", "dmapath.pytest_plugin")  # named, so that an installed and a built-in-place dmapath are both found

THEIRS = """
import pytest
from dmapath import Bio, DmaEngine


def test_good(dma_device, phys_memory, dma_backend):
    phys_memory.write(phys_memory.phys(0x200), b"hello")
    with dma_device.map(Bio.from_memory(phys_memory, [(0x200, 5), (0x5000, 512)], op="write")) as m:
        assert DmaEngine(dma_device).read(m.segments)[:5] == b"hello"


@pytest.mark.dma_limits(virt_boundary=0xFFF, max_segments=7)
def test_limits(dma_device, dma_machine):
    assert (dma_device.virt_boundary, dma_device.max_segments) == (0xFFF, 7)
    assert len(dma_machine.slots) >= 64


def test_leak(dma_device, phys_memory):
    dma_device.map_phys(phys_memory.phys(0), 4096, "to_device")


def test_fault(dma_device, phys_memory):
    addr = dma_device.map_phys(phys_memory.phys(0), 4096, "to_device")
    dma_device.unmap_phys(addr, 4096, "to_device")
    DmaEngine(dma_device).read([(addr, 16)])


def test_misuse(dma_device, phys_memory):
    addr = dma_device.map_phys(phys_memory.phys(0), 4096, "to_device")
    dma_device.unmap_phys(addr, 4096, "from_device")
"""


def run(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    return subprocess.run([sys.executable, "-m", "pytest", *PLUGIN, "-p", "no:cacheprovider", *args, "test_theirs.py"],
                          cwd=tmp_path, text=True, capture_output=True, check=False)  # fmt: skip


def test_a_test_runs_on_every_back_end(tmp_path: Path) -> None:
    done = run(tmp_path, "-v", "-k", "good or limits")
    assert done.returncode == 0, done.stdout
    for name in machines.MACHINES:
        assert f"test_good[{name}] PASSED" in done.stdout
        assert f"test_limits[{name}] PASSED" in done.stdout


def test_back_ends_are_chosen(tmp_path: Path) -> None:
    done = run(tmp_path, "-v", "-k", "good", "--dma-backend", "xen,iommu-lazy")
    assert "2 passed" in done.stdout
    done = run(tmp_path, "--dma-backend", "floppy")
    assert done.returncode != 0
    assert "one of" in done.stderr + done.stdout or "all, or of direct" in done.stderr + done.stdout
    assert "--dma-backend" in run(tmp_path, "--help").stdout
    assert "dma_limits(**limits)" in run(tmp_path, "--markers").stdout


def test_verbs_without_a_device_says_how_to_get_one(tmp_path: Path) -> None:
    try:
        from dmapath.verbs import devices
    except ImportError:
        pass
    else:
        if devices():
            pytest.skip("this machine has an RDMA device; without one the test would be skipped with a reason")
    done = run(tmp_path, "-rs", "-k", "good", "--dma-backend", "verbs")
    assert "dmapath guest run --rxe" in done.stdout


def test_leaks_and_misuse_fail_and_say_where(tmp_path: Path) -> None:
    done = run(tmp_path, "-k", "leak or misuse", "--dma-backend", "iommu-strict")
    assert done.returncode == 1
    assert "the driver left mappings behind: 1 mappings are left" in done.stdout
    assert "in test_leak) [leak]" in done.stdout
    assert "left behind: mapped_bytes 4096" in done.stdout
    assert "[unmap-direction]" in done.stdout
    quiet = run(tmp_path, "-k", "misuse", "--dma-backend", "iommu-strict", "--no-dma-debug")
    assert "1 passed" in quiet.stdout
    leak = run(tmp_path, "-k", "leak", "--dma-backend", "direct,adversarial", "--no-dma-debug")
    assert "left behind: bounces_live 1" in leak.stdout


def test_a_fault_is_shown_with_the_history_of_its_mapping(tmp_path: Path) -> None:
    done = run(tmp_path, "-k", "fault", "--dma-backend", "iommu-strict")
    assert "faults of dma_device" in done.stdout
    text = done.stdout[done.stdout.index("faults of dma_device") :]
    assert "read of 0xfffff000 refused, from" in text
    assert text.index("map_phys [0xfffff000, 0x100000000) of 0x100000000 to_device") < text.index("unmap_phys [0xfffff000,")
    assert "in test_fault" in text
