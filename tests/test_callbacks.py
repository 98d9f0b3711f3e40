"""What users' code raises when native code calls it: it is shown, the operation is what it would have been or is refused,
and nothing is left behind. Each callback, each kind of exception, in a plain interpreter and here.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import live

from dmapath import Bio, Device, DmaEngine, DmaError, DmaFault, DmaValueError, Iommu, OdpRegion, PhysMemory
from dmapath.mmio import Mmio, registers

HERE = Path(__file__).parent
PAGE = 4096
RAISED: list[Any] = [
    ValueError("mine"), DmaValueError("mine"), DmaError("mine", errno=-3), DmaError("mine", errno=2**40), MemoryError(),
    RecursionError(), SystemExit(3), GeneratorExit(), StopIteration(), BaseException("all"),
]  # fmt: skip
RETURNED: list[Any] = [None, "x", -1, 2**100, 1.5, object(), b"", []]


class Hook:
    """Takes what is shown."""

    def __enter__(self) -> list[Any]:
        self.told: list[Any] = []
        self.before, sys.unraisablehook = sys.unraisablehook, lambda args: self.told.append(args.exc_value)
        return self.told

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self.before


class Observer:
    """Raises in one method at every call."""

    def __init__(self, method: str, error: Any) -> None:
        setattr(self, method, self._raise)
        self.error, self.calls = error, 0

    def _raise(self, *_: object) -> None:
        self.calls += 1
        raise self.error


def _flow(dev: Device, memory: PhysMemory) -> bytes:
    """One of each call; what the device read."""
    engine = DmaEngine(dev)
    with dev.map(Bio([(memory.phys(0x200), 0x600), (memory.phys(3 * PAGE), PAGE)], op="write")) as m:
        got = engine.read(m.segments)
        m.sync_for_device()
    sg = dev.map_sg(Bio([(memory.phys(0), PAGE)], op="read"))
    engine.write(sg, bytes(PAGE))
    dev.sync_sg_for_cpu(sg)
    dev.unmap_sg(sg)
    dev.alloc_coherent(PAGE).free()
    return got


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", ["before", "after"])
def test_an_observers_fault_changes_nothing(method: str, error: BaseException) -> None:
    memory = PhysMemory(1 << 16)
    dev = Device(iommu=Iommu(), memory=memory)
    before = live(dev)
    plain = _flow(dev, memory)
    observer = dev.attach(Observer(method, error))
    with Hook() as told:
        assert _flow(dev, memory) == plain
    assert told == [error] * observer.calls
    assert observer.calls > 10
    dev.detach(observer)
    assert live(dev) == before


@pytest.mark.parametrize("value", ["x", -5000, 2**70, [1], 1.5])
def test_an_observer_that_refuses_by_nonsense_refuses_nothing(value: Any) -> None:
    class Odd:
        def before(self, _call: Any) -> Any:
            return value

    memory = PhysMemory(1 << 16)
    dev = Device(iommu=Iommu(), memory=memory)
    dev.attach(Odd())
    with Hook() as told:
        addr = dev.map_phys(memory.phys(0), 64)
        dev.unmap_phys(addr, 64)
    assert len(told) == 2
    assert live(dev)["iova_live"] == 0


class BackEnd:
    """Identity mapping; one method misbehaves."""

    merge_boundary = PAGE - 1
    need_unmap = True

    def __init__(self, memory: PhysMemory) -> None:
        self.memory, self.held = memory, 0

    def map_phys(self, phys: int, _size: int, _dir: str, _attrs: int) -> Any:
        self.held += 1
        return phys

    def unmap_phys(self, _addr: int, _size: int, _dir: str, _attrs: int) -> None:
        self.held -= 1

    def iova_try_alloc(self, _phys: int, _size: int) -> Any:
        return None

    def iova_link(self, *_: Any) -> None:
        raise AssertionError

    iova_sync = iova_unlink = iova_free = iova_link

    def sync_for_cpu(self, _addr: int, _size: int, _dir: str) -> None:
        pass

    sync_for_device = sync_for_cpu

    def is_bounced(self, _addr: int) -> Any:
        return False

    def read(self, addr: int, n: int) -> Any:
        return self.memory.read(addr, n)

    def write(self, addr: int, data: bytes) -> None:
        self.memory.write(addr, data)


CALLS: dict[str, Callable[[Device, DmaEngine, int], Any]] = {
    "map_phys": lambda d, e, at: d.unmap_phys(d.map_phys(at, 64), 64),
    "unmap_phys": lambda d, e, at: d.unmap_phys(d.map_phys(at, 64), 64),
    "iova_try_alloc": lambda d, e, at: d.map(Bio([(at, PAGE)])).unmap(),
    "sync_for_cpu": lambda d, e, at: d.sync_for_cpu(at, 64),
    "sync_for_device": lambda d, e, at: d.sync_for_device(at, 64),
    "read": lambda d, e, at: e.read([(at, 64)]),
    "write": lambda d, e, at: e.write([(at, 64)], bytes(64)),
}


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", CALLS)
def test_a_back_end_that_raises_refuses(method: str, error: BaseException) -> None:
    memory = PhysMemory(1 << 16)
    back = BackEnd(memory)
    dev = Device(memory=memory, backend=back)
    engine = DmaEngine(dev)

    def bad(*_: Any) -> None:
        raise error

    setattr(back, method, bad)
    with Hook() as told:
        try:
            CALLS[method](dev, engine, int(memory.phys(0)))
        except (DmaError, DmaFault):
            refused = True
        else:
            refused = False
    assert refused or method in ("iova_try_alloc", "sync_for_cpu", "sync_for_device"), method
    typed = isinstance(error, DmaError) and 0 < (error.errno or 0) < 4096
    assert bool(told) != typed
    assert all(x is error for x in told)
    assert back.held == (1 if method == "unmap_phys" else 0)


@pytest.mark.parametrize("value", RETURNED, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("method", ["map_phys", "iova_try_alloc", "read", "is_bounced", "merge_boundary", "need_unmap"])
def test_a_back_end_that_answers_nonsense_crashes_nothing(method: str, value: Any) -> None:
    memory = PhysMemory(1 << 16)
    back = BackEnd(memory)
    dev = Device(memory=memory, backend=back)
    setattr(back, method, value if "_" in method and method in ("merge_boundary", "need_unmap") else lambda *_: value)
    with Hook():
        for call in CALLS.values():
            with contextlib.suppress(DmaError):
                call(dev, DmaEngine(dev), int(memory.phys(0)))
    gc.collect()


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_registers_that_raise(error: BaseException) -> None:
    class Card:
        def __init__(self) -> None:
            self.mmio = registers(self)

        def read_register(self, _offset: int, _width: int) -> int:
            raise error

        def write_register(self, _offset: int, _width: int, _value: int) -> None:
            raise error

        def work(self) -> int:
            raise error

    regs = Mmio(Card())
    with Hook() as told:
        assert regs.read(0) == 2**64 - 1
        regs.write(0, 1)
        assert regs.relax() == 0
    assert told == [error] * 3


def test_a_notifier_that_raises_leaves_no_lock_behind() -> None:
    memory = PhysMemory(1 << 16, layout="scattered")
    dev = Device(iommu=Iommu(), memory=memory)
    regions = [OdpRegion(dev, memory, 0, PAGE) for _ in range(8)]
    for r in regions:
        r.fault(0)

    class Bad:
        def invalidate_start(self, *_: object) -> None:
            raise ValueError("mine")

        def invalidate_end(self) -> None:
            raise AssertionError("it never began")

    bad = Bad()
    memory.notifiers.add(bad)
    for call in (memory.migrate, memory.discard):
        with pytest.raises(ValueError, match="mine"):
            call(0, PAGE)
        for r in regions:
            r.fault(0)  # would hang where the lock was kept
    memory.notifiers.discard(bad)
    for r in regions:
        r.close()


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from dmapath import Bio, Device, Iommu, PhysMemory
memory = PhysMemory(1 << 20)
def press(*_):
    os.kill(os.getpid(), signal.SIGINT)
class Look:
    pressed = unmaps = 0
    def before(self, call):
        if not Look.pressed:
            Look.pressed = 1
            press()
    def after(self, call):
        Look.unmaps += call.op == "unmap_phys"
dev = Device({how}memory=memory)
dev.attach(Look())
bio = Bio([(memory.phys(i * 8192 + 512), 1024) for i in range(5)], op="read")
try:
    dev.map(bio, "linux").unmap()
    for _ in range(100):
        pass
except KeyboardInterrupt:
    print("interrupted", dev.counters()["maps"])
"""


@pytest.mark.parametrize("how", ["iommu=Iommu(), ", ""])
def test_ctrl_c_in_a_callback_is_not_lost(how: str) -> None:
    """The operation ends first; then the interrupt arrives."""
    code = INTERRUPTED.format(here=str(HERE), how=how)
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "interrupted 5"


def test_a_plain_interpreter_shows_it() -> None:
    """Without pytest: the built-in hook writes the traceback, and the program goes on."""
    code = ("from dmapath import Device, Iommu\n"
            "class Bad:\n    def after(self, call): raise ValueError('mine')\n"
            "dev = Device(iommu=Iommu())\ndev.attach(Bad())\n"
            "addr = dev.map_phys(0x1000, 64)\ndev.unmap_phys(addr, 64)\n"
            "print(hex(addr), dev.counters()['iova_live'])\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.stdout == "0xfffff000 0\n"
    assert done.stderr.count("ValueError: mine") == 2
    assert done.returncode == 0
