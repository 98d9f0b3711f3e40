"""The errors of dmapath: one tree, each with the errno that Linux gives for the same mistake."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable
from typing import Any

__all__ = [
    "AddressTypeError",
    "AlignmentError",
    "CompletionError",
    "DmaError",
    "DmaFault",
    "DmaValueError",
    "ExistingMappingError",
    "IovaRangeError",
    "MappingError",
    "NoMemoryError",
    "NotSupportedError",
    "NvmeError",
    "PermissionDeniedError",
    "StateError",
    "TraceError",
    "VerbsError",
    "at_end",
    "error_for",
]


class DmaError(OSError):
    """Any failure of dmapath.

    Attributes: ``errno`` (positive, as in :mod:`errno`), ``argument`` (its name, or ``""``), ``value`` (what was
    given) and ``rule`` (the rule that refused it, with its kernel function where there is one).
    """

    default_errno = _errno.EINVAL

    def __init__(self, rule: str, *, errno: int = 0, argument: str = "", value: object = None) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        what = f"{argument}={_show(value)}: {rule}" if argument else rule
        super().__init__(errno or self.default_errno, what)

    def __reduce__(self) -> tuple[Callable[..., DmaError], tuple[object, ...]]:
        return _rebuild, (type(self), self.rule, self.errno, self.argument, self.value)


def _rebuild(kind: type[DmaError], rule: str, errno: int, argument: str, value: object) -> DmaError:
    return kind(rule, errno=errno, argument=argument, value=value)


def _show(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return f"{'-' if value < 0 else ''}{abs(value):#x}"
    return repr(value)


class DmaValueError(DmaError, ValueError):
    """An argument is out of its range."""


class AddressTypeError(DmaError, TypeError):
    """One kind of address was given for another, or something that is no address at all."""


class StateError(DmaError):
    """A state, mapping or buffer is of another device, or was already freed."""


class AlignmentError(DmaError):
    """A range does not fit the granule (EIO, EINVAL or ENXIO, as the layer that refused it says)."""


class ExistingMappingError(DmaError):
    """The IOVA is mapped already (EADDRINUSE, or EEXIST in ARM's page tables)."""

    default_errno = _errno.EADDRINUSE


class IovaRangeError(DmaError):
    """Outside the allocation, the aperture or the width of an address."""

    default_errno = _errno.ERANGE


class NoMemoryError(DmaError):
    """No IOVA, no page-table memory, or no bounce buffer."""

    default_errno = _errno.ENOMEM


class MappingError(NoMemoryError):
    """map_phys gave DMA_MAPPING_ERROR (all ones)."""


class PermissionDeniedError(DmaError):
    """Memory that must not be bounced would have to be (EPERM), or rights are missing (EACCES)."""

    default_errno = _errno.EPERM


class NotSupportedError(DmaError):
    """The device or the backend cannot do that."""

    default_errno = _errno.EOPNOTSUPP


class DmaFault(DmaError):
    """A device's access was refused. ``iova`` is where, ``reason`` why, ``done`` the bytes moved before it."""

    default_errno = _errno.EFAULT

    def __init__(self, rule: str, *, iova: int = 0, reason: str = "", done: int = 0, write: bool = False) -> None:
        self.iova, self.reason, self.done, self.write = iova, reason, done, write
        super().__init__(rule)

    def __reduce__(self) -> tuple[Callable[..., DmaError], tuple[object, ...]]:
        return _rebuild_fault, (self.rule, self.iova, self.reason, self.done, self.write)


def _rebuild_fault(rule: str, iova: int, reason: str, done: int, write: bool) -> DmaError:
    return DmaFault(rule, iova=iova, reason=reason, done=done, write=write)


class VerbsError(DmaError):
    """A call of libibverbs failed."""


class CompletionError(VerbsError):
    """A work request completed with an error. ``status`` is the number (enum ibv_wc_status) and ``status_name`` its name,
    ``request`` the request's id, ``opcode`` what it was, ``segment`` the index of its work request within the request,
    ``length`` its bytes, ``qp_num`` the queue pair, which is in the error state now (``Qp.recover``), ``peer`` the other
    side.

    ``entries`` are the local entries (address, bytes, lkey) that can be at fault: those that no region known to the
    library covers, else all; none where the status speaks of the other side. ``address`` and ``key`` are the remote address
    and rkey; where the fault is a local entry's, or the work request is a send or receive, the first such entry's.
    """

    default_errno = _errno.EIO

    def __init__(self, rule: str, **details: Any) -> None:
        self.details = details
        self.status, self.status_name = details["status"], details["status_name"]
        self.request, self.opcode, self.segment = details["request"], details["opcode"], details["segment"]
        self.address, self.key, self.length = details["address"], details["key"], details["length"]
        self.qp_num = details["qp_num"]
        self.entries, self.peer = details.get("entries", ()), details.get("peer", "the other side")
        super().__init__(rule)

    def __reduce__(self) -> tuple[Callable[..., DmaError], tuple[object, ...]]:
        return _rebuild_completion, (self.rule, self.details)


def _rebuild_completion(rule: str, details: dict[str, Any]) -> DmaError:
    return CompletionError(rule, **details)


class NvmeError(DmaError):
    """An NVMe command completed with an error. ``status`` is type << 8 | code, with do-not-retry in bit 14, and
    ``status_name`` its name; ``opcode``, ``lba`` and ``blocks`` are the command's.
    """

    default_errno = _errno.EIO

    def __init__(self, rule: str, *, status: int, status_name: str, opcode: int, lba: int, blocks: int) -> None:
        self.status, self.status_name = status, status_name
        self.opcode, self.lba, self.blocks = opcode, lba, blocks
        super().__init__(rule)

    def __reduce__(self) -> tuple[Callable[..., DmaError], tuple[object, ...]]:
        return _rebuild_nvme, (self.rule, self.status, self.status_name, self.opcode, self.lba, self.blocks)


def _rebuild_nvme(rule: str, status: int, status_name: str, opcode: int, lba: int, blocks: int) -> DmaError:
    return NvmeError(rule, status=status, status_name=status_name, opcode=opcode, lba=lba, blocks=blocks)


class TraceError(DmaError, ValueError):
    """A trace cannot be read; the text begins with file:line."""


_BY_ERRNO: dict[int, type[DmaError]] = {
    _errno.EIO: AlignmentError,
    _errno.ENXIO: AlignmentError,
    _errno.EADDRINUSE: ExistingMappingError,
    _errno.EEXIST: ExistingMappingError,
    _errno.ERANGE: IovaRangeError,
    _errno.EOVERFLOW: IovaRangeError,
    _errno.ENOMEM: NoMemoryError,
    _errno.EPERM: PermissionDeniedError,
    _errno.EACCES: PermissionDeniedError,
    _errno.EOPNOTSUPP: NotSupportedError,
    _errno.EREMOTEIO: NotSupportedError,
    _errno.ENOENT: StateError,
}


def error_for(errno: int, rule: str, argument: str = "", value: object = None) -> DmaError:
    """The exception for a (positive) errno."""
    kind = _BY_ERRNO.get(errno, DmaValueError)
    return kind(rule, errno=errno, argument=argument, value=value)


def at_end(error: BaseException | None, *steps: Callable[[], object]) -> None:
    """The end of a ``with`` block: run every step, each though those before it failed. Raises the first failure where no
    ``error`` is on its way; else that one stays the one that is told, and what failed becomes a note of it.
    """
    first = None
    for step in steps:
        try:
            step()
        except Exception as e:
            first = first or e
    if first is None:
        return
    if error is None:
        raise first
    # what add_note does, which Python 3.10 has not
    note = f"while leaving the with block: {type(first).__name__}: {first}"
    error.__notes__ = [*getattr(error, "__notes__", ()), note]

