"""rblk, unchanged, on real RDMA: the verbs rows of the matrix; and the pytest plug-in on a real device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmapath import Bio, CompletionError, matrix
from dmapath.rdma import STATUS

HERE = Path(__file__).parent
SRC = Path(os.environ.get("DMAPATH_SRC", HERE.parent.parent))


def test_every_cell_moved_every_byte_and_left_nothing() -> None:
    rows = matrix.rows(["verbs"])
    assert [r for r in rows if not r["verified"] or r["leaks"]] == []
    assert {(r["driver"], r["registration"]) for r in rows} == {("rblk", name) for name in matrix.REGISTRATIONS}
    root = SRC if (SRC / "docs").exists() else HERE.parent.parent
    text = (root / "docs" / "matrix.md").read_text()
    for line in matrix.markdown(rows).splitlines():
        assert line in text, line


def test_a_failed_request_is_named_and_the_connection_recovers() -> None:
    rig = matrix.rblk_rig("verbs", "window")
    driver, m = rig.driver, rig.machine
    m.memory.write(m.slots[0], b"a" * 4096)
    good = driver.rkey
    driver.rkey ^= 0xFF00
    driver._recover = lambda: [qp.recover() for qp in (rig.peer, driver.qp)]
    io = driver.submit(Bio([(m.slots[0], 4096)], op="write"))
    with pytest.raises(CompletionError) as e:
        io.wait()
    assert e.value.status == STATUS["rem_access"]
    driver.rkey = good
    driver.run(Bio([(m.slots[0], 4096)], op="write"))
    assert bytes(rig.disk[:4096]) == b"a" * 4096
    assert rig.close() == 0


def test_the_plug_in_runs_a_users_test_on_a_real_device(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "import dmapath\n"
        "def test_it(dma_device, phys_memory):\n"
        "    phys_memory.write(phys_memory.phys(0x200), b'real')\n"
        "    bio = dmapath.Bio.from_memory(phys_memory, [(0x200, 4), (0x5000, 4096)], op='write')\n"
        "    with dma_device.map(bio) as m:\n"
        "        assert dmapath.DmaEngine(dma_device).read(m.segments)[:4] == b'real'\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "dmapath.pytest_plugin", "-v", "-p", "no:cacheprovider",
                           "--dma-backend", "verbs,direct", str(tmp_path)], text=True, capture_output=True,
                          check=False)  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "test_it[verbs] PASSED" in done.stdout
