"""dma-debug: every check, found by a driver that makes just that mistake, with the mapping and both places named."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmapath import Bio, Device, DmaDebug, DmaDebugError, DmaEngine, DmaError, DmaFault, Fabric, Iommu, PhysMemory, Swiotlb
from dmapath.debug import CHECKS

PAGE = 4096
BASE = 1 << 32


def watched(**kw: Any) -> tuple[Device, DmaDebug]:
    memory = PhysMemory(1 << 20, base=BASE)
    options: dict[str, Any] = {"iommu": Iommu(), "memory": memory, **kw}
    dev = Device(**options)
    return dev, dev.attach(DmaDebug())


def found(debug: DmaDebug) -> list[str]:
    return [r.check for r in debug.reports]


class Raw:
    """The C calls that a wrong driver in C would make: nothing stands between it and the table."""

    def __init__(self, dev: Device) -> None:
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self.dev = get(dev.capsule, b"dmapath.device")
        self.ops = ctypes.c_void_p.from_address(self.dev).value
        assert self.ops is not None
        # struct dma_ops: abi, size, name, then the functions in order
        names = ("map_phys", "unmap_phys", "iova_try_alloc", "iova_link", "iova_link_vec", "iova_link_gapped", "iova_sync",
                 "iova_unlink", "iova_free")  # fmt: skip
        self.at = {n: ctypes.c_void_p.from_address(self.ops + 16 + 8 * i).value for i, n in enumerate(names)}

    def call(self, op: str, *args: Any) -> int:
        kinds = [ctypes.c_void_p if isinstance(a, (ctypes.Array, ctypes._SimpleCData)) else ctypes.c_uint64 for a in args]
        plain = [ctypes.addressof(a) if isinstance(a, (ctypes.Array, ctypes._SimpleCData)) else a for a in args]
        at = self.at[op]
        assert at is not None
        return int(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *kinds)(at)(self.dev, *plain))


State = ctypes.c_uint64 * 2
BOTH = 0


# ---- a driver that does everything right


@pytest.mark.parametrize("make", [Iommu, lambda: Iommu("lazy"), lambda: None])
@pytest.mark.parametrize("policy", ["linux", "unified"])
def test_a_right_driver_is_not_reported(make: Callable[[], Any], policy: str) -> None:
    dev, debug = watched(iommu=make())
    engine = DmaEngine(dev)
    for ranges in ([(0, PAGE), (0x5000, PAGE)], [(0x200, 0x400), (0x5100, PAGE)], [(0x100, 3 * PAGE)]):
        for op in ("read", "write"):
            with dev.map(Bio.from_memory(dev.memory, ranges, op), policy) as m:
                total = sum(n for _, n in ranges)
                _ = engine.read(m.segments) if op == "write" else engine.write(m.segments, bytes(total))
                m.sync_for_cpu()
                m.sync_for_device()
    segs = dev.map_sg(Bio(dev.memory.vecs(0, 3 * PAGE)), "to_device")
    engine.read(segs)
    dev.sync_sg_for_cpu(segs, "to_device")
    dev.unmap_sg(segs, "to_device")
    with dev.alloc_coherent(100) as ring:
        engine.write([(int(ring.addr), 8)], b"12345678")
    dev.detach(debug)
    debug.check()
    assert (found(debug), debug.live) == ([], 0)


def test_nothing_is_between_driver_and_back_end_when_nobody_observes() -> None:
    dev, debug = watched()
    table = Raw(dev).ops
    dev.detach(debug)
    assert Raw(dev).ops != table
    assert dev.observers == []


def test_a_report_names_the_mapping_and_both_places() -> None:
    dev, debug = watched()
    addr = dev.map_phys(BASE, 64, "to_device")
    dev.unmap_phys(addr, 64, "from_device")
    [report] = debug.reports
    assert (report.check, report.row) == ("unmap-direction", 17)
    assert report.where.split(":")[0].endswith("test_debug.py")
    assert report.made is not None
    assert int(report.where.split(":")[1].split()[0]) == int(report.made.split(":")[1].split()[0]) + 1
    assert f"{int(addr):#x}+0x40 to_device" in str(report)
    with pytest.raises(DmaDebugError, match="another direction"):
        debug.check()


# ---- rows 1 to 9: what is mapped


def test_rows_1_to_5_memory_that_must_not_be_mapped() -> None:
    dev, debug = watched(iommu=Iommu())
    dev.memory.tag(BASE, PAGE, "stack")
    dev.memory.tag(BASE + PAGE, PAGE, "vmalloc")
    dev.memory.tag(BASE + 2 * PAGE, PAGE, "text")
    for phys, attrs in ((0x1000, 0), (BASE + PAGE, 0), (BASE, 0), (BASE + 2 * PAGE, 0), (BASE + 3 * PAGE, "mmio")):
        dev.unmap_phys(dev.map_phys(phys, 64, attrs=attrs), 64, attrs=attrs)
    assert [r.row for r in debug.reports] == [1, 2, 3, 4, 5]
    dev.unmap_resource(dev.map_resource(0xFE000000, PAGE), PAGE)
    assert len(debug.reports) == 5


def test_rows_6_and_7_lists() -> None:
    dev, debug = watched(iommu=None, max_segment_size=PAGE, seg_boundary_mask=0x1FFF)
    segs = dev.map_sg(Bio([(BASE, 2 * PAGE), (BASE + 0x5000, 64)]))
    dev.unmap_sg(segs)
    assert found(debug) == ["sg-too-long"]
    segs = dev.map_sg(Bio([(BASE + 0x1800, PAGE)]))
    dev.unmap_sg(segs)
    assert [r.row for r in debug.reports] == [6, 7]


def test_rows_8_and_9_cache_lines() -> None:
    dev, debug = watched(iommu=None, coherent=False)
    reads = [dev.map_phys(BASE, 16, "to_device") for _ in range(3)]  # reading twice harms nobody
    assert found(debug) == []
    first = dev.map_phys(BASE, 16, "from_device")
    dev.map_phys(BASE + 32, 16, "from_device")
    assert found(debug) == ["line-shared"]
    dev.map_phys(BASE + 40, 8, "from_device", attrs="skip_cpu_sync")
    assert len(debug.reports) == 1
    for _ in range(7):
        dev.map_phys(BASE, 16, "from_device")
    assert found(debug)[-1] == "line-overlaps"
    assert len(reads) == 3
    dev.unmap_phys(first, 16, "from_device")
    other, quiet = watched(iommu=None)  # the CPU's caches see this one's DMA
    for _ in range(2):
        other.map_phys(BASE, 16, "from_device")
    assert found(quiet) == []


def test_row_10_when_there_are_no_more_entries_it_stops() -> None:
    dev = Device(iommu=Iommu())
    debug = dev.attach(DmaDebug(entries=2))
    for i in range(3):
        dev.map_phys(BASE + i * PAGE, 64)
    assert found(debug) == ["out-of-entries"]
    assert debug.disabled
    dev.detach(debug)
    assert len(debug.reports) == 1


# ---- rows 11 to 19: how it is unmapped


def test_rows_11_and_18_an_error_that_nobody_looked_at() -> None:
    dev, debug = watched(dma_mask=0xFFFF)
    raw, out = Raw(dev), ctypes.c_uint64(0)
    assert raw.call("map_phys", BASE, 1 << 20, BOTH, 0, out) < 0
    assert out.value == 2**64 - 1
    raw.call("unmap_phys", out.value, 1 << 20, BOTH, 0)
    assert [r.row for r in debug.reports] == [11, 18]
    with pytest.raises(DmaFault):
        DmaEngine(dev).read([(out.value, 1)])
    assert found(debug)[-1] == "unmap-error"


def test_row_12_unmapped_twice_or_never_mapped() -> None:
    dev, debug = watched(iommu=None)
    addr = dev.map_phys(BASE, 64)
    dev.unmap_phys(addr, 64)
    dev.unmap_phys(addr, 64)
    dev.unmap_phys(0x77000, 64)
    assert [r.row for r in debug.reports] == [12, 12]
    assert "it was unmapped at" in debug.reports[0].message
    assert debug.reports[1].made is None
    dev.unmap_sg(dev.map_sg(Bio([(BASE, 64)])))
    other = Device(iommu=None)
    strange = other.attach(DmaDebug())
    other.unmap_phys(dev.map_phys(BASE, 64), 64)  # another device's
    assert found(strange) == ["unmap-unknown"]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (13, lambda d, a: d.unmap_phys(a, 2 * PAGE, "to_device")),
        (17, lambda d, a: d.unmap_phys(a, PAGE)),
        (19, lambda d, a: d.unmap_phys(a, PAGE, "to_device", attrs="mmio")),
        (19, lambda d, a: d.unmap_phys(a, PAGE, "to_device", attrs="privileged")),
    ],
)
def test_rows_13_17_and_19_unmapped_unlike_mapped(row: int, wrong: Any) -> None:
    dev, debug = watched(iommu=None)
    wrong(dev, dev.map_phys(BASE, PAGE, "to_device"))
    assert [r.row for r in debug.reports] == [row]
    assert debug.live == 0


def test_skip_cpu_sync_may_differ() -> None:
    dev, debug = watched()
    dev.unmap_phys(dev.map_phys(BASE, 64), 64, attrs="skip_cpu_sync")
    assert found(debug) == []


def test_row_14_another_function() -> None:
    dev, debug = watched(iommu=None)
    segs = dev.map_sg(Bio([(BASE, PAGE)]))
    dev.unmap_phys(segs[0].addr, PAGE, "from_device")
    addr = dev.map_phys(BASE + PAGE, PAGE, "from_device")
    [one] = segs = dev.map_sg(Bio([(BASE + PAGE, PAGE)]))
    assert one.addr == addr
    dev.unmap_sg(segs)
    dev.unmap_sg(segs)
    assert [r.row for r in debug.reports] == [14, 14]


def test_row_15_coherent_memory_by_another_cpu_address() -> None:
    dev, debug = watched(iommu=None)
    buffer = dev.alloc_coherent(PAGE)
    # what a C driver would do that mixed up two rings
    debug.before(type("Call", (), {"op": "free_coherent", "addr": int(buffer.addr), "phys": 0x123000, "size": PAGE,
                                   "where": "here"})())  # fmt: skip
    assert [r.row for r in debug.reports] == [15]
    buffer.free()


def test_row_16_another_number_of_entries() -> None:
    dev, debug = watched(iommu=None)
    segs = dev.map_sg(Bio([(BASE, PAGE), (BASE + 0x5000, PAGE)]))
    dev.unmap_sg(segs[:1], segs.dir)
    assert [r.row for r in debug.reports] == [16]


# ---- rows 20 to 25: syncs


def test_rows_20_to_24_syncs() -> None:
    dev, debug = watched()
    both, to = dev.map_phys(BASE, PAGE), dev.map_phys(BASE + PAGE, PAGE, "to_device")
    back = dev.map_phys(BASE + 2 * PAGE, PAGE, "from_device")
    for direction in ("to_device", "from_device", "bidirectional"):
        dev.sync_for_cpu(both + 64, 32, direction)
    dev.sync_for_device(to, 16, "to_device")
    dev.sync_for_cpu(back, 16, "from_device")
    assert found(debug) == []
    dev.sync_for_cpu(0x99000, 16)
    dev.sync_for_cpu(both + 4000, 200)
    assert found(debug) == ["sync-unknown", "sync-size"]
    dev.sync_for_cpu(to, 16, "from_device")
    assert found(debug)[2:] == ["sync-direction", "sync-for-cpu"]
    dev.sync_for_device(back, 16, "to_device")
    assert found(debug)[4:] == ["sync-direction", "sync-for-device"]


def test_row_25_syncs_of_lists() -> None:
    dev, debug = watched(iommu=None)
    segs = dev.map_sg(Bio([(BASE, PAGE), (BASE + 0x5000, PAGE)]))
    dev.sync_sg_for_device(segs)
    assert found(debug) == []
    dev.sync_sg_for_cpu(segs[:1], segs.dir)
    assert [r.row for r in debug.reports] == [25]


def test_row_26_what_is_left_at_detach() -> None:
    dev, debug = watched()
    dev.map_phys(BASE, 64)
    dev.iova_try_alloc(0, PAGE)
    dev.detach(debug)
    [report] = debug.reports
    assert report.row == 26
    assert "2 mappings are left, one of them map_phys" in report.message
    with pytest.raises(DmaDebugError, match="left mappings behind"), DmaDebug(Device(iommu=Iommu())) as d:
        assert d._device is not None
        d._device.map_phys(BASE, 64)


# ---- the two steps, which Linux does not check


def test_links_outside_and_over_each_other() -> None:
    dev, debug = watched(kernel_quirks=True)  # Linux's way: the table takes it
    state = dev.iova_try_alloc(0, 2 * PAGE)
    dev.iova_try_alloc(0, 64 * PAGE)
    dev.iova_link(state, BASE, 0, PAGE)
    with pytest.raises(DmaError):
        dev.iova_link(state, BASE, 0, PAGE)
    assert found(debug) == ["link-overlap"]
    assert debug.reports[0].made is not None
    dev.iova_link(state, BASE, 2 * PAGE, PAGE)
    assert found(debug)[1:] == ["link-outside"]


def test_a_hole_is_seen_at_sync() -> None:
    dev, debug = watched()
    state = dev.iova_try_alloc(0, 3 * PAGE)
    dev.iova_link(state, BASE, 0, PAGE)
    dev.iova_link(state, BASE + PAGE, 2 * PAGE, PAGE)
    dev.iova_sync(state, 0, 3 * PAGE)
    assert found(debug) == ["link-gap"]
    assert "nothing at 0x1000" in debug.reports[0].message


def test_a_link_that_is_used_before_its_sync() -> None:
    dev, debug = watched()
    state = dev.iova_try_alloc(0, 2 * PAGE)
    dev.iova_link(state, BASE, 0, PAGE)
    dev.iova_sync(state, 0, PAGE)
    dev.iova_link(state, BASE + PAGE, PAGE, PAGE)
    DmaEngine(dev).read([(int(state.addr), 2 * PAGE)])
    assert found(debug) == ["unsynced"]


def test_unlinking_what_is_not_linked_and_unlike_it_was() -> None:
    dev, debug = watched()
    state = dev.iova_try_alloc(0, 2 * PAGE)
    with pytest.raises(DmaError):
        dev.iova_unlink(state, 0, PAGE)
    assert found(debug) == ["unlink-unknown"]
    dev.iova_link(state, BASE, 0, PAGE, "to_device")
    dev.iova_unlink(state, 0, PAGE, "from_device")
    assert found(debug)[1:] == ["unlink-direction"]
    dev.iova_link(state, BASE, 0, PAGE, "to_device", "mmio")
    dev.iova_unlink(state, 0, PAGE, "to_device")
    assert found(debug)[2:] == ["mmio-on-ram", "unlink-attrs"]


def test_a_destroy_of_too_little_and_of_too_much() -> None:
    dev, debug = watched()
    state = dev.iova_try_alloc(0, 3 * PAGE)
    for i in range(3):
        dev.iova_link(state, BASE + i * PAGE, i * PAGE, PAGE)
    dev.iova_destroy(state, 2 * PAGE)
    assert found(debug) == ["free-linked"]
    dev, debug = watched()
    state = dev.iova_try_alloc(0, 3 * PAGE)
    dev.iova_link(state, BASE, 0, PAGE)
    with pytest.raises(DmaError):
        dev.iova_destroy(state, 3 * PAGE)
    assert found(debug) == ["unlink-unknown"]


def test_a_state_that_is_destroyed_twice_and_one_that_never_was() -> None:
    dev, debug = watched()
    raw, state = Raw(dev), State()
    assert raw.call("iova_try_alloc", state, 0, PAGE) == 1
    assert raw.call("iova_free", state) == 0
    assert found(debug) == []
    raw.call("iova_free", state)
    assert found(debug) == ["free-unknown"]
    assert debug.reports[0].made is not None


# ---- the device's side


def test_what_a_device_uses_that_it_should_not() -> None:
    dev, debug = watched(iommu=None)
    engine = DmaEngine(dev)
    addr = dev.map_phys(BASE, 64, "to_device")
    engine.read([(int(addr), 64)])
    assert found(debug) == []
    engine.write([(int(addr), 64)], bytes(64))
    engine.read([(int(addr), 65)])
    dev.unmap_phys(addr, 64, "to_device")
    engine.read([(int(addr), 64)])  # nothing in the way stops it; the debug sees it
    engine.read([(BASE + 0x9000, 4)])
    assert found(debug) == ["use-direction", "use-outside", "use-after-unmap", "use-unmapped"]


def test_peers_need_no_mapping() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    port = Fabric().root_complex().port().switch()
    gpu, nic = port.port().function(), port.port().function()
    bar = gpu.bar(memory, PAGE)
    dev = Device(iommu=Iommu(), memory=memory, pci=nic)
    with DmaDebug(dev), dev.map(Bio([*memory.vecs(0, PAGE), *bar.vecs()], op="write")) as m:
        DmaEngine(dev).read(m.segments)


def test_untrusted_devices_are_watched_like_others() -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    dev = Device(iommu=Iommu(), memory=memory, swiotlb=Swiotlb(memory, slots=512), untrusted=True, min_align_mask=0xFFF)
    with DmaDebug(dev), dev.map(Bio([(BASE + 0x200, 0x300), (BASE + 0x4100, PAGE)], op="write")) as m:
        DmaEngine(dev).read(m.segments)


def test_every_check_has_a_test() -> None:
    text = Path(__file__).read_text()
    rows = {row for row, _ in CHECKS.values() if row}
    assert rows == set(range(1, 27))
    for check, (row, _) in CHECKS.items():
        assert row or f'"{check}"' in text, check
