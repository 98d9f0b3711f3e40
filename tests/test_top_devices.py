"""Devices and drivers at the top of a number: DMA addresses, blocks, keys and rings that end at 2**64, or would pass it."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import nvme_raw as raw
import pytest
from conftest import live
from hypothesis import given, settings
from hypothesis import strategies as st
from top import HIGH, LAST, PAGE, TOP

from dmapath import Bio, Device, DmaValueError, Iommu, NvmeError, PhysMemory, Request
from dmapath.descriptors import build_prp, describe_request
from dmapath.devices.nvme import NvmeController
from dmapath.devices.rnic import Rnic
from dmapath.drivers.nvme import Nvme
from dmapath.drivers.registered import Registered
from dmapath.drivers.rnic import Context, FastMr, Mr, Pd, Qp
from dmapath.errors import CompletionError
from dmapath.mmio import Mmio

DISK = 1 << 20
LBA_RANGE = 0x80


def direct(pages: int = 64) -> tuple[Device, PhysMemory]:
    """A device whose DMA addresses of the arena end at 2**64."""
    memory = PhysMemory(pages * PAGE)
    size = len(memory)
    ranges = [(int(memory.phys(0)), TOP - size, size), (1 << 50, 1 << 50, 1 << 40)]  # coherent memory lies elsewhere
    return Device(memory=memory, dma_ranges=ranges, max_segment_size=2**32 - 1), memory


# ---- NVMe


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(["prp", "sgl", "auto"]), pages=st.sampled_from([4, 16, 128]), lazy=st.booleans(),
       sizes=st.lists(st.tuples(st.sampled_from([0, 0x200, 0xE00]), st.integers(1, 64)), min_size=1, max_size=6),
       seed=st.integers(0, 2**32))  # fmt: skip
def test_blocks_to_and_from_memory_at_the_top(form: Any, pages: int, lazy: bool, sizes: list[tuple[int, int]],
                                              seed: int) -> None:  # fmt: skip
    """Rings and pools take the first IOVA from the top down, and are given back where data must end at 2**64."""
    controller, memory, rng = NvmeController(DISK), PhysMemory(4 << 20), random.Random(seed)
    dev = Device(memory=memory, iommu=Iommu("lazy" if lazy else "strict"), forcedac=True, **controller.limits)
    hole = dev.iova_try_alloc(0, pages * PAGE)
    assert hole is not None and int(hole.addr) == TOP - pages * PAGE
    controller.attach(dev)
    before = live(dev)
    with Nvme(controller, dev, form=form) as driver:
        dev.iova_free(hole)
        for off, blocks in sizes:
            n = blocks * 512
            at = rng.randrange(0, 400) * PAGE + off
            sector = rng.choice([0, DISK // 512 - blocks])
            for op in ("write", "read"):
                controller.media[sector * 512 :][:n] = rng.randbytes(n)
                memory.write(memory.phys(at), rng.randbytes(n))
                driver.run(Bio([(memory.phys(at), n)], op=op, sector=sector))
                assert bytes(controller.media[sector * 512 :][:n]) == memory.read(memory.phys(at), n)
    dev.iommu.advance(10_000_000)
    gone = {k: before[k] - v for k, v in live(dev).items() if v != before[k]}
    assert gone == {"iova_live": 1, "iova_live_bytes": pages * PAGE}


def pages_of(prp: Any) -> list[int]:
    return [int(prp.prp1), *([int(prp.prp2)] if prp.prp2 is not None else []), *(int(p) for page in prp.lists for p in page)]


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(1, 600), min_size=1, max_size=4), first=st.sampled_from([0, 4, 0xFFC]),
       short=st.sampled_from([0, 4, 0xFF0]), top=st.integers(0, 3))  # fmt: skip
def test_prp_entries_of_segments_that_end_there(counts: list[int], first: int, short: int, top: int) -> None:
    segments, want = [], []
    for i, n in enumerate(counts):
        start = TOP - n * PAGE if i == top % len(counts) else (i + 1) << 40
        a, b = start + (first if i == 0 else 0), start + n * PAGE - (short if i == len(counts) - 1 else 0)
        if a >= b:
            return
        segments.append((a, b - a))
        want += [max(p, a) for p in range(start, b, PAGE)]
    assert pages_of(build_prp(segments)) == want


def test_blocks_at_the_end_and_beyond() -> None:
    controller, memory = NvmeController(DISK), PhysMemory(1 << 20)
    dev = Device(memory=memory, iommu=Iommu(), **controller.limits)
    controller.attach(dev)
    last = DISK // 512 - 1
    with Nvme(controller, dev) as driver:
        controller.media[:] = b"x" * DISK
        for op in ("write", "read"):
            driver.run(Bio([(memory.phys(0), 512)], op=op, sector=last))
        assert bytes(controller.media[-512:]) == memory.read(memory.phys(0), 512)
        was = bytes(controller.media)
        for sector in (last, last + 1, 2**31, 2**32 - 1, 2**32, 2**55, 2**63 - 1):
            for op in ("write", "read"):
                with pytest.raises(NvmeError) as e:
                    driver.run(Bio([(memory.phys(0), 1024)], op=op, sector=sector))
                assert e.value.status & 0x7FF == LBA_RANGE and e.value.lba == sector
        for lba, blocks in ((last, 2), (LAST, 1), (LAST, 65536), (TOP - 65536, 65536), (TOP - 4, 8), (last + 1, 1)):
            for command in (driver.write_zeroes, lambda lba, blocks: driver.deallocate([(0, 0), (lba, blocks)])):
                with pytest.raises(NvmeError) as e:
                    command(lba, blocks)
                assert e.value.status & 0x7FF == LBA_RANGE
        assert bytes(controller.media) == was
        driver.write_zeroes(last, 1)
        assert bytes(controller.media) == was[:-512] + bytes(512)
        wrong: tuple[Any, ...] = ((TOP, 1), (-1, 1), (0, 1 << 32), (0, -1), (0, TOP), (0.5, 1), (0, "1"))
        for lba, blocks in (*wrong, (0, 65537), (0, 0)):
            with pytest.raises(DmaValueError, match=" to "):
                driver.command(8, lba, blocks)
        for bad in wrong:
            with pytest.raises(DmaValueError, match=" to "):
                driver.deallocate([bad])
        with pytest.raises(DmaValueError, match="at most 65536 blocks"):  # its count would have lost its high bits
            driver.run(Request([Bio([(memory.phys(0), n)], op="write") for n in (1 << 31, 1 << 31, 512)]))
        with pytest.raises(DmaValueError, match="sector"):
            driver.run(Bio([(memory.phys(0), 512)], sector=2**63))


def test_descriptors_have_32_bits_for_a_length() -> None:
    for n, good in ((2**32 - 1, True), (2**32, False), (2**32 + 512, False)):
        for segments in ([(0, n)], [(0, 512), (1 << 40, n)]):
            if good:
                descriptors: Any = describe_request(segments, form="sgl").descriptors
                assert descriptors.blocks[-1][1] == n
            else:
                with pytest.raises(DmaValueError, match="32 bits"):
                    describe_request(segments, form="sgl")
    huge = 2**63 - 1
    assert describe_request([(0, PAGE), (1 << 20, PAGE)], sgl_threshold=huge).rule == "below-threshold"


def test_a_controller_reads_lists_and_data_up_to_the_top() -> None:
    dev, memory = direct()
    controller = NvmeController(DISK)
    it = raw.Raw(controller, dev)
    controller.media[: 2 * PAGE] = data = os.urandom(2 * PAGE)
    read = raw.cmd(raw.READ, blocks=8)
    assert it.io.run(raw.with_sgl(read, raw.sgl(HIGH, PAGE)))[0] == 0
    assert memory.read(memory.phys(63 * PAGE), PAGE) == data[:PAGE]
    assert it.io.run(raw.cmd(raw.READ, HIGH - PAGE, HIGH, blocks=16))[0] == 0
    assert memory.read(memory.phys(62 * PAGE), 2 * PAGE) == data
    # a list that ends at the top, of data that ends below it
    memory.write(memory.phys(64 * PAGE - 32), raw.sgl(HIGH - PAGE, 2048) + raw.sgl(HIGH - 2 * PAGE, 2048))
    assert it.io.run(raw.with_sgl(read, raw.sgl(TOP - 32, 32, 3)))[0] == 0
    assert memory.read(memory.phys(62 * PAGE), 2048) + memory.read(memory.phys(61 * PAGE), 2048) == data[:PAGE]
    # what passes 2**64 is out of reach, and so is what only touches it from both sides
    for descriptor in (raw.sgl(TOP - 2048, PAGE), raw.sgl(TOP - 16, 32, 3), raw.sgl(LAST, PAGE)):
        assert it.io.run(raw.with_sgl(read, descriptor))[0] & 0x7FF in (0x04, 0x0D)
    for opcode, entry in ((5, 16), (1, 64)):
        for size, status in ((PAGE // entry + 1, 0x4013), (PAGE // entry, 0)):
            assert it.create(opcode, HIGH, number=3, size=size, cq=3 if opcode == 1 else 0) == status
    it.regs.write(0x14, 0)
    it.regs.write(0x28, HIGH, 8)
    it.regs.write(0x24, 15 << 16 | 64)  # an admin queue of one entry too many
    it.regs.write(0x14, 4 << 20 | 6 << 16 | 1)
    assert controller.fatal


# ---- the HCA


def hca(**kw: Any) -> tuple[PhysMemory, Device, Context, Pd]:
    memory, it = PhysMemory(1 << 18, layout="scattered"), Rnic()
    dev = Device(memory=memory, iommu=Iommu(), **{**it.limits, **kw})
    it.attach(dev)
    it.connect(it)
    hole = dev.iova_try_alloc(0, 4 * PAGE)  # the last four pages, for what is mapped next
    context = Context(it, dev)
    assert hole is not None
    dev.iova_free(hole)
    return memory, dev, context, Pd(context)


def test_a_key_that_ends_at_the_top() -> None:
    memory, dev, context, pd = hca(forcedac=True)
    n = 3 * PAGE + 40
    memory.write(memory.phys(0), os.urandom(PAGE))
    with Qp(pd) as a, Qp(pd) as b:
        a.connect(b.qp_num)
        b.connect(a.qp_num)
        with Mr(pd, memory, 2 * PAGE - n % PAGE, n, iova=TOP - n, access=15) as its, Mr(pd, memory, 0, PAGE) as mine:
            assert int(its.addr) + n == TOP
            assert dev.backend.iova_to_phys(LAST) == memory.phys(5 * PAGE - 1)  # as the device reaches it, too
            a.write([mine.segment(0, 100)], TOP - 100, its.rkey)
            a.read([mine.segment(200, 100)], TOP - 100, its.rkey)
            assert memory.read(memory.phys(200), 100) == memory.read(memory.phys(0), 100)
            a.wait(a.fetch_add(mine.segment(8, 8), TOP - 8, its.rkey, 3))
            for addr, size in ((TOP - 99, 100), (TOP - 1, 2), (0, 1), (TOP - n - 1, 2)):
                with pytest.raises(CompletionError, match=r"remote access \(10\)"):
                    a.write([mine.segment(0, size)], addr, its.rkey)
                b.recover()
                a.recover()
            for entry in ((TOP - 8, 16, its.lkey), (TOP - 8, 16, 0), (LAST, 1 << 20, 0)):
                with pytest.raises(CompletionError, match=r"\(4\)"):
                    a.write([entry], TOP - n, its.rkey)
                b.recover()
                a.recover()
    context.close()
    assert not any(live(dev).values())


def command(it: Rnic, dev: Device, memory: PhysMemory, op: int, body: bytes) -> int:
    """One command by hand: its status."""
    regs, page = Mmio(it), dev.alloc_coherent(PAGE)
    with memoryview(page) as view:
        view[:64] = (struct.pack("<II", op, 0) + body).ljust(56, b"\0") + struct.pack("<iI", -1, 0)
    regs.write(0, page.addr, 8)
    regs.write(8, 1, 8)
    with memoryview(page) as view:
        status = struct.unpack_from("<i", view, 56)[0]
    page.free()
    return int(status)


@pytest.mark.parametrize(("iova", "length", "pages", "good"), [
    (0, PAGE, 1, True), (HIGH, PAGE, 1, True), (HIGH + 1, PAGE - 1, 1, True), (HIGH + 1, PAGE, 2, False),
    (0, LAST, 1, False), (1, LAST, 1, False), (PAGE, LAST, 1, False), (0, TOP - PAGE, 1 << 20, False),
    (0, (1 << 32) - 1, 1 << 20, True), (1, 1 << 32, 1 << 20, False), (LAST, 1, 1, True), (LAST, 2, 1, False),
])  # fmt: skip
def test_keys_and_their_tables(iova: int, length: int, pages: int, good: bool) -> None:
    it, memory = Rnic(), PhysMemory(PAGE)
    dev = Device(memory=memory)
    it.attach(dev)
    for table, fits in ((1 << 32, True), (TOP - 8 * pages, True), (TOP - 8 * pages + 4, False)):
        body = struct.pack("<QQQIIII", iova, length, table, 1, 15, pages, 0)
        assert (command(it, dev, memory, 6, body) == 0) == (good and fits)
    for base, entries, fits in ((TOP - 32 * 64, 64, True), (TOP - 32 * 64, 65, False)):
        assert (command(it, dev, memory, 1, struct.pack("<QI", base, entries)) == 0) == fits


def test_fast_registration_there() -> None:
    memory, dev, context, pd = hca(forcedac=True)
    with Qp(pd) as a, Qp(pd) as b, FastMr(pd, 16) as fast, Mr(pd, memory, 0, PAGE) as mine:
        a.connect(b.qp_num)
        b.connect(a.qp_num)
        with dev.map(Bio.from_memory(memory, [(12 * PAGE, 4 * PAGE)])) as m:
            work, taken = a.reg_mr(fast, m.segments, access=15)
            a.wait(work)
            assert taken == 1
            end = int(fast.addr) + fast.length
            a.write([mine.segment(0, 64)], end - 64, fast.rkey)
            assert memory.read(memory.phys(16 * PAGE - 64), 64) == memory.read(memory.phys(0), 64)
            with pytest.raises(CompletionError):
                a.write([mine.segment(0, 64)], end - 63, fast.rkey)
    context.close()


def test_registered_ranges_do_not_wrap() -> None:
    memory, dev, context, pd = hca(max_segment_size=2**63 - 1)
    with Registered(pd, max_pages=16) as back:
        above = Device(backend=back, memory=memory)
        state = above.iova_try_alloc(0, 4 * PAGE)
        assert state is not None
        for offset, size in ((2**63 - PAGE, 2**63 - 1), (2**62, PAGE), (0, 2**63 - 1), (13 * PAGE, 4 * PAGE)):
            with pytest.raises(Exception, match="34"):
                above.iova_link(state, memory.phys(0), offset, size)
        above.iova_free(state)
    context.close()
    assert not any(live(dev).values())
