# cython: language_level=3
"""What a front end hands to the wrapper: physical vectors in order, iterated as the block layer iterates them."""
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dmapath.abi cimport (
    DMA_MAP_CHUNK, DMA_RQ_SG, DMAPATH_DEVICE_CAPSULE, dma_cursor, dma_device, dma_limits, dma_request, dma_segment_room,
    phys_addr, phys_vec,
)

from dmapath.addr import PhysAddr, as_length, as_phys
from dmapath.errors import AddressTypeError, DmaValueError

#: Direction names, by the kernel's number.
DIRECTIONS = ("bidirectional", "to_device", "from_device")
_SHORT = {"bidi": 0, "to": 1, "from": 2}


def direction(value, argument="dir"):
    """The kernel's number for a direction name ("to_device", "from_device", "bidirectional"; "to", "from", "bidi")."""
    if value in DIRECTIONS:
        return DIRECTIONS.index(value)
    if value in _SHORT:
        return _SHORT[value]
    raise DmaValueError("to_device, from_device or bidirectional", argument=argument, value=value)


# blk_map_iter_next: cap each vector at the segment limits, then absorb neighbours that continue it in memory
cdef uint32_t vec_fill(const dma_request *rq, dma_cursor *c, const dma_limits *lim, phys_vec *out,
                       uint32_t cap) noexcept nogil:
    cdef const phys_vec *v = (<const phys_vec *>rq.priv) + c.item
    cdef const phys_vec *end = (<const phys_vec *>rq.priv) + rq.max_vecs
    cdef uint64_t at, rest, part, room, mask = lim.seg_boundary_mask, pos = c.pos
    # Linux's block layer counts a segment's bytes in 32 bits; a region's runs know no such limit
    cdef uint64_t widest = UINT64_MAX if rq.flags & DMA_RQ_SG else UINT32_MAX
    cdef uint64_t largest = lim.max_segment_size if lim.max_segment_size < widest else widest
    cdef uint32_t n = 0
    while v < end and n < cap:
        at = v.paddr.v + pos
        rest = v.len - pos
        room = mask - (at & mask)  # plus one: bytes to the boundary
        if rest > largest or rest - 1 > room:
            part = dma_segment_room(lim, at, rest)
            # what cannot be cut stays whole: it will be refused as a segment
            rest = part if part else rest
            pos = pos + rest if pos + rest < v.len else 0
            v += pos == 0
        else:
            pos = 0
            v += 1
            while (v < end and at + rest == v.paddr.v and v.paddr.v and v.len <= largest - rest
                   and at | mask == (v.paddr.v + v.len - 1) | mask
                   and (lim.mergeable == NULL or lim.mergeable(lim.machine, phys_addr(v.paddr.v - 1), v.paddr))):
                rest += v.len
                v += 1
        out[n].paddr.v = at
        out[n].len = rest
        n += 1
    c.item = v - <const phys_vec *>rq.priv
    c.pos = pos
    return n


cdef class Mappable:
    """Base of Bio, Request and MemoryRegion: an ordered list of physical vectors that a device can map."""

    def __cinit__(self):
        self.rq.fill = vec_fill

    def __dealloc__(self):
        free(self.vecs_)

    cdef int load(self, vecs) except -1:
        cdef uint64_t at, n, total = 0
        cdef Py_ssize_t i, count
        items = list(vecs)
        count = len(items)
        if count > 1 << 31:
            raise DmaValueError("at most 2**31 vectors", argument="vecs", value=count)
        self.vecs_ = <phys_vec *>calloc(max(count, 1), sizeof(phys_vec))
        if self.vecs_ == NULL:
            raise MemoryError("no memory for the vectors")
        for i in range(count):
            try:
                phys, length = items[i]
            except (TypeError, ValueError):
                raise AddressTypeError("a pair (phys, bytes) is wanted", argument=f"vecs[{i}]",
                                       value=items[i]) from None
            at, n = as_phys(phys, f"vecs[{i}].phys"), as_length(length, f"vecs[{i}].len")
            if at + n - 1 < at:
                raise DmaValueError("phys + len passes 2**64", argument=f"vecs[{i}]", value=items[i])
            if total + n >= 1ULL << 62:
                raise DmaValueError("less than 2**62 bytes in all", argument=f"vecs[{i}]", value=items[i])
            self.vecs_[i].paddr.v = at
            self.vecs_[i].len = n
            total += n
        self.nr = <uint32_t>count
        self.rq.priv = self.vecs_
        self.rq.total = total
        self.rq.max_vecs = self.nr
        return 0

    @property
    def vecs(self):
        """The vectors as given: list of (PhysAddr, bytes)."""
        cdef uint32_t i
        return [(PhysAddr(self.vecs_[i].paddr.v), self.vecs_[i].len) for i in range(self.nr)]

    @property
    def wanted(self):
        """The bytes that the request is about: list of (PhysAddr, bytes); a region's, without the rest of its pages."""
        return self.vecs

    @property
    def total(self):
        """Bytes in all."""
        return self.rq.total

    @property
    def dir(self):
        """Direction name: "to_device", "from_device" or "bidirectional"."""
        return DIRECTIONS[<int>self.rq.dir]

    @property
    def gap_mask(self):
        """Bits from the lowest in-page gap upward, 0 without a gap (req_phys_gap_mask)."""
        return self.rq.gap_mask

    @property
    def gap_bit(self):
        """One plus the index of the lowest gap bit, 0 without one (bi_bvec_gap_bit)."""
        return (self.rq.gap_mask & -self.rq.gap_mask).bit_length()

    def __len__(self):
        return self.nr


def iterate(Mappable source not None, limits):
    """Physical segments as the block layer's iterator gives them (blk_map_iter_next): list of (PhysAddr, bytes).

    ``limits`` is a Device, or any object with max_segment_size (bytes or None), seg_boundary_mask, dma_alignment and
    virt_boundary (a QueueLimits).
    """
    cdef dma_limits lim
    cdef dma_cursor c
    cdef phys_vec window[64]
    cdef uint32_t n, i
    capsule = getattr(limits, "capsule", None)
    memset(&lim, 0, sizeof(lim))
    if capsule is not None:
        lim = (<dma_device *>PyCapsule_GetPointer(capsule, DMAPATH_DEVICE_CAPSULE)).limits
    else:
        lim.max_segment_size = limits.max_segment_size or UINT64_MAX
        lim.seg_boundary_mask = limits.seg_boundary_mask
        lim.dma_alignment, lim.virt_boundary = limits.dma_alignment, limits.virt_boundary
    c.item = c.sub = c.pos = 0
    out = []
    while True:
        n = source.rq.fill(&source.rq, &c, &lim, window, DMA_MAP_CHUNK)
        if n == 0:
            return out
        out += [(PhysAddr(window[i].paddr.v), window[i].len) for i in range(n)]
