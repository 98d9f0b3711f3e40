"""What work requests, entries and completions are on every RDMA device, real or simulated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmapath.addr import as_length
from dmapath.errors import AddressTypeError, CompletionError

__all__ = ["LOCAL_OPCODES", "REMOTE_ALL", "STATUS", "Completion", "cut", "entries_of"]

#: Remote rights: write, read and atomics (enum ib_access_flags).
REMOTE_ALL = 2 | 4 | 8

#: Completion statuses by name (enum ib_wc_status).
STATUS = {
    "success": 0, "loc_len": 1, "loc_qp_op": 2, "loc_prot": 4, "flush": 5, "mw_bind": 6, "bad_resp": 7, "rem_inv_req": 9,
    "rem_access": 10, "rem_op": 11, "retry": 12, "rnr_retry": 13,
}  # fmt: skip
_NAMES = {
    0: "success", 1: "local length", 2: "local queue pair operation", 4: "local protection", 5: "flushed",
    6: "memory window bind", 7: "bad response", 9: "remote side refuses the request", 10: "remote access",
    11: "remote operation", 12: "no answer within the retries", 13: "receiver not ready within the retries",
}  # fmt: skip
#: Opcodes whose address and key are the local ones.
LOCAL_OPCODES = ("recv", "send", "send_imm", "local_inv", "bind_mw", "reg_mr")


@dataclass(frozen=True)
class Completion:
    """One completion: the request's id, its status (0: success), what it was, bytes received, immediate data, queue pair."""

    request: int
    status: int
    opcode: str
    length: int
    imm: int | None
    qp_num: int
    failure: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.status == 0

    @property
    def status_name(self) -> str:
        """The status in words."""
        return _NAMES.get(self.status, f"status {self.status}")

    def error(self) -> CompletionError | None:
        """The CompletionError that says what failed, or None."""
        if self.ok:
            return None
        f = self.failure or {"opcode": self.opcode, "segment": 0, "address": 0, "key": 0, "length": 0}
        where = "local " if f["opcode"] in LOCAL_OPCODES else "remote "
        words = (f"request {self.request} ({f['opcode']}, {f['length']} bytes) of queue pair {self.qp_num}: "
                 f"{self.status_name} ({self.status}), work request {f['segment']} of it, {where}address {f['address']:#x}, "
                 f"key {f['key']:#x}; Qp.recover() brings the queue pair back")  # fmt: skip
        return CompletionError(words, status=self.status, status_name=self.status_name, request=self.request,
                               qp_num=self.qp_num, **f)  # fmt: skip


def entries_of(segments: Any, *, keyless: bool = False) -> list[tuple[int, int, int]]:
    """(address, bytes, lkey) of a Mapping, a memory region, Segments or such triples. ``keyless``: the device takes key 0
    for bus addresses.
    """
    if hasattr(segments, "segment"):
        return [segments.segment()]
    out = []
    for i, s in enumerate(segments):
        if isinstance(s, tuple):
            addr, n, key = s
            out.append((int(addr), as_length(n, f"segments[{i}].length", least=0), key))
        elif hasattr(s, "lkey") and (s.lkey or keyless):
            out.append((int(s.addr), s.length, s.lkey))
        else:
            raise AddressTypeError("a Segment with keys or (address, bytes, lkey) is wanted", argument=f"segments[{i}]",
                                   value=s)  # fmt: skip
    return out


def cut(entries: Iterable[tuple[int, int, int]], max_sge: int, max_bytes: int) -> list[list[tuple[int, int, int]]]:
    """Entries (address, bytes, lkey) in groups of one work request each: at most ``max_sge`` of them and ``max_bytes``.
    Entries that touch under one key are joined, empty ones left out; there is always a group, if only an empty one.
    """
    groups: list[list[tuple[int, int, int]]] = [[]]
    joined: list[list[int]] = []
    room = max_bytes
    for addr, n, key in entries:
        if joined and joined[-1][2] == key and joined[-1][0] + joined[-1][1] == addr:
            joined[-1][1] += n
        else:
            joined.append([addr, n, key])
    for addr, n, key in joined:
        while n:
            if room == 0 or len(groups[-1]) == max_sge:
                groups.append([])
                room = max_bytes
            part = min(n, room)
            groups[-1].append((addr, part, key))
            addr, n, room = addr + part, n - part, room - part
    return groups
