"""The pytest plug-in: a test that asks for ``dma_device`` runs on each back end that ``--dma-backend`` names.

================= ====================================================================================================
``dma_backend``   the back end's name: one of ``dmapath.machines.MACHINES`` ("direct", "iommu-strict", ...), one of another
                  package, or "verbs" (a real RDMA device)
``dma_device``    a Device on it, dma-debug attached; with ``@pytest.mark.dma_limits(virt_boundary=0xfff, ...)`` its hardware
                  has those limits
``phys_memory``   the machine's PhysMemory
``dma_machine``   the whole machine: ``slots`` are buffers of each kind of memory it has
================= ====================================================================================================

When the test is over, misuse of the API that dma-debug saw and mappings that are left fail it. A test that fails is reported
with every fault of the device, and what became of the mapping there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from dmapath import machines
from dmapath.debug import DmaDebug
from dmapath.device import Device
from dmapath.memory import PhysMemory
from dmapath.observe import History

_HISTORY = pytest.StashKey[History]()
DEFAULT = "all"


def _real() -> bool:
    try:
        from dmapath.verbs import devices
    except ImportError:
        return False
    return bool(devices())


def pytest_addoption(parser: pytest.Parser) -> None:
    """--dma-backend and --no-dma-debug."""
    group = parser.getgroup("dmapath", "DMA drivers on every back end")
    group.addoption("--dma-backend", default=DEFAULT, metavar="NAME[,NAME]",
                    help="back ends on which tests of dma_device run: all (every simulated one, and verbs where there is an "
                    "RDMA device), or names: " + ", ".join([*machines.MACHINES, "verbs"]))  # fmt: skip
    group.addoption("--no-dma-debug", action="store_true", help="do not check how dma_device is used")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "dma_limits(**limits): limits of dma_device's hardware, as keyword arguments of Device"
    )


def chosen(text: str) -> list[str]:
    """The names behind --dma-backend."""
    known = [*machines.names_of_all(), "verbs"]
    if text == "all":
        return known if _real() else known[:-1]
    out = text.split(",")
    for name in out:
        if name not in known:
            raise pytest.UsageError(f"--dma-backend {name}: all, or of {', '.join(known)}")
    return out


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each back end."""
    if "dma_backend" in metafunc.fixturenames:
        metafunc.parametrize("dma_backend", chosen(metafunc.config.getoption("--dma-backend")), scope="function")


@pytest.fixture
def dma_machine(request: pytest.FixtureRequest, dma_backend: str) -> Iterator[machines.Machine]:
    """A fresh machine; leaks fail the test."""
    limits: dict[str, Any] = {}
    for mark in request.node.iter_markers("dma_limits"):
        limits = {**mark.kwargs, **limits}
    if dma_backend == "verbs" and not _real():
        pytest.skip("no RDMA device: `dmapath guest run --rxe -- python -m pytest ...` brings soft-RoCE")
    machine = machines.make(dma_backend, limits)
    history = machine.device.attach(History())
    request.node.stash[_HISTORY] = history
    debug = None if request.config.getoption("--no-dma-debug") else machine.device.attach(DmaDebug())
    yield machine
    if debug is not None:
        machine.device.detach(debug)
    machine.device.detach(history)
    leaks = machine.leaks()
    try:
        machine.close()
    finally:
        told = [] if debug is None else [str(report) for report in debug.reports]
        told += [f"left behind: {name} {n}" for name, n in leaks.items()]
        if told:
            pytest.fail("\n".join([f"dma-debug, on {dma_backend}:", *told]), pytrace=False)


@pytest.fixture
def dma_device(dma_machine: machines.Machine) -> Device:
    """The machine's Device."""
    return dma_machine.device


@pytest.fixture
def phys_memory(dma_machine: machines.Machine) -> PhysMemory:
    """The machine's memory."""
    return dma_machine.memory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add the device's faults to the report of a test that failed."""
    report: Any = yield
    history = item.stash.get(_HISTORY, None)
    if report.failed and history is not None and history.faults:
        report.sections.append(("faults of dma_device", "\n".join(str(fault) for fault in history.faults)))
    return report
