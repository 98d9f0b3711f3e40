"""Right drivers of all shapes are not accused: they poll, sync parts in any order and run rings in both directions, on every
machine and on the adversary, with dma-debug attached; a plain model has the bytes.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from typing import Any

import pytest
from test_every_back_end import MACHINES

from dmapath import Adversary, Bio, Device, DmaDebug, DmaEngine, PhysMemory

PAGE = 4096
STEPS = int(os.environ.get("DMAPATH_STEPS", "100000")) // 200


def _machine(name: str) -> Any:
    m = MACHINES[name]()
    return m, m.dev, m.memory, DmaEngine(m.dev)


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_polling(name: str) -> None:
    """dma_sync_single_for_cpu, look, dma_sync_single_for_device, look again: what the device wrote at any time is seen."""
    m, dev, memory, engine = _machine(name)
    debug = dev.attach(DmaDebug())
    at = m.slots[0]
    memory.write(at, bytes(64))
    addr = int(dev.map_phys(at, 64, "from_device"))
    dev.sync_for_cpu(addr, 64, "from_device")
    engine.write([(addr + 8, 4)], b"DATA")
    dev.sync_for_device(addr, 64, "from_device")
    dev.sync_for_cpu(addr, 64, "from_device")
    assert memory.read(at, 64) == bytes(8) + b"DATA" + bytes(52)
    dev.sync_for_device(addr, 64, "from_device")
    engine.write([(addr + 8, 4)], b"DATA")  # the very same bytes again, over what the CPU may have put there
    dev.unmap_phys(addr, 64, "from_device")
    assert memory.read(at + 8, 4) == b"DATA"
    dev.detach(debug)
    debug.check()


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_partial_syncs_lose_nothing(name: str) -> None:
    _, dev, memory, engine = _machine(name)
    at = int(memory.phys(0))
    for order in ((0, 1), (1, 0)):
        addr = int(dev.map_phys(at, 2 * PAGE, "from_device"))
        data = random.Random(order[0]).randbytes(2 * PAGE)
        engine.write([(addr, 2 * PAGE)], data)
        for half in order:
            dev.sync_for_cpu(addr + half * PAGE, PAGE, "from_device")
            assert memory.read(at + half * PAGE, PAGE) == data[half * PAGE : (half + 1) * PAGE]
        dev.unmap_phys(addr, 2 * PAGE, "from_device")
        assert memory.read(at, 2 * PAGE) == data


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_right_drivers_by_chance(name: str) -> None:
    """Lines change hands one by one: who owns one writes it, the other side sees it after the sync."""
    rng = random.Random(name)
    m, dev, memory, engine = _machine(name)
    debug = dev.attach(DmaDebug())
    line, n = 64, 32  # so that caches of devices that are not coherent are no matter of neighbours
    for _ in range(max(2, STEPS // 40)):
        at, how = m.slots[rng.randrange(8)], rng.choice(["from_device", "to_device", "bidirectional"])
        model = bytearray(rng.randbytes(line * n))
        memory.write(at, bytes(model))
        addr = int(dev.map_phys(at, line * n, how))
        cpu_owns = [False] * n
        for _ in range(40):
            first = rng.randrange(n)
            last = min(n, first + rng.choice([1, 1, 2, 8, n]))
            span, where = slice(first * line, last * line), (addr + first * line, (last - first) * line)
            if all(cpu_owns[first:last]):
                assert memory.read(at + span.start, span.stop - span.start) == model[span]
                if how != "from_device" and rng.random() < 0.7:
                    model[span] = rng.randbytes(span.stop - span.start)
                    memory.write(at + span.start, bytes(model[span]))
                dev.sync_for_device(*where, how)
                cpu_owns[first:last] = [False] * (last - first)
            elif not any(cpu_owns[first:last]):
                if how != "to_device" and rng.random() < 0.7:
                    model[span] = rng.randbytes(span.stop - span.start)
                    engine.write([where], bytes(model[span]))
                if how != "from_device":
                    assert engine.read([where]) == model[span]
                if rng.random() < 0.6:
                    dev.sync_for_cpu(*where, how)
                    cpu_owns[first:last] = [True] * (last - first)
        dev.unmap_phys(addr, line * n, how)
        assert memory.read(at, line * n) == model
    dev.detach(debug)
    debug.check()


@pytest.mark.parametrize("mask", [0xFFF, 0xFFFF, 2**32 - 1])
def test_the_adversary_keeps_the_segment_boundary(mask: int) -> None:
    memory = PhysMemory(1 << 20)
    dev = Device(backend=Adversary(3, cut=0), memory=memory, seg_boundary_mask=mask)
    for i in range(200):
        n = (64, PAGE // 2, PAGE)[i % 3]
        addr = int(dev.map_phys(memory.phys((i % 100) * PAGE), n, "to_device"))
        assert addr | mask == addr + n - 1 | mask
        dev.unmap_phys(addr, n, "to_device")


def test_the_adversary_does_not_grow() -> None:
    memory = PhysMemory(1 << 20)
    dev = Device(backend=Adversary(3), memory=memory)
    bio = Bio([(memory.phys(0), 512), (memory.phys(2 * PAGE), PAGE)])

    def cycles(n: int) -> None:
        for _ in range(n):
            dev.map(bio).unmap()
            dev.alloc_coherent(PAGE).free()

    cycles(3000)  # fills the quarantine of addresses
    tracemalloc.start()
    try:
        cycles(3000)  # and all that is in it is counted
        before = tracemalloc.get_traced_memory()[0]
        cycles(3000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 100_000, grown
