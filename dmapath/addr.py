"""Three kinds of address, which do not mix: PhysAddr, DmaAddr and Iova.

Each is an ``int`` with a type. Adding an integer moves it, subtracting two of a kind gives bytes; adding, subtracting
or ordering two of different kinds raises :class:`TypeError`. Two of different kinds are never equal.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

from dmapath.errors import AddressTypeError, DmaValueError

__all__ = ["DmaAddr", "Iova", "PhysAddr"]

_A = TypeVar("_A", bound="_Address")
_LAST = 2**64 - 1


class _Address(int):
    """An address, 0 to 2**64 - 1."""

    __slots__ = ()

    def __new__(cls: type[_A], value: int) -> _A:
        if isinstance(value, _Address) and type(value) is not cls:
            raise AddressTypeError(f"a {cls.__name__} is wanted", argument="value", value=value)
        if not 0 <= value <= _LAST:
            raise DmaValueError("an address has 64 bits", argument="value", value=int(value))
        return int.__new__(cls, value)

    def _same(self, other: object, verb: str) -> None:
        if isinstance(other, _Address) and type(other) is not type(self):
            raise TypeError(f"cannot {verb} {type(self).__name__} and {type(other).__name__}")

    def __add__(self: _A, other: int) -> _A:
        if isinstance(other, _Address):
            raise TypeError(f"cannot add two addresses ({type(self).__name__} + {type(other).__name__})")
        return type(self)(int(self) + other)

    __radd__ = __add__

    def __sub__(self: _A, other: int) -> Any:
        self._same(other, "subtract")
        if isinstance(other, _Address):
            return int(self) - int(other)
        return type(self)(int(self) - other)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Address) and type(other) is not type(self):
            return False
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __lt__(self, other: int) -> bool:
        self._same(other, "order")
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        self._same(other, "order")
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        self._same(other, "order")
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        self._same(other, "order")
        return int(self) >= int(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self):#x})"

    def __str__(self) -> str:
        return f"{int(self):#x}"

    def __reduce__(self) -> tuple[type[_Address], tuple[int]]:
        return type(self), (int(self),)


class PhysAddr(_Address):
    """phys_addr_t: what the memory controller sees."""

    __slots__ = ()


class DmaAddr(_Address):
    """dma_addr_t: what a device is told."""

    __slots__ = ()


class Iova(_Address):
    """An I/O virtual address: what an IOMMU's page table is keyed by."""

    __slots__ = ()


def as_phys(value: int, argument: str = "phys") -> int:
    """``value`` as a plain integer, if it may stand for a physical address."""
    return _plain(PhysAddr, value, argument)


def as_dma(value: int, argument: str = "addr") -> int:
    """``value`` as a plain integer, if it may stand for a DMA address."""
    return _plain(DmaAddr, value, argument)


def as_iova(value: int, argument: str = "iova") -> int:
    """``value`` as a plain integer, if it may stand for an IOVA."""
    return _plain(Iova, value, argument)


def as_length(value: int, argument: str = "size", *, least: int = 1, last: int = 2**63 - 1) -> int:
    """``value`` as bytes: an integer that is no address, from ``least`` to ``last``."""
    return _within(value, argument, least, last, "a number of bytes", " bytes")


def as_integer(value: int, argument: str, *, least: int = 0, last: int = 2**64 - 1, what: str = "") -> int:
    """``value`` as a plain number: an integer that is no address, from ``least`` to ``last``; ``what`` says whose limits
    these are.
    """
    return _within(value, argument, least, last, "an integer", f", {what}" if what else "")


def as_bits(value: int, argument: str, bits: int) -> int:
    """``value`` as a bit pattern of so many bits: an integer that is no address."""
    return _within(value, argument, 0, 2**bits - 1, "an integer", "")


def as_remote(value: int, argument: str = "remote_addr") -> int:
    """``value`` as a plain integer that stands for an address at another end, of whatever kind it is there."""
    return as_bits(int(value) if isinstance(value, _Address) else value, argument, 64)


def _within(value: int, argument: str, least: int, last: int, what: str, unit: str) -> int:
    if isinstance(value, (_Address, bool)) or not hasattr(value, "__index__"):
        raise AddressTypeError(f"{what} is wanted", argument=argument, value=value)
    value = value.__index__()
    if not least <= value <= last:
        raise DmaValueError(f"{least} to {last if last < 1 << 20 else hex(last)}{unit}", argument=argument, value=value)
    return value


def refuse_objects(format: str, argument: str, value: object) -> None:
    """Refuse a buffer whose items are Python objects (PEP 3118's "O"): its bytes are pointers."""
    if "O" in re.sub(r":[^:]*:", "", format):  # between colons stand the names of fields
        raise AddressTypeError(f"a buffer of plain bytes or numbers, not of Python objects (format {format!r})",
                               argument=argument, value=type(value).__name__)  # fmt: skip


#: A wait that is longer than this is for ever.
_FOREVER_S = 1e9


def as_seconds(value: float, argument: str = "timeout") -> float:
    """``value`` as seconds that a wait may take: 0 or more; infinity is for ever."""
    if isinstance(value, (bool, str, bytes)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise AddressTypeError("a number of seconds is wanted", argument=argument, value=value)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf if value > 0 else -math.inf
    if not seconds >= 0:  # nor a NaN
        raise DmaValueError("0 seconds or more", argument=argument, value=value)
    return min(seconds, _FOREVER_S)


def _plain(kind: type[_Address], value: int, argument: str) -> int:
    if type(value) is kind:
        return int(value)
    if isinstance(value, (_Address, bool)) or not hasattr(value, "__index__"):
        raise AddressTypeError(f"a {kind.__name__} or a plain integer is wanted", argument=argument, value=value)
    plain = value.__index__()
    if not 0 <= plain <= _LAST:
        raise DmaValueError("an address has 64 bits", argument=argument, value=plain)
    return plain
