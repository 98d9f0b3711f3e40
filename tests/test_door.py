"""The door for others: packages with a back end in C, a device in Python and a driver in Cython, built against this one as
their authors would build them, found by entry points, and run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmapath import DmaValueError, plugins

HERE = Path(__file__).parent
SAMPLES = ("backend_c", "device_py", "driver_cython")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the samples were installed to."""
    target = tmp_path_factory.mktemp("packages")
    for name in SAMPLES:
        source = tmp_path_factory.mktemp(name)
        for file in (HERE / "door" / name).iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target),
             "--upgrade", str(source)], text=True, capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(outside: Path, *args: str) -> str:
    path = os.pathsep.join([str(outside), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *args], env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PROGRAM = """
import dmapath
from dmapath import machines, plugins

assert "window" in plugins.names("backends") and "window" in machines.names_of_all()
for name in machines.names_of_all():
    hardware = plugins.find("devices", "checksum")()
    machine = machines.make(name, hardware.limits)
    hardware.attach(machine.device)
    driver = plugins.find("drivers", "checksum")(hardware, machine.device)
    ranges = [(machine.slots[-1 - i] + off, n) for i, (off, n) in enumerate([(0x200, 0x600), (0, 0x2000), (0x81, 7)])]
    for at, n in ranges:
        machine.memory.write(at, bytes((at + i * 3) % 251 for i in range(n)))
    want = sum(sum(machine.memory.read(at, n)) for at, n in ranges)
    assert driver.sum(ranges) == want, name
    assert not machine.leaks(), (name, machine.leaks())
    print(name, machine.device.backend.name)
"""


def test_a_device_and_a_driver_from_outside_meet_on_every_machine(outside: Path) -> None:
    out = run(outside, "-c", PROGRAM).splitlines()
    assert "window window" in out
    assert len(out) >= 8


def test_our_drivers_run_on_a_back_end_from_outside(outside: Path) -> None:
    out = json.loads(run(outside, "-m", "dmapath.cli", "matrix", "--backend", "window", "--json", "-"))
    assert {r["driver"] for r in out["rows"]} == {"nvme", "rblk"}
    assert all(r["verified"] and not r["leaks"] for r in out["rows"])


def test_a_users_test_runs_on_a_back_end_from_outside(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "import dmapath\n"
        "def test_it(dma_device, phys_memory):\n"
        "    with dma_device.map(dmapath.Bio.from_memory(phys_memory, [(0x200, 512)], op='write')) as m:\n"
        "        assert dmapath.DmaEngine(dma_device).read(m.segments) == bytes(512)\n"
    )
    out = run(outside, "-m", "pytest", "-p", "dmapath.pytest_plugin", "-q", "--dma-backend", "window", str(tmp_path))
    assert "1 passed" in out


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(DmaValueError, match=r"nvme, rnic.*dmapath\.devices"):
        plugins.find("devices", "floppy")
    with pytest.raises(DmaValueError, match="backends, devices, drivers"):
        plugins.names("toys")
    assert plugins.names("devices")[:2] == ["nvme", "rnic"]
    assert plugins.find("drivers", "nvme").__name__ == "Nvme"
