"""An NVMe queue pair by hand, so that a test can say anything to a controller, also what is wrong."""

from __future__ import annotations

import struct
from typing import Any

from dmapath import Device
from dmapath.devices.nvme import NvmeController
from dmapath.mmio import Mmio

READ, WRITE = 2, 1


def cmd(opcode: int, first: int = 0, second: int = 0, *, blocks: int = 1, lba: int = 0, flags: int = 0, mptr: int = 0,
        nsid: int = 1, cdw: tuple[int, ...] = ()) -> bytes:  # fmt: skip
    words = cdw or (lba & 0xFFFFFFFF, lba >> 32, blocks - 1)
    words += (0,) * (6 - len(words))
    return struct.pack("<BBHIQQQQ6I", opcode, flags, 0, nsid, 0, mptr, first, second, *words)


def sgl(addr: int, n: int, kind: int = 0, subtype: int = 0) -> bytes:
    return struct.pack("<QIBBBB", addr, n, 0, 0, 0, kind << 4 | subtype)


def with_sgl(command: bytes, descriptor: bytes, *, flags: int = 0x40, mptr: int = 0) -> bytes:
    out = bytearray(command)
    out[1], out[24:40] = flags, descriptor
    out[16:24] = struct.pack("<Q", mptr)
    return bytes(out)


class Queue:
    """A submission and a completion queue of ``size`` entries, and their doorbells."""

    def __init__(self, device: Device, regs: Mmio, number: int, size: int) -> None:
        self.regs, self.number, self.size = regs, number, size
        self.sq, self.cq = device.alloc_coherent(64 * size), device.alloc_coherent(16 * size)
        self.tail = self.head = self.sent = 0
        self.phase = 1

    def send(self, command: bytes, *, ring: bool = True) -> int:
        self.sent += 1
        cid = self.sent & 0xFFFF
        with memoryview(self.sq) as view:
            view[64 * self.tail : 64 * self.tail + 64] = command[:2] + struct.pack("<H", cid) + command[4:]
        self.tail = (self.tail + 1) % self.size
        if ring:
            self.regs.write(0x1000 + 8 * self.number, self.tail)
        return cid

    def take(self) -> tuple[int, int, int] | None:
        """(command id, status without phase, result) of the next completion."""
        with memoryview(self.cq) as view:
            result, _, _, _, cid, status = struct.unpack_from("<IIHHHH", view, 16 * self.head)
        if status & 1 != self.phase:
            return None
        self.head = (self.head + 1) % self.size
        self.phase ^= self.head == 0
        self.regs.write(0x1000 + 8 * self.number + 4, self.head)
        return cid, status >> 1, result

    def run(self, command: bytes) -> tuple[int, int]:
        """Send one and wait: (status, result)."""
        cid = self.send(command)
        for _ in range(50):
            self.regs.relax()
            done = self.take()
            if done is not None:
                assert done[0] == cid
                return done[1], done[2]
        raise AssertionError("the controller does not answer")

    def free(self) -> None:
        self.sq.free()
        self.cq.free()


class Raw:
    """A controller that is up, with one I/O queue."""

    def __init__(self, controller: NvmeController, device: Device, *, size: int = 16) -> None:
        self.controller, self.device, self.regs = controller, device, Mmio(controller)
        controller.attach(device)
        self.admin = Queue(device, self.regs, 0, 16)
        self.io = Queue(device, self.regs, 1, size)
        self.pages: list[Any] = []
        self.enable()

    def enable(self) -> None:
        self.regs.write(0x14, 0)
        assert self.regs.read(0x1C) == 0
        self.regs.write(0x24, 15 << 16 | 15)
        self.regs.write(0x28, self.admin.sq.addr, 8)
        self.regs.write(0x30, self.admin.cq.addr, 8)
        self.regs.write(0x14, 4 << 20 | 6 << 16 | 1)
        assert self.regs.read(0x1C) == 1
        assert self.create(5, self.io.cq.addr) == self.create(1, self.io.sq.addr, cq=1) == 0

    def create(
        self, opcode: int, addr: int, *, number: int = 1, size: int | None = None, cq: int = 0, flags: int = 1
    ) -> int:
        entries = self.io.size if size is None else size
        words = (((entries - 1) & 0xFFFF) << 16 | number, cq << 16 | flags)
        return self.admin.run(cmd(opcode, int(addr), nsid=0, cdw=words))[0]

    def page(self, data: bytes = b"", size: int = 4096) -> int:
        """Coherent memory with something in it; its DMA address."""
        made = self.device.alloc_coherent(size)
        with memoryview(made) as view:
            view[: len(data)] = data
        self.pages.append(made)
        return int(made.addr)

    def bytes(self, addr: int, n: int) -> bytes:
        """What is at a DMA address of ``page``."""
        for made in self.pages:
            if int(made.addr) <= addr < int(made.addr) + len(made):
                with memoryview(made) as view:
                    return bytes(view[addr - int(made.addr) :][:n])
        raise AssertionError(hex(addr))

    def close(self) -> None:
        self.regs.write(0x14, 0)
        for made in (*self.pages, self.admin, self.io):
            made.free()
