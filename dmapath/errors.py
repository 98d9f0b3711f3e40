"""The errors of dmapath: one tree, each with the errno that Linux gives for the same mistake."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable

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
    "error_for",
    "leave",
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
    ``address`` and ``key`` the remote address and rkey (of a send or receive: the local address and lkey), ``length`` its
    bytes, ``qp_num`` the queue pair, which is in the error state now (``Qp.recover``).
    """

    default_errno = _errno.EIO

    def __init__(self, rule: str, **details: int | str) -> None:
        self.details = details
        self.status, self.status_name = details["status"], details["status_name"]
        self.request, self.opcode, self.segment = details["request"], details["opcode"], details["segment"]
        self.address, self.key, self.length = details["address"], details["key"], details["length"]
        self.qp_num = details["qp_num"]
        super().__init__(rule)

    def __reduce__(self) -> tuple[Callable[..., DmaError], tuple[object, ...]]:
        return _rebuild_completion, (self.rule, self.details)


def _rebuild_completion(rule: str, details: dict[str, int | str]) -> DmaError:
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


def leave(close: Callable[[], object], error: BaseException | None) -> None:
    """End a ``with`` block by ``close``. The block's own ``error`` stays the one that is raised: what ``close`` raises then
    becomes a note of it.
    """
    try:
        close()
    except Exception as e:
        if error is None:
            raise
        # what add_note does, which Python 3.10 has not
        error.__notes__ = [*getattr(error, "__notes__", ()), f"while leaving the with block: {type(e).__name__}: {e}"]
