"""Failures on demand by op, exposure over time, stale translations caught, traces in the kernel's words."""

from __future__ import annotations

import contextlib
import errno
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import live

from dmapath import (
    Bio,
    Device,
    DmaDebug,
    DmaEngine,
    DmaError,
    DmaFault,
    Exposure,
    FaultInjector,
    Iommu,
    MemoryRegion,
    PhysMemory,
    StaleUseError,
    Swiotlb,
    Tracer,
)  # fmt: skip
from dmapath.observe import OPS
from dmapath.replay import replay

PAGE = 4096
BASE = 1 << 32
FLOWS: dict[str, Any] = {
    "linear": lambda d: d.map(Bio([(BASE, PAGE), (BASE + 0x5000, PAGE)])).unmap(),
    "gapped": lambda d: d.map(Bio([(BASE + 0x200, 0x300), (BASE + 0x5100, PAGE)])).unmap(),
    "per-range": lambda d: d.map(Bio([(BASE + 0x200, 0x300), (BASE + 0x5100, PAGE)]), "linux").unmap(),
    "umem": lambda d: d.map(MemoryRegion([(BASE, 2 * PAGE)], length=2 * PAGE), "linux").unmap(),
}
DEVICES: dict[str, Any] = {
    "strict": lambda m: Device(iommu=Iommu(), memory=m),
    "lazy": lambda m: Device(iommu=Iommu("lazy"), memory=m),
    "direct": lambda m: Device(memory=m),
    "forced": lambda m: Device(memory=m, swiotlb=Swiotlb(m, slots=256, force=True)),
    "untrusted": lambda m: Device(iommu=Iommu(), memory=m, swiotlb=Swiotlb(m, slots=256), untrusted=True,
                                  min_align_mask=0xFFF),
    "non-coherent": lambda m: Device(iommu=Iommu(), memory=m, coherent=False),
}


# a region must stay coherent, so these devices take none
PAIRS = [(f, k) for f in FLOWS for k in DEVICES if (f, k) not in (("umem", "forced"), ("umem", "non-coherent"))]


@pytest.mark.parametrize(("flow", "kind"), PAIRS)
@pytest.mark.parametrize("op", [None, *(o for o in OPS if not o.startswith(("un", "iova_un", "iova_free", "acc", "sync")))])
def test_each_op_made_to_fail_in_turn_unwinds(flow: str, kind: str, op: str | None) -> None:
    for nth in range(1, 40):
        dev = DEVICES[kind](PhysMemory(1 << 20, base=BASE))
        before = live(dev)
        faults = dev.attach(FaultInjector(op, nth))
        failed = False
        try:
            FLOWS[flow](dev)
        except DmaError:
            failed = True
        if kind == "lazy":
            dev.backend.flush()
        assert live(dev) == before, (nth, faults.seen)
        assert dev.swiotlb is None or dev.swiotlb.used == 0
        if faults.fail_nth(None, 0) > 0:
            assert not failed
            return
    pytest.fail("the flow never ran out of calls to fail")


def test_an_injected_failure_says_its_errno_and_happens_once() -> None:
    dev = DEVICES["strict"](PhysMemory(1 << 20, base=BASE))
    dev.attach(FaultInjector("iova_link_vec", 1, errno=errno.EADDRINUSE))
    with pytest.raises(DmaError) as e:
        FLOWS["linear"](dev)
    assert e.value.errno == errno.EADDRINUSE
    FLOWS["linear"](dev)
    with pytest.raises(DmaError, match="one of map_phys"):
        FaultInjector("nothing", 1)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("op", ["map_phys", "iova_try_alloc", "iova_link_vec", "iova_link_gapped", "map_sg"])
def test_a_refused_call_is_told_to_the_others_as_the_driver_sees_it(flow: str, op: str) -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    dev = Device(iommu=Iommu(), memory=memory)
    tracer = dev.attach(Tracer())
    debug = dev.attach(DmaDebug())
    dev.attach(FaultInjector(op, 1))
    with contextlib.suppress(DmaError):
        FLOWS[flow](dev)
    dev.detach(debug)
    debug.check()
    if (flow, op) == ("per-range", "map_phys"):
        assert "dma_addr=ffffffffffffffff" in tracer.lines[0]


def test_a_devices_access_can_be_made_to_fault() -> None:
    dev = DEVICES["strict"](PhysMemory(1 << 20, base=BASE))
    faults = dev.attach(FaultInjector("access", 2))
    with dev.map(Bio([(BASE, PAGE)], op="write")) as m:
        engine = DmaEngine(dev)
        engine.read(m.segments)
        with pytest.raises(DmaFault):
            engine.read(m.segments)
        engine.read(m.segments)
    assert faults.seen == ["access"] * 3


def test_an_observers_own_mistake_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Bad:
        def before(self, call: Any) -> None:
            raise ValueError("mine")

    import sys

    told: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        dev = Device(iommu=Iommu())
        dev.attach(Bad())
        FLOWS["linear"](dev)
    finally:
        sys.unraisablehook = hook
    assert len(told) == 5  # alloc, link, sync, unlink, free
    assert str(told[0].exc_value) == "mine"


def test_calls_show_what_they_were() -> None:
    seen: list[Any] = []

    class Look:
        def after(self, call: Any) -> None:
            seen.append(call)

    dev = Device(iommu=Iommu())
    dev.attach(look := Look())
    with dev.map(Bio([(BASE + 0x200, 0xE00), (BASE + 0x5000, PAGE)], op="write")):
        pass
    dev.detach(look)
    assert [c.op for c in seen] == ["iova_try_alloc", "iova_link_vec", "iova_sync", "segment", "iova_unlink", "iova_free"]
    segment = seen.pop(3)
    assert (segment.addr, segment.size, segment.index, segment.region) == (seen[0].state[0], 0x1E00, 0, False)
    assert seen[1].vecs == [(BASE + 0x200, 0xE00), (BASE + 0x5000, PAGE)]
    assert (seen[1].dir, seen[1].rc, seen[1].state[1]) == ("to_device", 0, 0x1E00)
    assert "test_observe.py" in seen[0].where
    assert repr(seen[0]).startswith("Call(iova_try_alloc, phys=0x100000200, size=7680")
    with pytest.raises(DmaError, match="does not observe"):
        dev.detach(look)


# ---- exposure


def test_neighbouring_bytes_are_counted_for_each_mapping_and_summed() -> None:
    dev = DEVICES["strict"](PhysMemory(1 << 20, base=BASE))
    exposure = dev.attach(Exposure())
    dev.map(Bio([(BASE, PAGE)])).unmap()
    dev.map(Bio([(BASE + 0x200, 0x300), (BASE + 0x5100, 0x40)])).unmap()
    dev.unmap_phys(dev.map_phys(BASE + 0x10, 0x20), 0x20)
    seen = [(m.bytes, m.neighbours) for m in exposure.mappings]
    assert seen == [(PAGE, 0), (0x340, 2 * PAGE - 0x340), (0x20, PAGE - 0x20)]
    assert exposure.summary() == {"mappings": 3, "bytes": PAGE + 0x360, "neighbour_bytes": 3 * PAGE - 0x360, "stale_now": 0,
                                  "longest_stale_ns": 0, "stale_uses": 0}  # fmt: skip


def test_bounced_bytes_expose_no_neighbours() -> None:
    dev = DEVICES["untrusted"](PhysMemory(1 << 20, base=BASE))
    exposure = dev.attach(Exposure())
    dev.map(Bio([(BASE + 0x200, 0x300), (BASE + 0x5100, 2 * PAGE)])).unmap()
    assert exposure.summary()["neighbour_bytes"] == 0


def test_lazy_mode_leaves_the_unmapped_within_reach_until_the_flush() -> None:
    dev = DEVICES["lazy"](PhysMemory(1 << 20, base=BASE))
    exposure, engine = dev.attach(Exposure()), DmaEngine(dev)
    addr = dev.map_phys(BASE, PAGE, "to_device")
    engine.read([(int(addr), 4)])  # the IOTLB knows it now
    dev.unmap_phys(addr, PAGE, "to_device")
    assert exposure.summary()["stale_now"] == PAGE
    dev.iommu.advance(3_000_000)
    engine.read([(int(addr) + 8, 4)])
    [use] = exposure.stale_uses
    assert (use.iova, use.write, use.after_ns) == (int(addr) + 8, False, 3_000_000)
    assert "stale IOTLB entry, 3000000 ns after the unmap at" in str(use)
    assert use.made.split(":")[0].endswith("test_observe.py")
    with pytest.raises(StaleUseError, match="stale IOTLB entry"):
        exposure.check()
    dev.iommu.advance(8_000_000)
    assert exposure.summary()["longest_stale_ns"] == 11_000_000
    with pytest.raises(DmaFault):
        engine.read([(int(addr), 4)])
    assert len(exposure.stale_uses) == 1


def test_strict_mode_and_the_two_steps_leave_nothing_within_reach() -> None:
    for kind, policy in (("strict", "linux"), ("lazy", "unified")):
        dev = DEVICES[kind](PhysMemory(1 << 20, base=BASE))
        exposure, engine = dev.attach(Exposure()), DmaEngine(dev)
        m = dev.map(Bio([(BASE, PAGE), (BASE + 0x3000, PAGE)], op="write"), policy)
        engine.read(m.segments)
        addr = int(m.segments[0].addr)
        m.unmap()
        with pytest.raises(DmaFault):
            engine.read([(addr, 4)])
        exposure.check()
        assert exposure.summary()["longest_stale_ns"] == 0
    with pytest.raises(DmaError, match="simulated IOMMU"):
        Device().attach(Exposure())


# ---- traces


def test_a_trace_has_the_kernels_lines() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    dev = Device(iommu=Iommu(), memory=memory)
    tracer = dev.attach(Tracer("0000:00:02.0"))
    addr = dev.map_phys(BASE + 0x200, 0x800, "to_device", "skip_cpu_sync")
    dev.sync_for_cpu(addr, 16, "to_device")
    dev.unmap_phys(addr, 0x800, "to_device", "skip_cpu_sync")
    bodies = [re.sub(r"^\s*\S+ \[000\] \.{5} +\d+\.\d+: ", "", line) for line in tracer.lines]
    did = dev.backend.did
    assert bodies == [
        "map: IOMMU: iova=0x00000000fffff000 - 0x0000000100000000 paddr=0x0000000100000000 size=4096",
        "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff200 size=2048 phys_addr=100000200 attrs=SKIP_CPU_SYNC",
        "dma_sync_single_for_cpu: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff200 size=16",
        "unmap: IOMMU: iova=0x00000000fffff000 - 0x0000000100000000 size=4096 unmapped_size=4096",
        f"cache_tag_flush_range: dmar0 dmar0[0] type iotlb did {did} [0xfffff000-0xffffffff] addr 0xfffff000 mask 0x0",
        "dma_unmap_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff200 size=2048 attrs=SKIP_CPU_SYNC",
    ]


def test_lists_coherent_memory_bounces_and_faults_are_traced() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    dev = Device(memory=memory, swiotlb=Swiotlb(memory, slots=256, force=True))
    tracer = dev.attach(Tracer())
    segs = dev.map_sg(Bio([(BASE, PAGE), (BASE + 0x3000, 0x10)]))
    dev.sync_sg_for_device(segs)
    dev.unmap_sg(segs)
    dev.alloc_coherent(PAGE).free()
    dev.unmap_phys(dev.map_phys(BASE, 16), 16)
    names = [re.findall(r"\d+\.\d+: (\w+):", line)[0] for line in tracer.lines]
    assert names == ["dma_map_sg", "dma_sync_sg_for_device", "dma_unmap_sg", "dma_alloc", "dma_free", "swiotlb_bounced",
                     "dma_map_phys", "dma_unmap_phys"]  # fmt: skip
    assert "nents=2/2 ents=2/2 dma_addrs={0x40000000,0x40001000} sizes={0x1000,0x10}" in tracer.lines[0]
    assert "phys_addrs={0x100000000,0x100003000}" in tracer.lines[2]
    assert tracer.lines[5].endswith("dev_addr=100000000 size=16 FORCE")
    long = dev.map_sg(Bio([(BASE + i * 0x800, 0x400) for i in range(200)]))
    assert "nents=128/200 ents=128/200 [TRUNCATED]" in tracer.lines[-1]
    dev.unmap_sg(long)
    behind = Device(iommu=Iommu(), memory=memory)
    fault = behind.attach(Tracer())
    with pytest.raises(DmaFault):
        DmaEngine(behind).read([(0x1000, 4)])
    assert "io_page_fault: IOMMU:dmapath 0000:00:01.0 iova=0x0000000000001000 flags=0x0000" in fault.lines[0]


@pytest.mark.parametrize("name", ["strict", "lazy", "viommu", "pt", "swf", "untrusted"])
def test_replay_reads_our_own_trace_back(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parent / "data" / "traces" / f"{name}.ftrace.txt"
    report = replay(path.read_text().splitlines(), name, trace=True)
    (tmp_path / "ours.txt").write_text(report.traced)
    again = replay(report.traced.splitlines(), "ours")
    assert len(again.outcomes) == len(report.outcomes) == 9
    assert [o.verdict for o in again.outcomes] == ["agree"] * 9
    assert [o.kinds for o in again.outcomes] == [o.kinds for o in report.outcomes]


def test_a_tracer_saves_and_traces_one_device_at_a_time(tmp_path: Path) -> None:
    tracer = Device(iommu=Iommu()).attach(Tracer())
    with pytest.raises(DmaError, match="one device at a time"):
        Device().attach(tracer)
    tracer.mark("hello")
    tracer.save(tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text().splitlines()[-1].endswith("tracing_mark_write: hello")
