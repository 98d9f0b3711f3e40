"""The NVMe controller by hand: what is right moves the right bytes, what is wrong gives the specification's status and names
the field, and nothing of it moves a byte or stops the controller.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import live
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_raw import READ, WRITE, Raw, cmd, sgl, with_sgl

from dmapath import AddressTypeError, Device, DmaValueError, Iommu, NotSupportedError, PhysMemory, StateError
from dmapath.devices.nvme import NvmeController
from dmapath.mmio import Mmio
from dmapath.nvme_status import DNR, status_name

DISK = 1 << 20
PAGE = 4096


@pytest.fixture
def raw() -> Iterator[Raw]:
    device = Device(memory=PhysMemory(1 << 20), iommu=Iommu("strict"))
    before = live(device)
    made = Raw(NvmeController(DISK, mdts=5), device)
    made.controller.media[:] = bytes(range(256)) * (DISK // 256)
    yield made
    made.close()
    assert live(device) == before


def entries(*addresses: int) -> bytes:
    return struct.pack(f"<{len(addresses)}Q", *addresses)


def test_identify(raw: Raw) -> None:
    at = raw.page()
    assert raw.admin.run(cmd(6, at, nsid=0, cdw=(1,)))[0] == 0
    ctrl = raw.bytes(at, PAGE)
    assert ctrl[24:64].decode().strip() == "dmapath NVMe controller"
    assert (ctrl[77], ctrl[512], ctrl[513]) == (5, 0x66, 0x44)
    assert int.from_bytes(ctrl[536:540], "little") == 1 | 1 << 16 | 1 << 17 | 1 << 19
    assert raw.admin.run(cmd(6, at, nsid=1, cdw=(0,)))[0] == 0
    ns = raw.bytes(at, PAGE)
    assert (int.from_bytes(ns[:8], "little"), ns[130], int.from_bytes(ns[128:130], "little")) == (DISK // 512, 9, 0)
    assert raw.admin.run(cmd(6, at, nsid=0, cdw=(2,)))[0] == 0
    assert struct.unpack("<2I", raw.bytes(at, 8)) == (1, 0)
    assert raw.admin.run(cmd(6, at, nsid=2, cdw=(0,)))[0] & 0x7FF == 0x0B
    assert raw.admin.run(cmd(9, nsid=0, cdw=(7,)))[1] == 15 << 16 | 15
    assert raw.admin.run(cmd(8, nsid=0, cdw=(0,))) == (0, 1)
    assert raw.admin.run(cmd(0x0A, nsid=0, cdw=(99,)))[0] & 0x7FF == 2


def test_prp_entries_lists_and_chains(raw: Raw) -> None:
    media = bytes(raw.controller.media)
    pages = [raw.page() for _ in range(5)]
    assert raw.io.run(cmd(READ, pages[0] + 0x200, pages[1], blocks=8))[0] == 0
    assert raw.bytes(pages[0] + 0x200, 0xE00) + raw.bytes(pages[1], 0x200) == media[:0x1000]
    table = raw.page(entries(*pages[1:4]))
    assert raw.io.run(cmd(READ, pages[0] + 0x800, table, blocks=24, lba=3))[0] == 0
    assert b"".join(raw.bytes(p, PAGE) for p in pages[1:4])[:0x2800] == media[3 * 512 + 0x800 :][:0x2800]
    # a list that begins near the end of its page, where the last entry there leads on
    more = raw.page(entries(*pages[2:5]))
    table = raw.page(bytes(PAGE - 16) + entries(pages[1], more))
    assert raw.io.run(cmd(READ, pages[0], table + PAGE - 16, blocks=40))[0] == 0
    assert b"".join(raw.bytes(p, PAGE) for p in pages) == media[: 5 * PAGE]
    # what exactly fills the page of list is no chain
    table = raw.page(bytes(PAGE - 16) + entries(pages[3], pages[1]))
    assert raw.io.run(cmd(READ, pages[0], table + PAGE - 16, blocks=24))[0] == 0
    assert raw.bytes(pages[1], PAGE) == media[2 * PAGE : 3 * PAGE]


def test_sgl_data_segments_and_buckets(raw: Raw) -> None:
    media = bytes(raw.controller.media)
    a, b = raw.page(), raw.page()
    assert raw.io.run(with_sgl(cmd(READ, blocks=2), sgl(a + 1, 1024)))[0] == 0
    assert raw.bytes(a + 1, 1024) == media[:1024]
    last = raw.page(sgl(b + 3, 100) + sgl(0, 0) + sgl(a + 0x800, 312))
    first = raw.page(sgl(a, 500) + sgl(0, 112, 1) + sgl(last, 48, 3))
    assert raw.io.run(with_sgl(cmd(READ, blocks=2, lba=9), sgl(first, 48, 2)))[0] == 0
    want = media[9 * 512 :][:1024]
    assert raw.bytes(a, 500) + want[500:612] + raw.bytes(b + 3, 100) + raw.bytes(a + 0x800, 312) == want
    # of data that the host gives, a bucket has no effect
    source = raw.page(os.urandom(1024))
    table = raw.page(sgl(source, 512) + sgl(0, 77, 1) + sgl(source + 512, 512))
    assert raw.io.run(with_sgl(cmd(WRITE, blocks=2, lba=1), sgl(table, 48, 3)))[0] == 0
    assert bytes(raw.controller.media[512:1536]) == raw.bytes(source, 1024)
    # 40 descriptors cross what the controller reads at a time
    table = raw.page(b"".join(sgl(a + 8 * i, 8) for i in range(64)))
    assert raw.io.run(with_sgl(cmd(READ, blocks=1), sgl(table, 64 * 16, 3)))[0] == 0
    assert raw.bytes(a, 512) == media[:512]


#: Name -> (command, status, byte of the command that is to blame) for {a}: a page, {u}: nowhere.
def bad(raw: Raw) -> dict[str, tuple[bytes, int, int]]:
    a, nowhere = raw.page(bytes(PAGE)), 0x7FFF0000
    odd = raw.page(entries(a, a + 8))
    far = raw.page(entries(a, nowhere))
    chain = raw.page(bytes(PAGE - 8) + entries(a + 8))
    loop = raw.page()
    with_loop = raw.page(sgl(a, 1) * 255 + sgl(loop, PAGE, 2))
    with memoryview(raw.pages[-2]) as view:
        view[:PAGE] = sgl(a, 0) * 255 + sgl(with_loop, PAGE, 2)
    seg = raw.page
    r8, r24, r2 = (cmd(READ, blocks=n) for n in (8, 24, 2))
    return {
        "opcode": (cmd(0x7F), 0x01, 0),
        "fused": (cmd(READ, a, flags=1), 0x02, 1),
        "namespace": (cmd(READ, a, nsid=2), 0x0B, 4),
        "range": (cmd(READ, a, lba=DISK // 512 - 1, blocks=2), 0x80, 40),
        "range-wraps": (cmd(READ, a, lba=2**64 - 1), 0x80, 40),
        "mdts": (cmd(READ, a, odd, blocks=257), 0x02, 48),
        "protection": (cmd(READ, a, cdw=(0, 0, 1 << 29)), 0x02, 51),
        "prp1-byte": (cmd(READ, a + 2), 0x13, 24),
        "prp2-offset": (cmd(READ, a, a + 8, blocks=16), 0x13, 32),
        "list-offset": (cmd(READ, a, odd + 4, blocks=24), 0x13, 32),
        "entry-offset": (cmd(READ, a, odd, blocks=24), 0x13, 32),
        "chain-offset": (cmd(READ, a, chain + PAGE - 8, blocks=24), 0x13, 32),
        "list-nowhere": (cmd(READ, a, nowhere, blocks=24), 0x04, 32),
        "data-nowhere": (cmd(READ, nowhere), 0x04, 24),
        "entry-nowhere": (cmd(READ, a, far, blocks=24), 0x04, 24),
        "psdt": (with_sgl(r8, sgl(a, 4096), flags=0xC0), 0x02, 1),
        "short": (with_sgl(r8, sgl(a, 4095)), 0x0F, 32),
        "long": (with_sgl(r8, sgl(a, 4097)), 0x0F, 32),
        "type": (with_sgl(r8, sgl(a, 4096, 4)), 0x11, 39),
        "vendor-type": (with_sgl(r8, sgl(a, 4096, 15)), 0x11, 39),
        "subtype": (with_sgl(r8, sgl(a, 4096, 0, 1)), 0x11, 39),
        "wraps": (with_sgl(r8, sgl(2**64 - 8, 4096)), 0x04, 24),
        "sgl-nowhere": (with_sgl(r8, sgl(nowhere, 4096)), 0x04, 24),
        "segment-nowhere": (with_sgl(r8, sgl(nowhere, 16, 3)), 0x04, 24),
        "segment-length": (with_sgl(r8, sgl(a, 17, 3)), 0x0D, 32),
        "segment-empty": (with_sgl(r8, sgl(a, 0, 3)), 0x0D, 32),
        "segment-not-last": (with_sgl(r2, sgl(seg(sgl(a, 16, 3) + sgl(a, 1024)), 32, 2)), 0x0D, 39),
        "segment-without-next": (with_sgl(r2, sgl(seg(sgl(a, 512) + sgl(a, 512)), 32, 2)), 0x0D, 39),
        "bucket-without-next": (with_sgl(r2, sgl(seg(sgl(a, 512) + sgl(0, 512, 1)), 32, 2)), 0x0D, 39),
        "last-leads-on": (with_sgl(r2, sgl(seg(sgl(a, 512) + sgl(a, 16, 3)), 32, 3)), 0x0D, 39),
        "bucket-long": (with_sgl(r2, sgl(seg(sgl(a, 512) + sgl(0, 513, 1)), 32, 3)), 0x0F, 32),
        "loop": (with_sgl(r24, sgl(loop, PAGE, 2)), 0x0E, 24),
        "dsm-range": (cmd(9, seg(struct.pack("<IIQ", 0, 1, DISK)), cdw=(0, 4)), 0x80, 40),
        "zeroes-range": (cmd(8, lba=DISK // 512), 0x80, 40),
    }  # fmt: skip


def test_every_mistake_has_its_status_and_moves_nothing(raw: Raw) -> None:
    raw.controller.media[:] = os.urandom(DISK)
    media = bytes(raw.controller.media)
    cases = bad(raw)
    before = [raw.bytes(int(p.addr), len(p)) for p in raw.pages]
    for name, (command, status, byte) in cases.items():
        for opcode in {command[0], WRITE if command[0] == READ and not name.startswith("bucket") else command[0]}:
            got, _ = raw.io.run(bytes([opcode]) + command[1:])
            assert got & 0x7FF == status, (name, status_name(got))
            assert bool(got & DNR) == (status != 0x04 or name == "wraps"), name
            entry = raw.controller.errors[0]
            assert (entry.queue, entry.status & 0x7FF, entry.byte) == (1, status, byte), name
        # a transfer that meets nowhere half-way leaves its own blocks or pages in any state, and no others
        kept = 24 * 512 if name == "entry-nowhere" else 0
        assert bytes(raw.controller.media[kept:]) == media[kept:], name
        if name != "entry-nowhere":
            assert [raw.bytes(int(p.addr), len(p)) for p in raw.pages] == before, name
        raw.controller.media[:kept] = media[:kept]
        for page, data in zip(raw.pages, before, strict=True):
            with memoryview(page) as view:
                view[:] = data
        assert raw.io.run(cmd(READ, raw.page(), blocks=8))[0] == 0, f"alive after {name}"
        raw.pages.pop().free()


def test_the_error_log_is_a_log_page(raw: Raw) -> None:
    for i in range(70):
        raw.io.run(cmd(0x70 + i % 3, lba=i))
    at = raw.page()
    assert raw.admin.run(cmd(2, at, nsid=0, cdw=(1 | (1023 << 16),)))[0] == 0
    count, sq, cid, status, where, lba, nsid = struct.unpack_from("<QHHHHQI", raw.bytes(at, 64))
    newest = raw.controller.errors[0]
    assert (count, sq, cid, status >> 1, where, lba, nsid) == (70, 1, newest.command, newest.status, 0, 69, 1)
    assert (newest.name, newest.byte, newest.bit, newest.lba) == ("invalid command opcode", 0, 0, 69)
    assert len(raw.controller.errors) == 64
    assert raw.admin.run(cmd(2, at, nsid=0, cdw=(2 | 3 << 16,)))[0] & 0x7FF == 0x109
    assert raw.controller.counters()["errors"] == 71


def test_queues_are_made_and_unmade_by_the_rules(raw: Raw) -> None:
    at = raw.page()
    code = [raw.create(5, at, number=n, size=size, flags=flags) & 0x7FF for n, size, flags in
            ((0, 16, 1), (1, 16, 1), (17, 16, 1), (2, 1, 1), (2, 1025, 1), (2, 16, 0))]  # fmt: skip
    assert code == [0x101, 0x101, 0x101, 0x102, 0x102, 0x02]
    assert raw.create(5, at + 8, number=2) & 0x7FF == 0x13
    assert raw.create(1, at, number=2, cq=2) & 0x7FF == 0x100
    assert raw.create(1, at, number=1, cq=1) & 0x7FF == 0x101
    assert raw.admin.run(cmd(4, nsid=0, cdw=(1,)))[0] & 0x7FF == 0x10C  # a queue completes there
    assert raw.admin.run(cmd(0, nsid=0, cdw=(9,)))[0] & 0x7FF == 0x101
    assert raw.admin.run(cmd(5, at, nsid=0, cdw=(15 << 16 | 2, 17 << 16 | 1)))[0] & 0x7FF == 0x108
    assert raw.admin.run(cmd(6, at, flags=0x40, nsid=1, cdw=(1,)))[0] & 0x7FF == 0x02  # admin commands take PRP alone
    # a queue that goes takes with it what was fetched and not done
    raw.io.send(cmd(READ, at))
    assert raw.admin.run(cmd(0, nsid=0, cdw=(1,)))[0] == 0
    assert raw.admin.run(cmd(4, nsid=0, cdw=(1,)))[0] == 0
    raw.regs.write(0x1008, 5)
    assert raw.controller.counters()["bad_doorbells"] == 1


def test_doorbells_that_say_nonsense_are_ignored(raw: Raw) -> None:
    for at, value in ((0x1008, 16), (0x100C, 5), (0x1000 + 8 * 16, 1), (0x1009, 1), (0x1FF8, 1)):
        raw.regs.write(at, value)
    assert raw.controller.counters()["bad_doorbells"] == 5
    assert raw.io.run(cmd(0))[0] == 0


def test_a_full_completion_queue_holds_commands_back() -> None:
    device = Device(memory=PhysMemory(1 << 20))
    raw = Raw(NvmeController(DISK), device, size=4)
    sent = [raw.io.send(cmd(0)) for _ in range(3)]
    assert raw.controller.work() == 3
    extra = raw.io.send(cmd(0))
    assert raw.controller.work() == 0  # no room for its completion
    assert [raw.io.take() for _ in range(2)] == [(sent[0], 0, 0), (sent[1], 0, 0)]
    assert raw.controller.work() == 1
    assert [raw.io.take(), raw.io.take()] == [(sent[2], 0, 0), (extra, 0, 0)]
    assert raw.io.take() is None
    raw.close()


def test_a_queue_out_of_reach_is_fatal_until_a_reset(raw: Raw) -> None:
    assert raw.create(5, 0x7FFF0000, number=2) == 0
    assert raw.create(1, 0x7FFF0000, number=2, cq=2) == 0
    raw.regs.write(0x1010, 1)
    raw.regs.relax()
    assert raw.controller.fatal
    assert raw.regs.read(0x1C) == 3
    for queue in (raw.admin, raw.io):
        queue.tail = queue.head = 0
        queue.phase = 1
        for ring in (queue.sq, queue.cq):
            with memoryview(ring) as view:
                view[:] = bytes(len(ring))
    raw.enable()
    assert raw.io.run(cmd(0))[0] == 0


def test_registers(raw: Raw) -> None:
    assert raw.regs.read(0, 8) & 0xFFFF == 1023
    assert raw.regs.read(8) == 0x20000
    raw.regs.write(0x0C, 5)
    assert raw.regs.read(0x0C) == 5
    raw.regs.write(0x10, 4)
    assert raw.regs.read(0x10) == 1
    raw.regs.write(0x28, 0x1234, 4)
    raw.regs.write(0x2C, 0x5678, 4)
    assert raw.regs.read(0x28, 8) == 0x567800001234
    raw.regs.write(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1)
    assert raw.regs.read(0x1C) >> 2 == 2  # shut down
    raw.regs.write(0x14, 0)
    raw.regs.write(0x14, 1 << 7 | 1)  # pages of 8 KiB
    assert raw.regs.read(0x1C) & 2
    with pytest.raises(DmaValueError, match="4 or 8"):
        raw.regs.read(0, 2)


@pytest.mark.parametrize("form", ["prp", "sgl", "segment"])
def test_metadata(form: str) -> None:
    device = Device(memory=PhysMemory(1 << 20), iommu=Iommu("strict"))
    raw = Raw(NvmeController(DISK, metadata_size=8), device)
    data, metas = os.urandom(1024), os.urandom(16)
    a, m = raw.page(data), raw.page(metas)
    table = raw.page(sgl(raw.page(sgl(m, 10) + sgl(m + 10, 6)), 32, 3) + sgl(m, 16))

    def build(opcode: int) -> bytes:
        if form == "prp":
            return cmd(opcode, a, lba=5, blocks=2, mptr=m)
        flags, mptr = (0x40, m) if form == "sgl" else (0x80, table)
        return with_sgl(cmd(opcode, lba=5, blocks=2), sgl(a, 1024), flags=flags, mptr=mptr)

    assert raw.io.run(build(WRITE))[0] == 0
    assert (bytes(raw.controller.media[2560:3584]), bytes(raw.controller.metadata[40:56])) == (data, metas)
    raw.controller.media[2560:3584], raw.controller.metadata[40:56] = bytes(1024), bytes(range(16))
    assert raw.io.run(build(READ))[0] == 0
    assert (raw.bytes(a, 1024), raw.bytes(m, 16)) == (bytes(1024), bytes(range(16)))
    # mistakes: metadata out of reach moves no data
    assert raw.io.run(cmd(WRITE, a, blocks=2, mptr=m + 2))[0] & 0x7FF == 0x02
    odd = raw.page(sgl(m, 15))
    assert raw.io.run(with_sgl(cmd(WRITE, blocks=2), sgl(a, 1024), flags=0x80, mptr=odd))[0] & 0x7FF == 0x10
    assert raw.io.run(with_sgl(cmd(WRITE, blocks=2), sgl(a, 1024), flags=0x80, mptr=odd + 4))[0] & 0x7FF == 0x0D
    assert raw.io.run(cmd(8, lba=5))[0] == 0
    assert bytes(raw.controller.metadata[40:48]) == bytes(8)
    raw.close()


@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6),
       opcode=st.sampled_from([READ, WRITE]), form=st.sampled_from(["prp", "sgl"]))  # fmt: skip
def test_corrupted_descriptors_hurt_nobody_else(flips: list[tuple[int, int, int]], opcode: int, form: str) -> None:
    """Bytes of the command and of its lists are overwritten at random: it completes with some status, the arena (which is
    not mapped) and the other blocks stay as they are, and the next command works.
    """
    memory = PhysMemory(1 << 16)
    memory.write(memory.phys(0), bytes(range(256)) * 256)
    device = Device(memory=memory, iommu=Iommu("strict"))
    raw = Raw(NvmeController(DISK), device)
    raw.controller.media[:] = b"m" * DISK
    pages = [raw.page(b"p" * PAGE) for _ in range(3)]
    if form == "prp":
        lists = [raw.page(bytes(PAGE - 8)), raw.page(entries(pages[1], pages[2]))]
        with memoryview(raw.pages[-2]) as view:
            view[PAGE - 8 :] = entries(lists[1])
        command = bytearray(cmd(opcode, pages[0], lists[0] + PAGE - 8, lba=100, blocks=24))
    else:
        lists = [raw.page(), raw.page(sgl(pages[1], 4096) + sgl(pages[2], 4096))]
        with memoryview(raw.pages[-2]) as view:
            view[:32] = sgl(pages[0], 4096) + sgl(lists[1], 32, 3)
        command = bytearray(with_sgl(cmd(opcode, lba=100, blocks=24), sgl(lists[0], 32, 2)))
    for where, at, value in flips:
        if where < 2:
            with memoryview(raw.pages[3 + where]) as view:
                view[at if form == "prp" or at > 2048 else at % 48] = value
        elif 24 <= at % 64 < 40 or at % 64 == 1:
            command[at % 64] = value
    raw.io.run(bytes(command))
    assert memory.read(memory.phys(0), 1 << 16) == bytes(range(256)) * 256
    media = bytes(raw.controller.media)
    assert media[: 100 * 512] == b"m" * 51200
    assert media[124 * 512 :] == b"m" * (DISK - 124 * 512)
    assert opcode == WRITE or media == b"m" * DISK
    assert not raw.controller.fatal
    assert raw.io.run(cmd(READ, raw.page(), blocks=8))[0] == 0
    raw.close()


def test_media_in_a_file_or_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    device = Device(memory=PhysMemory(1 << 16))
    raw = Raw(NvmeController(path, block_size=4096), device)
    assert raw.io.run(cmd(WRITE, raw.page(b"x" * 4096), lba=1))[0] == 0
    assert path.read_bytes() == bytes(4096) + b"x" * 4096
    raw.close()
    assert NvmeController(bytearray(1024)).blocks == 2


def test_arguments_are_checked() -> None:
    for options in ({"block_size": 1024}, {"metadata_size": 3}, {"mdts": 12}, {"order": "lifo"}, {"media": b"x" * 512},
                    {"media": 100}):  # fmt: skip
        with pytest.raises(DmaValueError):
            NvmeController(**options)
    with pytest.raises(NotSupportedError, match="memory"):
        NvmeController(DISK).attach(Device())
    controller, device = NvmeController(DISK), Device(memory=PhysMemory(4096))
    controller.attach(device)
    with pytest.raises(StateError, match="already"):
        controller.attach(device)
    with pytest.raises(AddressTypeError, match="mmio"):
        Mmio(device)
