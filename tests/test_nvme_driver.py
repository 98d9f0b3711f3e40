"""The NVMe driver: forms as Linux picks them, depth and order, retries and resets, metadata, pools, unwinding."""

from __future__ import annotations

import errno
import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import live
from hypothesis import given, settings
from hypothesis import strategies as st

from dmapath import (
    AddressTypeError,
    Bio,
    Device,
    DmaDebug,
    DmaError,
    DmaValueError,
    FaultInjector,
    GrantTable,
    Iommu,
    NvmeError,
    PhysMemory,
    Request,
    StateError,
    Swiotlb,
    machines,
)
from dmapath.devices.nvme import NvmeController
from dmapath.drivers.nvme import Io, Nvme
from dmapath.nvme_status import DNR

DISK = 4 << 20
BASE = 1 << 32
PAGE = 4096


class Rig:
    def __init__(self, controller: NvmeController, device: Device, driver: Nvme) -> None:
        self.controller, self.device, self.driver = controller, device, driver
        self.memory: PhysMemory = device.memory

    def vecs(self, *ranges: tuple[int, int]) -> list[tuple[int, int]]:
        return [(int(self.memory.phys(at)), n) for at, n in ranges]

    def cpu(self, bio: Bio | Request) -> bytes:
        return b"".join(self.memory.read(p, n) for p, n in bio.vecs)

    def disk(self, bio: Bio | Request) -> bytes:
        return bytes(self.controller.media[bio.sector * 512 :][: bio.total])


@contextmanager
def rig(iommu: str | None = "strict", *, hardware: Any = (), device: Any = (), **driver: Any) -> Iterator[Rig]:
    controller = NvmeController(DISK, **dict(hardware))
    memory = PhysMemory(4 << 20)
    dev = Device(memory=memory, iommu=None if iommu is None else Iommu(iommu), **{**controller.limits, **dict(device)})
    controller.attach(dev)
    before = live(dev)
    debug = dev.attach(DmaDebug())
    with Nvme(controller, dev, **driver) as made:
        pieces = made.counters()["pieces_free"]
        yield Rig(controller, dev, made)
        assert made.in_flight == 0
        assert made.counters()["pieces_free"] == pieces
    dev.detach(debug)
    debug.check()
    if dev.iommu is not None:
        dev.iommu.advance(10_000_000)
    assert live(dev) == before


def test_what_it_learns_of_the_controller() -> None:
    with rig(hardware={"block_size": 4096, "mdts": 3, "metadata_size": 8}) as r:
        d = r.driver
        assert (d.blocks, d.block_size, d.metadata_size, d.max_bytes) == (DISK // 4096, 4096, 8, 32768)
        assert d.identity["model"] == "dmapath NVMe controller"
        assert r.controller.limits["virt_boundary"] == 0
    with rig(hardware={"mdts": 0}) as r:
        assert r.driver.max_bytes == 128 << 10  # behind an IOMMU, dma_opt_mapping_size
        assert r.driver.limits.max_segments == 33
    with rig(None, hardware={"mdts": 0}) as r:
        assert (r.driver.max_bytes, r.driver.limits.max_segments) == (8 << 20, 256)


#: The kernel's cases (KERNEL 9.6 to 9.8, rows 54 and 55): ranges, SGL support, threshold, and what Linux makes of them.
FORMS = {
    "4K": ([(0, PAGE)], True, 32768, "two-entries", "prp"),
    "8K unaligned": ([(0x200, 2 * PAGE)], True, 32768, "one-piece", "sgl"),
    "16K": ([(0, 4 * PAGE)], True, 0, "one-piece", "sgl"),
    "16K PRP only": ([(0, 4 * PAGE)], False, 32768, "no-sgl", "prp"),
    "row 54": ([(0x200, 0xE00), (0x3000, PAGE), (0x8000, 0x400)], True, 32768, "below-threshold", "prp"),
    "row 55": ([(0x200, 0x600), (0x3000, PAGE), (0x8000, 0x200), (0xA000, 0x800)], True, 32768, "gap-forces-sgl", "sgl"),
    "64K in two": ([(0, 8 * PAGE), (0x20000, 8 * PAGE)], True, 32768, "sgl-threshold", "sgl"),
    "64K in two, off": ([(0, 8 * PAGE), (0x20000, 8 * PAGE)], True, 0, "below-threshold", "prp"),
}


@pytest.mark.parametrize("iommu", [None, "strict", "lazy"])
@pytest.mark.parametrize("policy", ["linux", "unified"])
@pytest.mark.parametrize("name", FORMS)
def test_it_picks_prp_or_sgl_as_linux_does(name: str, policy: str, iommu: str | None) -> None:
    ranges, sgl, threshold, rule, form = FORMS[name]
    with rig(iommu, hardware={"sgl": sgl}, sgl_threshold=threshold, policy=policy) as r:
        for op in ("write", "read"):
            bio = Bio(r.vecs(*ranges), op=op, sector=8)
            for p, n in bio.vecs:
                r.memory.write(p, os.urandom(n))
            r.controller.media[:] = os.urandom(DISK)
            r.driver.run(bio)
            assert r.cpu(bio) == r.disk(bio)
            assert r.driver.told["form"] == rule
        counts = r.driver.counters()
        assert (counts["prp"], counts["sgl"]) == ((2, 0) if form == "prp" else (0, 2))


@pytest.mark.parametrize("form", ["prp", "sgl"])
def test_the_form_may_be_told(form: Any) -> None:
    with rig(form=form) as r:
        r.driver.run(Bio(r.vecs((0, PAGE), (0x4000, 0x10000)), op="write"))
        assert r.driver.counters()[form] == 1
        gapped = Bio(r.vecs((0, 0x200), (0x4000, 0x200)), op="write", sector=40)
        if form == "sgl":
            r.driver.run(gapped)
        else:  # nothing can say that in PRP entries, and it is not sent as something else
            with pytest.raises(DmaError) as e:
                r.driver.run(gapped)
            assert e.value.errno == errno.EIO
    with pytest.raises(DmaValueError, match="takes no SGL"), rig(hardware={"sgl": False}, form="sgl"):
        pass


def test_a_prp_controller_gets_bios_split_at_their_gaps() -> None:
    with rig(hardware={"sgl": False}) as r:
        bio = Bio(r.vecs((0x200, 0x600), (0x3000, PAGE), (0x8000, 0xA00), (0xB000, 0x200)), op="write")
        r.memory.write(r.memory.phys(0), os.urandom(0x10000))
        io = r.driver.run(bio)
        assert io.commands == 3
        assert r.cpu(bio) == r.disk(bio)


@pytest.mark.parametrize("depth", [1, 3, 32])
@pytest.mark.parametrize("order", ["fifo", "random"])
def test_many_requests_of_any_size_in_any_order(depth: int, order: str) -> None:
    with rig(hardware={"order": order, "seed": depth}, queue_depth=depth) as r:
        rng = random.Random(depth)
        places = list(range(0, 4 << 20, 64 << 10))
        rng.shuffle(places)
        bios, sector = [], 0
        for at in places[:60]:
            n = rng.choice((512, 4096, 12288, 49152))
            bios.append(Bio(r.vecs((at + rng.choice((0, 0x200, 4)), n)), op="write", sector=sector))
            sector += n // 512 + rng.randrange(3)
        r.memory.write(r.memory.phys(0), os.urandom(4 << 20))
        first, second = r.driver.submit(bios[:30]), r.driver.submit(bios[30:])
        second.wait()
        first.wait()
        assert all(r.cpu(bio) == r.disk(bio) for bio in bios)
        assert r.driver.counters()["commands"] == 60
        assert first.done
        assert not first.errors
        r.controller.media[:] = bytes(DISK)
        r.driver.repeat(first, 2)
        assert all(r.cpu(bio) == r.disk(bio) for bio in bios[:30])


def test_it_can_be_polled_instead_of_waited_for() -> None:
    with rig(hardware={"order": "random"}, queue_depth=4) as r:
        io = r.driver.submit([Bio(r.vecs((i * PAGE, PAGE)), sector=8 * i) for i in range(20)])
        assert (r.driver.in_flight, io.done) == (4, False)
        taken = 0
        for _ in range(1000):
            taken += r.driver.poll()
            if io.done:
                break
        assert (taken, r.driver.in_flight, io.errors) == (20, 0, [])


def test_long_bios_are_split_and_requests_are_not() -> None:
    with rig(None, hardware={"mdts": 3}) as r:
        r.memory.write(r.memory.phys(0), os.urandom(1 << 20))
        bio = Bio(r.vecs((0x200, 100 << 10)), op="write", sector=3)
        assert r.driver.run(bio).commands == 4
        assert r.cpu(bio) == r.disk(bio)
        whole = Request([Bio(r.vecs((0, 4096)), op="write", sector=1), Bio(r.vecs((0x5000, 4096)), op="write", sector=9)])
        assert r.driver.run(whole).commands == 1
        assert r.cpu(whole) == r.disk(whole)
        with pytest.raises(NvmeError, match="invalid field"):  # longer than MDTS, and nobody splits a request
            r.driver.run(Request([Bio(r.vecs((0, 64 << 10)), op="write")]))
        assert r.controller.errors[0].byte == 48


def test_statuses_are_tried_again_where_that_may_help() -> None:
    with rig(retries=3) as r:
        bio = Bio(r.vecs((0, PAGE)), op="write")
        r.memory.write(r.memory.phys(0), b"r" * PAGE)
        r.controller.fail_next(3)
        r.driver.run(bio)
        assert (r.driver.counters()["retries"], r.disk(bio)) == (3, b"r" * PAGE)
        r.controller.fail_next(4)
        with pytest.raises(NvmeError, match=r"namespace not ready \(0x82\), tried 4 times") as e:
            r.driver.run(bio)
        assert (e.value.status, e.value.lba, e.value.blocks, e.value.errno) == (0x82, 0, 8, errno.EIO)
        before = r.driver.counters()["retries"]
        r.controller.fail_next(1, 0x281 | DNR)
        with pytest.raises(NvmeError, match="unrecovered read error"):
            r.driver.run(bio)
        assert r.driver.counters()["retries"] == before
        mixed = [Bio(r.vecs((i * PAGE, PAGE)), op="write", sector=8 * i) for i in range(20)]
        r.controller.fail_next(7)
        io = r.driver.run(mixed)
        assert not io.errors
        beyond = [*mixed[:2], Bio(r.vecs((0, PAGE)), sector=DISK // 512)]
        io = r.driver.submit(beyond)
        with pytest.raises(NvmeError, match="LBA out of range"):
            io.wait()
        assert [type(e) for e in io.errors] == [NvmeError]


def test_a_dead_controller_is_reset_and_what_was_in_flight_tried_again() -> None:
    with rig() as r:
        bios = [Bio(r.vecs((i * PAGE, PAGE)), op="write", sector=8 * i) for i in range(8)]
        r.memory.write(r.memory.phys(0), os.urandom(1 << 16))
        io = r.driver.submit(bios)
        bad = r.device.attach(FaultInjector())
        bad.fail_nth("access", 1, errno=errno.EFAULT)  # the controller cannot fetch its commands
        io.wait()
        assert r.driver.counters()["resets"] == 1
        assert all(r.cpu(bio) == r.disk(bio) for bio in bios)
        r.device.detach(bad)


def test_a_controller_that_stays_dead_is_an_error() -> None:
    class Dead(FaultInjector):
        def before(self, call: Any) -> int | None:
            return errno.EFAULT if call.op == "access" and call.size % 64 == 0 and not call.write and self.armed else None

        armed = False

    with rig(retries=1) as r:
        dead = r.device.attach(Dead())
        ios = [r.driver.submit(Bio(r.vecs((i * PAGE, PAGE)), op="write", sector=8 * i)) for i in range(3)]
        dead.armed = True
        with pytest.raises(NvmeError, match="internal error"):
            ios[1].wait()
        assert all(io.done and len(io.errors) == 1 for io in ios)
        dead.armed = False
        r.device.detach(dead)
        with pytest.raises(StateError, match="dead"):
            r.driver.flush()


def test_flush_zeroes_and_deallocate() -> None:
    with rig() as r:
        r.controller.media[:] = b"f" * DISK
        r.driver.flush()
        r.driver.write_zeroes(3, 5)
        r.driver.deallocate([(100, 2), (200, 1)])
        media = bytes(r.controller.media)
        assert media.count(0) == 8 * 512
        for lba, n in ((3, 5), (100, 2), (200, 1)):
            assert media[lba * 512 : (lba + n) * 512] == bytes(n * 512)
        with pytest.raises(NvmeError, match="LBA out of range"):
            r.driver.deallocate([(DISK, 1)])
        with pytest.raises(DmaValueError, match="1 to 65536"):
            r.driver.write_zeroes(0, 0)
        with pytest.raises(DmaValueError, match="1 to 256"):
            r.driver.deallocate([])
        with pytest.raises(NvmeError, match="invalid command opcode"):
            r.driver.command(0x55)


@pytest.mark.parametrize("pieces", [1, 3, 15])
@pytest.mark.parametrize("iommu", [None, "strict"])
def test_metadata_travels_beside_the_data(pieces: int, iommu: str | None) -> None:
    with rig(iommu, hardware={"metadata_size": 8}) as r:
        r.memory.write(r.memory.phys(0), os.urandom(1 << 20))
        n = 30 * 512
        metas = r.vecs(*(((1 << 19) + i * 8192, 240 // pieces) for i in range(pieces)))
        for op in ("write", "read"):
            bio = Bio(r.vecs((0x200, n)), op=op, sector=7, integrity=metas)
            r.controller.media[:], r.controller.metadata[:] = os.urandom(DISK), os.urandom(DISK // 512 * 8)
            r.driver.run(bio)
            assert bio.integrity is not None
            assert (r.cpu(bio), r.cpu(bio.integrity)) == (r.disk(bio), bytes(r.controller.metadata[56:296]))
        long = Bio(r.vecs((0, 300 << 10)), op="write", integrity=r.vecs((1 << 19, 4800)))
        if pieces == 1:
            assert r.driver.run(long).commands > (0 if iommu is None else 1)
            assert (r.cpu(long), bytes(r.controller.metadata[:4800])) == (
                r.disk(long),
                r.memory.read(r.memory.phys(1 << 19), 4800),
            )
        with pytest.raises(DmaValueError, match="integrity of 8 bytes"):
            r.driver.run(Bio(r.vecs((0, 512)), op="write"))
        if pieces == 15:
            with pytest.raises(DmaError):  # no list of metadata holds 16
                r.driver.run(Bio(r.vecs((0, 512 * 16)), op="write", integrity=r.vecs(*((i * 8192, 8) for i in range(16)))))


def test_memory_that_runs_short_makes_requests_wait() -> None:
    """A pool that holds two of the requests at a time, and sixteen of them."""
    memory = PhysMemory(1 << 20, base=1 << 33)
    pool = Swiotlb(memory, slots=256, force=True)
    controller = NvmeController(DISK)
    device = Device(memory=memory, swiotlb=pool, **controller.limits)
    controller.attach(device)
    memory.write(memory.phys(0), data := os.urandom(1 << 19))
    with Nvme(controller, device) as driver:
        driver.run([Bio([(int(memory.phys(i << 15)), 1 << 15)], op="write", sector=i << 6) for i in range(16)])
        assert bytes(controller.media[: 1 << 19]) == data
        # longer than any mapping may be: split
        assert driver.max_bytes < 256 << 10


def test_descriptor_pages_that_run_short_make_requests_wait() -> None:
    with rig(None, hardware={"mdts": 11}, queue_depth=8, form="prp") as r:
        bios = [
            Bio(r.vecs((0x200, (4 << 20) - 0x1000)), op="write") for _ in range(10)
        ]  # two pages of list each, and there are 13
        r.memory.write(r.memory.phys(0), os.urandom(4 << 20))
        r.driver.run(bios)
        assert r.disk(bios[0]) == r.cpu(bios[0])
        assert r.driver.counters()["list_pages"] == 20


@pytest.mark.parametrize("iommu", [None, "strict"])
@pytest.mark.parametrize("ranges", [[(0x200, 0x600), (0x3000, PAGE), (0x8000, 0x200), (0xA000, 0x800)], [(0, PAGE)]])
def test_every_failure_of_the_dma_api_unwinds(iommu: str | None, ranges: list[tuple[int, int]]) -> None:
    for nth in range(1, 60):
        with rig(iommu, hardware={"metadata_size": 8}) as r:
            total = sum(n for _, n in ranges)
            bio = Bio(r.vecs(*ranges), op="write", integrity=r.vecs((1 << 19, total // 64)))
            faults = r.device.attach(FaultInjector(None, nth))
            try:
                r.driver.run(bio)
                failed = False
            except DmaError as e:
                failed = True
                assert e.errno in (errno.ENOMEM, errno.EIO)
            fired = faults.left == 0
            r.device.detach(faults)
            r.driver.run(bio)  # and it works again
            assert r.cpu(bio) == r.disk(bio)
        if not fired:
            break
        assert failed or faults.seen[nth - 1] == "iova_try_alloc"  # a plain refusal: range by range then
    else:
        raise AssertionError("it makes fewer calls than that")


def test_mistakes_of_the_user_are_named() -> None:
    with rig() as r:
        bio = Bio(r.vecs((0, 512)), op="write")
        for wrong, match in ((Bio(r.vecs((0, 100))), "whole blocks"), (Bio([]), "whole blocks"),
                             (Bio(r.vecs((0, 512)), integrity=r.vecs((0, 8))), "integrity of 0 bytes")):  # fmt: skip
            with pytest.raises(DmaValueError, match=match):
                r.driver.submit(wrong)
        with pytest.raises(AddressTypeError, match="a Bio or a Request"):
            r.driver.submit([1])  # type: ignore[list-item]
        with pytest.raises(DmaError, match="dma_alignment"):
            r.driver.submit(Bio(r.vecs((2, 512))))
        io = r.driver.submit(bio)
        with pytest.raises(StateError, match="in flight"):
            r.driver.close()
        with pytest.raises(StateError, match="done"):
            r.driver.repeat(io)
        io.wait()
        controller, device = r.controller, r.device
    with pytest.raises(StateError, match="closed"):
        r.driver.submit(bio)
    for options in ({"queue_depth": 0}, {"queue_depth": 1001}, {"form": "both"}, {"policy": "x"}, {"retries": -1}):
        with pytest.raises(DmaValueError):
            Nvme(controller, device, **options)
    with pytest.raises(AddressTypeError, match="mmio"):
        Nvme(object(), device)
    with pytest.raises(StateError, match="does not answer"):
        Nvme(NvmeController(DISK), device)  # it was never plugged in


#: Machines beyond those of the matrix: keyword arguments of the Device, given its memory.
MORE: dict[str, Any] = {
    "bus offset": lambda memory: {"dma_ranges": [(BASE, 1 << 44, 1 << 32), (1 << 50, 1 << 45, 1 << 40)]},
    "32 bits": lambda memory: {"dma_mask": 2**32 - 1, "swiotlb": Swiotlb(memory, slots=2048)},
    "restricted pool": lambda memory: {"swiotlb": Swiotlb(memory, slots=2048, restricted=True)},
    "growing pool": lambda memory: {"swiotlb": Swiotlb(memory, slots=2048, force=True, dynamic=True)},
    "bounce, non-coherent": lambda memory: {"coherent": False, "swiotlb": Swiotlb(memory, slots=2048, force=True)},
    "caching mode": lambda memory: {"iommu": Iommu("strict", caching_mode=True)},
    "passthrough": lambda memory: {"iommu": Iommu("passthrough")},
    "IOMMU, non-coherent": lambda memory: {"iommu": Iommu("strict"), "coherent": False},
    "untrusted, non-coherent": lambda memory: {
        "iommu": Iommu("strict"), "coherent": False, "untrusted": True, "swiotlb": Swiotlb(memory, slots=2048)},
    "Xen grants": lambda memory: {"grants": GrantTable()},
    "1 MiB of IOVA": lambda memory: {"iommu": Iommu("strict"), "dma_mask": 0xFFFFF},
}  # fmt: skip


@pytest.mark.parametrize("sgl", [True, False])
@pytest.mark.parametrize("name", MORE)
def test_it_runs_on_every_other_machine_too(name: str, sgl: bool) -> None:
    memory = PhysMemory(1 << 20, base=BASE)
    controller = NvmeController(1 << 20, sgl=sgl, order="random")
    device = Device(memory=memory, **{**controller.limits, **MORE[name](memory)})
    controller.attach(device)
    before = live(device)
    debug = device.attach(DmaDebug())
    with Nvme(controller, device, queue_depth=8) as driver:
        memory.write(BASE, os.urandom(1 << 19))
        for op in ("write", "read"):
            bios = [
                Bio([(at + 0x200, 0xE00), (at + 0x2000, 0x1000), (at + 0x4100, 0x200)], op=op, sector=32 * i)
                for i, at in enumerate(range(BASE, BASE + 0x40000, 0x8000))
            ]
            driver.run(bios)
            for bio in bios:
                assert bytes(controller.media[bio.sector * 512 :][: bio.total]) == b"".join(
                    memory.read(p, n) for p, n in bio.vecs
                )
            controller.media[:] = os.urandom(1 << 20)
    device.detach(debug)
    debug.check()
    assert live(device) == before


def test_an_exception_in_the_users_block_leaves_nothing_mapped() -> None:
    controller, memory = NvmeController(DISK), PhysMemory(1 << 20)
    device = Device(memory=memory, iommu=Iommu("strict"), **controller.limits)
    controller.attach(device)
    before = live(device)
    with pytest.raises(KeyError), Nvme(controller, device) as driver:
        driver.submit(Bio([(int(memory.phys(0)), PAGE)], op="write"))
        driver.run(Bio([(int(memory.phys(0)), PAGE)], op="write"))
        driver.submit(Bio([(int(memory.phys(0)), PAGE)], op="write"))
        raise KeyError
    assert live(device) == before


def test_a_driver_that_is_dropped_leaves_nothing() -> None:
    controller, memory = NvmeController(DISK), PhysMemory(1 << 20)
    device = Device(memory=memory, iommu=Iommu("strict"), **controller.limits)
    controller.attach(device)
    before = live(device)
    driver = Nvme(controller, device, queue_depth=2)
    io = driver.submit([Bio([(int(memory.phys(i * PAGE)), PAGE)], sector=8 * i) for i in range(5)])
    assert driver.in_flight == 2
    assert live(device)["mapped_bytes"] > before["mapped_bytes"]
    del io, driver
    gc.collect()
    assert live(device) == before
    with pytest.raises(TypeError, match=r"Nvme\.submit"):
        Io()
    with Nvme(controller, device):  # and the controller is free for another
        pass


parts = st.tuples(
    st.sampled_from([0, 0, 4, 0x200, 0xA04, 0xFFC]), st.sampled_from([4, 0x200, 0x600, 0x1000, 0x1FFC, 0x2A00])
)
requests = st.lists(
    st.tuples(st.sampled_from(["read", "write"]), st.integers(0, 400), st.lists(parts, min_size=1, max_size=5)),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(batch=requests, name=st.sampled_from(list(machines.MACHINES)), sgl=st.booleans(), seed=st.integers(0, 1000),
       form=st.sampled_from(["auto", "prp", "sgl"]), policy=st.sampled_from(["linux", "unified"]),
       depth=st.integers(1, 8))  # fmt: skip
def test_random_requests_against_a_plain_disk(
    batch: list[tuple[str, int, list[tuple[int, int]]]], name: str, sgl: bool, seed: int, form: Any, policy: Any, depth: int
) -> None:
    """Any requests on any machine, completed in any order: the disk and all memory are what a plain copy makes of them."""
    if (form == "sgl" and not sgl) or (name in ("p2p", "adversarial") and policy == "linux"):
        form, policy = "auto", "unified"
    controller = NvmeController(1 << 20, sgl=sgl, order="random", seed=seed)
    m = machines.make(name, controller.limits)
    controller.attach(m.device)
    slots = [at for pair in zip(m.slots, reversed(m.slots), strict=True) for at in pair][: len(m.slots)]
    rng = random.Random(seed)
    cpu = {at: bytearray(rng.randbytes(machines.SLOT)) for at in m.slots}
    for at, data in cpu.items():
        m.memory.write(at, data)
    disk = bytearray(rng.randbytes(1 << 20))
    controller.media[:] = disk
    free, taken, sector = list(dict.fromkeys(slots)), [], 0
    for op, skip, ranges in batch:
        vecs = [(free.pop(0) + off, n) for off, n in ranges]
        total = sum(n for _, n in vecs)
        vecs.append((free.pop(0), 512 - total % 512 if total % 512 else 512))
        sector += skip % 50
        taken.append(Bio(vecs, op=op, sector=sector))
        sector += taken[-1].total // 512
    told = DmaError
    with Nvme(controller, m.device, queue_depth=depth, form=form, policy=policy) as driver:
        for bio in taken:
            try:
                driver.run(bio)
            except told as e:  # PRP cannot say every gap: then nothing has moved
                assert e.errno in (errno.EIO, errno.EINVAL), e
                assert form == "prp" or not sgl, e
                continue
            at = bio.sector * 512
            for phys, n in bio.vecs:
                slot = next(s for s in m.slots if s <= int(phys) < s + machines.SLOT)
                off = int(phys) - slot
                if bio.op == "write":
                    disk[at : at + n] = cpu[slot][off : off + n]
                else:
                    cpu[slot][off : off + n] = disk[at : at + n]
                at += n
    assert bytes(controller.media) == bytes(disk)
    for at, data in cpu.items():
        assert m.memory.read(at, machines.SLOT) == bytes(data)
    assert not m.leaks()
