"""NVMe status codes in the specification's words (Base 2.0, 4.2.3)."""

from __future__ import annotations

__all__ = ["DNR", "STATUS", "status_name"]

#: Bit of a status: do not retry.
DNR = 0x4000

#: Status (type << 8 | code) -> its name.
STATUS = {
    0x00: "success",
    0x01: "invalid command opcode",
    0x02: "invalid field in command",
    0x03: "command id conflict",
    0x04: "data transfer error",
    0x06: "internal error",
    0x07: "command abort requested",
    0x08: "command aborted due to SQ deletion",
    0x0B: "invalid namespace or format",
    0x0D: "invalid SGL segment descriptor",
    0x0E: "invalid number of SGL descriptors",
    0x0F: "data SGL length invalid",
    0x10: "metadata SGL length invalid",
    0x11: "SGL descriptor type invalid",
    0x13: "PRP offset invalid",
    0x80: "LBA out of range",
    0x82: "namespace not ready",
    0x100: "completion queue invalid",
    0x101: "invalid queue identifier",
    0x102: "invalid queue size",
    0x108: "invalid interrupt vector",
    0x109: "invalid log page",
    0x10C: "invalid queue deletion",
    0x281: "unrecovered read error",
}


def status_name(status: int) -> str:
    """A status, with or without do-not-retry, in words."""
    return STATUS.get(status & 0x7FF, f"status {status & 0x7FF:#x}")
