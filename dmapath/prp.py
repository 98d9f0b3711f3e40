"""What an NVMe command's PRP entries become for mapped segments (drivers/nvme/host/pci.c, nvme_pci_setup_data_prp)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dmapath.addr import DmaAddr, as_dma, as_length
from dmapath.errors import AlignmentError, DmaValueError

__all__ = ["Prp", "build_prp"]

PAGE = 4096
ENTRIES = PAGE // 8
SMALL_ENTRIES = 256 // 8
LISTS = 5


@dataclass
class Prp:
    """PRP entries of one command: ``prp1``; ``prp2``, an address of data or None where a list follows or nothing does; the
    pages of the list, each without the link to the next; and the pool that the list comes from ("small": 256 bytes).
    """

    prp1: DmaAddr
    prp2: DmaAddr | None = None
    lists: list[list[DmaAddr]] = field(default_factory=list)
    pool: str | None = None

    @property
    def entries(self) -> int:
        """List entries that name data."""
        return sum(len(page) for page in self.lists)


def build_prp(segments: Iterable[Any], *, kernel_quirks: bool = False) -> Prp:
    """The PRP entries for segments (Segments or (addr, bytes) pairs), in pages of 4096 bytes.

    Raises AlignmentError (EIO) where a segment but the last does not end on a page, or one but the first does not begin on
    one: PRP has no way to say that, and BLK_STS_IOERR is what Linux makes of it. Linux does not look at the end of the first
    piece where two entries are all; ``kernel_quirks`` does not either.
    """
    pairs = [(s.addr, s.length) if hasattr(s, "addr") else s for s in segments]
    pieces = [(as_dma(addr), as_length(n, "length")) for addr, n in pairs]
    if not pieces:
        raise DmaValueError("at least one segment", argument="segments", value=pieces)
    total = sum(n for _, n in pieces)
    first, offset = pieces[0][0], pieces[0][0] % PAGE
    rest = total - min(total, PAGE - offset)
    out = Prp(DmaAddr(first))
    if not rest:
        return out
    if not (kernel_quirks and len(pieces) == 2 and rest <= PAGE):
        for i, (addr, n) in enumerate(pieces):
            if (i and addr % PAGE) or (i + 1 < len(pieces) and (addr + n) % PAGE):
                raise AlignmentError("it begins or ends inside a page in the middle of the request, which no PRP entry can "
                                     "say (nvme_pci_setup_data_prp)", errno=5, argument=f"segments[{i}]",
                                     value=(hex(addr), n))  # fmt: skip
    pages = [DmaAddr(at) for addr, n in pieces for at in range(addr - addr % PAGE, addr + n, PAGE)][1:]
    if rest <= PAGE:
        out.prp2 = pages[0]
        return out
    if len(pages) > LISTS * (ENTRIES - 1) + 1:
        raise DmaValueError(f"at most {LISTS} pages of list: 8 MiB", argument="segments", value=total)
    out.pool = "small" if len(pages) <= SMALL_ENTRIES else "large"
    while pages:
        take = len(pages) if len(pages) <= ENTRIES else ENTRIES - 1  # the last entry of a full page links to the next
        out.lists.append(pages[:take])
        pages = pages[take:]
    return out
