"""What work requests, entries and completions are on every RDMA device, real or simulated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmapath.addr import as_dma, as_integer, as_length
from dmapath.errors import AddressTypeError, CompletionError

__all__ = ["LOCAL_OPCODES", "REMOTE_ALL", "STATUS", "Completion", "as_key", "blame", "cut", "entries_of"]

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
LOCAL_OPCODES = ("recv", "send", "send_imm", "send_inv", "local_inv", "bind_mw", "reg_mr")
#: Statuses about this side's own entries, and about what is addressed at the other side.
_LOCAL = (STATUS["loc_len"], STATUS["loc_qp_op"], STATUS["loc_prot"])
_REMOTE = (STATUS["rem_inv_req"], STATUS["rem_access"], STATUS["rem_op"])
_CAUSES = {
    STATUS["flush"]: "the queue pair was in its error state: another request failed before, or somebody called fail()",
    STATUS["retry"]: "{peer} does not answer: it is gone or in its error state, or the path to it is down",
    STATUS["rnr_retry"]: "{peer} has posted no receive",
}  # fmt: skip
_SHOWN = 8  # entries that an error's text names at most


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
        f = self.failure or blame(self.status, self.opcode)
        words = (f"request {self.request} ({f['opcode']}, {f['length']} bytes) of queue pair {self.qp_num}: "
                 f"{self.status_name} ({self.status}), work request {f['segment']} of it, {_where(self.status, f)}; "
                 "Qp.recover() brings the queue pair back")  # fmt: skip
        return CompletionError(words, status=self.status, status_name=self.status_name, request=self.request,
                               qp_num=self.qp_num, **f)  # fmt: skip


def blame(
    status: int, opcode: str, *, segment: int = 0, entries: Iterable[tuple[int, int, int]] = (),
    unknown: Iterable[tuple[int, int, int]] = (), address: int = 0, key: int = 0, peer: str = "the other side",
) -> dict[str, Any]:  # fmt: skip
    """What a failed work request was, and which of its memory can be at fault (``Completion.failure``).

    ``entries`` are its local ones, ``unknown`` those of them that no region known here covers; ``address`` and ``key`` what
    it names at the other side (of an opcode without entries: its own).
    """
    mine, strange = tuple(entries), tuple(unknown)
    local = opcode in LOCAL_OPCODES
    suspects: tuple[tuple[int, int, int], ...]
    if status in _REMOTE or status in (STATUS["retry"], STATUS["rnr_retry"]):
        suspects = ()
    else:
        suspects = strange if status == STATUS["flush"] else strange or mine
    if (suspects and (status in _LOCAL or status == STATUS["flush"])) or (local and mine):
        address, _, key = (suspects or mine)[0]
    return {"opcode": opcode, "segment": segment, "address": address, "key": key, "length": sum(n for _, n, _ in mine),
            "entries": suspects, "peer": peer}  # fmt: skip


def _where(status: int, f: dict[str, Any]) -> str:
    """What can be at fault, in words: a cause, and memory of the side that the status speaks of, or of both."""
    local = f["opcode"] in LOCAL_OPCODES
    cause = _CAUSES.get(status, "what {peer} has posted to receive it" if local and status in _REMOTE else "")
    words = [cause.format(peer=f["peer"])] if cause else []
    words += [f"local address {a:#x}, key {k:#x}, {n} bytes" for a, n, k in f["entries"][:_SHOWN]]
    if len(f["entries"]) > _SHOWN:
        words.append(f"{len(f['entries']) - _SHOWN} entries more")
    if not cause and status not in _LOCAL and not local:
        words.append(f"remote address {f['address']:#x}, key {f['key']:#x}")
    return " or ".join(words or [f"local address {f['address']:#x}, key {f['key']:#x}"])


def as_key(value: int, argument: str) -> int:
    """A key of 32 bits."""
    return as_integer(value, argument, last=2**32 - 1, what="a key")


def entries_of(segments: Any, *, keyless: bool = False) -> list[tuple[int, int, int]]:
    """(address, bytes, lkey) of a Mapping, a memory region, Segments or such triples. ``keyless``: the device takes key 0
    for bus addresses.
    """
    if hasattr(segments, "segment"):
        return [segments.segment()]
    if not hasattr(segments, "__iter__"):
        raise AddressTypeError("a Mapping, a memory region, Segments or (address, bytes, lkey)", argument="segments",
                               value=segments)  # fmt: skip
    out = []
    for i, s in enumerate(segments):
        if isinstance(s, tuple) and len(s) == 3:
            addr, n = as_dma(s[0], f"segments[{i}].addr"), as_length(s[1], f"segments[{i}].length", least=0)
            out.append((addr, n, as_key(s[2], f"segments[{i}].lkey")))
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
