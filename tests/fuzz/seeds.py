"""The first inputs of the fuzzers: commands and work requests that are right. ``python seeds.py`` writes them to corpus/."""

from __future__ import annotations

import struct
from pathlib import Path

HERE = Path(__file__).parent


def nvme(choices: int, commands: list[bytes], admin: bytes = b"", rest: dict[int, bytes] | None = None) -> bytes:
    """An input of nvme_fuzz.c."""
    memory = bytearray(0x5000)
    for i, command in enumerate(commands):
        memory[i * 64 : i * 64 + 64] = command
    memory[8 * 64 : 9 * 64] = admin.ljust(64, b"\0")
    for at, data in (rest or {}).items():
        memory[at : at + len(data)] = data
    return bytes([choices | (len(commands) - 1) << 5]) + bytes(memory).rstrip(b"\0") + bytes(8)


def cmd(opcode: int, cid: int, first: int, second: int, blocks: int, lba: int = 0, flags: int = 0, mptr: int = 0) -> bytes:
    """A command with its data pointer."""
    return struct.pack("<BBHIQQQQIIIIII", opcode, flags, cid, 1, 0, mptr, first, second, lba, 0, blocks - 1, 0, 0, 0)


def sgl(addr: int, n: int, kind: int) -> bytes:
    """An SGL descriptor."""
    return struct.pack("<QIBBBB", addr, n, 0, 0, 0, kind << 4)


def halves(d: bytes) -> tuple[int, int]:
    """A descriptor as the two halves of a data pointer."""
    first, second = struct.unpack("<QQ", d)
    return first, second


def wqe(
    op: int,
    sges: list[tuple[int, int, int]],
    remote: int = 0,
    rkey: int = 0,
    imm: int = 0,
    flags: int = 1,
    compare: int = 0,
    swap: int = 0,
) -> bytes:
    """A work queue entry."""
    head = struct.pack("<QBBBBIQQQII16x", 9, op, flags, len(sges), 0, imm, remote, compare, swap, rkey, 0)
    return (head + b"".join(struct.pack("<QII", *s) for s in sges)).ljust(256, b"\0")


def rnic(choices: int, entries: list[bytes], command: bytes = b"", receives: int = 4) -> bytes:
    """An input of rnic_fuzz.c."""
    memory = bytearray(0x3100)
    for i, entry in enumerate(entries):
        memory[i * 256 : i * 256 + 256] = entry
    for i in range(receives):
        memory[(8 + i) * 256 : (9 + i) * 256] = wqe(0, [(0x10200, 0x800, 0x101), (0x8000, 0x100, 0)])
    memory[12 * 256 : 12 * 256 + len(command)] = command
    return bytes([choices | 8 | (len(entries) - 1) << 5]) + bytes(memory)


def all_seeds() -> dict[str, bytes]:
    """File name -> input."""
    lists = {0x2000: struct.pack("<4Q", 0x4000, 0x5000, 0x6000, 0x7000)}
    chain = {0x2FF0: struct.pack("<2Q", 0x4000, 0x3000), 0x3000: struct.pack("<3Q", 0x5000, 0x6000, 0x7000)}
    segment = {
        0x2000: sgl(0x4000, 512, 0) + sgl(0, 256, 1) + sgl(0x2100, 32, 3),
        0x2100: sgl(0x5001, 100, 0) + sgl(0x6000, 156, 0),
    }
    last = halves(sgl(0x2000, 48, 2))
    return {
        "nvme/prp-one": nvme(0, [cmd(2, 1, 0x4200, 0, 1), cmd(1, 2, 0x4000, 0x5000, 16)]),
        "nvme/prp-list": nvme(0, [cmd(2, 1, 0x4200, 0x2000, 32), cmd(1, 2, 0x4000, 0x2000, 32)], rest=lists),
        "nvme/prp-chain": nvme(4, [cmd(2, 1, 0x4000, 0x2FF0, 40)], rest=chain),
        "nvme/sgl-one": nvme(3, [cmd(2, 1, *halves(sgl(0x4001, 1024, 0)), 2, flags=0x40)]),
        "nvme/sgl-segments": nvme(7, [cmd(2, 1, *last, 2, flags=0x40), cmd(1, 2, *last, 2, flags=0x40)], rest=segment),
        "nvme/metadata": nvme(
            11,
            [cmd(1, 1, 0x4000, 0, 2, mptr=0x6000), cmd(2, 2, *halves(sgl(0x4000, 512, 0)), 1, flags=0x80, mptr=0x2000)],
            rest={0x2000: sgl(0x6000, 8, 0)},
        ),
        "nvme/others": nvme(
            0,
            [
                cmd(0, 1, 0, 0, 1),
                cmd(8, 2, 0, 0, 7),
                struct.pack("<BBHIQQQQII", 9, 0, 3, 1, 0, 0, 0x4000, 0, 0, 4).ljust(64, b"\0"),
            ],
        ),
        "nvme/identify": nvme(1, [cmd(0, 1, 0, 0, 1)], admin=struct.pack("<BBHIQQQQI", 6, 0, 1, 1, 0, 0, 0x4000, 0, 1)),
        "nvme/create": nvme(
            1, [cmd(0, 1, 0, 0, 1)], admin=struct.pack("<BBHIQQQQII", 5, 0, 1, 0, 0, 0, 0x8000, 0, 15 << 16 | 2, 1)
        ),
        "rnic/write": rnic(4, [wqe(2, [(0x10200, 0x1800, 0x101), (0x9000, 64, 0)], 0x10300, 0x101)] * 2),
        "rnic/read": rnic(4, [wqe(4, [(0x10200, 0x1800, 0x101)], 0x11300, 0x101)]),
        "rnic/send": rnic(
            4, [wqe(0, [(0x10200, 0x100, 0x101)], imm=5, flags=5), wqe(3, [(0x10200, 0x100, 0x101)], 0x10200, 0x101, imm=6)]
        ),
        "rnic/atomic": rnic(
            4,
            [
                wqe(5, [(0x10200, 8, 0x101)], 0x10200, 0x101, compare=1, swap=2),
                wqe(6, [(0x10208, 8, 0x101)], 0x10208, 0x101, swap=3),
            ],
        ),
        "rnic/invalidate": rnic(
            4,
            [
                wqe(1, [(0x10200, 8, 0x101)], imm=0x101),
                wqe(7, [], imm=0x101),
                wqe(8, [], 0x20200, 0x155, imm=3, compare=0x2000, swap=0x3000),
            ],
        ),
        "rnic/inline": rnic(
            4, [wqe(2, [], 0x10200, 0x101, flags=3)[:52] + struct.pack("<I", 100) + bytes(16) + bytes(range(184))]
        ),
        "rnic/key": rnic(
            0,
            [wqe(2, [(0x10200, 8, 0x101)], 0x10200, 0x101)],
            struct.pack("<IIQQQIIII8x", 6, 0, 0x400, 0x1000, 0x3000, 1, 3, 2, 0),
        ),
        "rnic/destroy": rnic(0, [wqe(2, [(0x10200, 8, 0x101)], 0x10200, 0x101)], struct.pack("<II", 5, 1)),
    }


if __name__ == "__main__":
    for name, data in all_seeds().items():
        (HERE / "corpus" / name).write_bytes(data)
