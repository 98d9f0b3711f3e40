# cython: language_level=3
"""Block requests: a Bio is bvecs and an operation, a Request is bios merged; gaps and splits as Linux's block layer
counts them (block/blk-merge.c, bio_split_io_at; block/blk-map and req_phys_gap_mask)."""
import math

from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memset

from dmapath.abi cimport DMA_FROM_DEVICE, DMA_TO_DEVICE, dma_data_direction, dma_limits, dma_segment_room
from dmapath.request cimport Mappable

from dmapath.addr import as_length
from dmapath.errors import AlignmentError, DmaValueError
from dmapath.request import iterate

_OPS = {"read": DMA_FROM_DEVICE, "write": DMA_TO_DEVICE}


# bvec_seg_gap over neighbours: the in-page bits where one vector ends or the next begins
cdef inline uint64_t junction(uint64_t prev, uint64_t prev_len, uint64_t at) noexcept nogil:
    return (at & 0xfff) | ((prev & 0xfff) + prev_len)


cdef inline uint64_t upward(uint64_t bits) noexcept nogil:
    return ~((bits & (~bits + 1)) - 1) if bits else 0


cdef class Bio(Mappable):
    """A block I/O: an operation and bvecs, each a run of physical memory.

    Parameters
    ----------
    vecs : iterable of (phys, bytes)
        The bvecs, in order; kept as given. Each is below 4 GiB, since bv_len has 32 bits.
    op : "read" or "write"
        read: from the device into memory.
    sector : int
        Where on the disk, in 512-byte sectors; carried, not used for mapping.
    integrity : iterable of (phys, bytes), or a Bio
        Memory of the blocks' metadata (bip vectors), mapped by itself; None: there is none.
    """

    def __init__(self, vecs, *, op="read", sector=0, integrity=None):
        cdef uint64_t gaps = 0
        cdef uint32_t i
        if op not in _OPS:
            raise DmaValueError("read or write", argument="op", value=op)
        self.load(vecs)
        self.op, self.sector = op, as_length(sector, "sector", least=0)
        self.rq.dir = <dma_data_direction><int>_OPS[op]
        for i in range(self.nr):
            if self.vecs_[i].len > UINT32_MAX:
                raise DmaValueError("below 4 GiB: bv_len has 32 bits (struct bio_vec)", argument=f"vecs[{i}].len",
                                    value=self.vecs_[i].len)
        for i in range(1, self.nr):
            gaps |= junction(self.vecs_[i - 1].paddr.v, self.vecs_[i - 1].len, self.vecs_[i].paddr.v)
        self.rq.gap_mask = upward(gaps)
        if integrity is not None:
            self.integrity = integrity if isinstance(integrity, Bio) else Bio(integrity, op=op)
            if self.integrity.op != op:
                raise DmaValueError("of the bio's own operation", argument="integrity", value=integrity.op)

    @classmethod
    def from_phys(cls, vecs, op="read", sector=0):
        """A Bio over physical ranges: ``[(phys, bytes), ...]``."""
        return cls(vecs, op=op, sector=sector)

    @classmethod
    def from_memory(cls, memory, ranges, op="read", sector=0):
        """A Bio over byte ranges ``[(offset, bytes), ...]`` of a PhysMemory or HostBuffer, which is kept alive."""
        vecs = [v for offset, length in ranges for v in memory.vecs(offset, length)]
        cdef Bio bio = cls(vecs, op=op, sector=sector)
        bio.keeps = memory
        return bio

    def __repr__(self):
        return f"Bio({self.op}, {self.nr} bvecs, {self.rq.total} bytes)"

    def split(self, limits, *, max_bytes=None, block_size=512):
        """The bios that the block layer would make of this one for a device (bio_split_io_at).

        ``limits`` (a Device) gives max_segments, max_segment_size, seg_boundary_mask, virt_boundary and
        dma_alignment; ``max_bytes`` is max_hw_sectors in bytes. A bio that needs no split comes back as it is.
        Raises AlignmentError where memory misses dma_alignment or a split would fall inside a block.
        """
        pieces = list(_split(self.vecs, limits, max_bytes, block_size))
        if len(pieces) == 1:
            return [self]
        bios, sector = [], self.sector
        rest = None if self.integrity is None else self.integrity.vecs
        for piece in pieces:
            part = None
            if rest is not None:  # each block's share goes with it
                part, rest = _cut(rest, sum(n for _, n in piece) * self.integrity.total // self.total)
            bio = Bio(piece, op=self.op, sector=sector, integrity=part)
            (<Bio>bio).keeps = self.keeps
            bios.append(bio)
            sector += bio.total // 512
        return bios


def _split(vecs, limits, max_bytes, block_size):
    """Lists of vectors, each of one bio within the limits."""
    cdef dma_limits lim
    memset(&lim, 0, sizeof(lim))
    lim.max_segment_size, lim.seg_boundary_mask = limits.max_segment_size or UINT64_MAX, limits.seg_boundary_mask
    lim.virt_boundary, lim.dma_alignment = limits.virt_boundary, limits.dma_alignment
    vecs = [(int(at), n) for at, n in vecs]
    # a bio that ends inside a unit of dma_alignment would leave the next one none
    block_size = math.lcm(block_size, limits.dma_alignment + 1)
    while vecs:
        take, nsegs = 0, 0
        for i, (at, n) in enumerate(vecs):
            if (at | n) & limits.dma_alignment:
                raise AlignmentError("address and length on the device's dma_alignment", errno=22,
                                     argument=f"vecs[{i}]", value=(hex(at), hex(n)))
            if i and limits.virt_boundary and (at | vecs[i - 1][0] + vecs[i - 1][1]) & limits.virt_boundary:
                break
            room = n if max_bytes is None else min(n, max_bytes - take)
            room, segs = segments_that_fit(&lim, at, room, limits.max_segments - nsegs)
            take, nsegs = take + room, nsegs + segs
            if room < n:
                break
        else:
            yield vecs
            return
        take -= take % block_size
        if not take:
            raise AlignmentError("not one block fits the device's limits", errno=22, argument="vecs", value=len(vecs))
        head, vecs = _cut(vecs, take)
        yield head


# bvec_split_segs: bytes of one vector that fit into so many segments, and the segments used
cdef (uint64_t, uint32_t) segments_that_fit(const dma_limits *lim, uint64_t at, uint64_t length, uint32_t segments):
    cdef uint64_t done = 0, part
    cdef uint32_t used = 0
    while done < length and used < segments:
        part = dma_segment_room(lim, at + done, length - done)
        if part == 0:
            break  # no segment can end here
        done += part
        used += 1
    return done, used


def _cut(vecs, take):
    head, tail = [], []
    for at, n in vecs:
        here = min(n, take)
        if here:
            head.append((at, here))
        if n > here:
            tail.append((at + here, n - here))
        take -= here
    return head, tail


cdef class Request(Mappable):
    """Bios of one operation, merged back to back (a struct request)."""

    def __init__(self, bios):
        cdef Bio bio, prev = None
        self.bios = tuple(bios)
        if not self.bios:
            raise DmaValueError("at least one bio", argument="bios", value=bios)
        self.load([v for b in self.bios for v in b.vecs])
        self.op = self.bios[0].op
        self.keeps = self.bios
        self.rq.dir = (<Bio>self.bios[0]).rq.dir
        for bio in self.bios:
            if bio.op != self.op:
                raise DmaValueError("bios of one operation", argument="bios", value=bio.op)
            self.rq.gap_mask |= bio.rq.gap_mask  # the lower bit is the wider mask
            if prev is not None and prev.nr and bio.nr:
                last, first = prev.vecs_[prev.nr - 1], bio.vecs_[0]
                if last.paddr.v + last.len != first.paddr.v:  # mergeable neighbours leave no gap
                    self.rq.gap_mask |= upward(junction(last.paddr.v, last.len, first.paddr.v))
            prev = bio
        parts = [bio.integrity for bio in self.bios]
        if all(part is not None for part in parts):
            self.integrity = Bio([v for part in parts for v in part.vecs], op=self.op)
        elif any(part is not None for part in parts):
            raise DmaValueError("metadata for all of its bios, or for none", argument="bios", value=len(self.bios))

    @property
    def sector(self):
        """Where on the disk it begins, in 512-byte sectors."""
        return self.bios[0].sector

    def __repr__(self):
        return f"Request({self.op}, {len(self.bios)} bios, {self.rq.total} bytes)"

    def nr_phys_segments(self, limits):
        """Physical segments under a device's limits."""
        return len(iterate(self, limits))
