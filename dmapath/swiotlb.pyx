# cython: language_level=3
"""A swiotlb pool: bounce buffers in a machine's memory (kernel/dma/swiotlb.c)."""
cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from dmapath._core cimport (
    TLB_SEGMENT, TLB_SIZE, swiotlb_destroy, swiotlb_has, swiotlb_init, swiotlb_max_size, swiotlb_slots, swiotlb_used,
)
from dmapath.abi cimport swiotlb
from dmapath.memory cimport PhysMemory

from dmapath.addr import as_length, as_phys
from dmapath.errors import DmaValueError, error_for

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t, size_t)


@cython.no_gc_clear  # __dealloc__ takes the pool out of the memory
cdef class Swiotlb:
    """A pool of bounce buffers.

    Parameters
    ----------
    memory : PhysMemory or None
        The machine whose memory bounces and holds the pool; None: addresses only, nothing is copied.
    slots : int
        Of 2048 bytes each; a power of two, at least 128 an area. 32768 (64 MiB) is Linux's default.
    areas : int
        Parts with a lock of their own; a power of two.
    base : int
        Physical address of the pool, a multiple of 256 KiB.
    force : bool
        Bounce everything that is mapped without an IOMMU (swiotlb=force).
    dynamic : bool
        Grow when it is full (SWIOTLB_DYNAMIC): the request at hand gets a pool of its own for as long as it is mapped, and
        before the next one a worker adds a pool of ``slots`` slots for good.
    restricted : bool
        A pool for its devices alone (restricted-dma-pool): all that they map without an IOMMU bounces, and coherent
        allocations come out of it too.
    """

    def __cinit__(self, PhysMemory memory=None, *, slots=32768, areas=1, base=0x40000000, force=False, dynamic=False,
                  restricted=False):
        cdef size_t i
        cdef int rc
        for name, value in (("slots", slots), ("areas", areas)):
            if as_length(value, name) & (value - 1):
                raise DmaValueError("a power of two", argument=name, value=value)
        if slots // areas < TLB_SEGMENT or slots > 1 << 24:
            raise DmaValueError("128 slots an area at least, 2**24 at most in all", argument="slots", value=slots)
        if as_phys(base, "base") & (TLB_SEGMENT * TLB_SIZE - 1) or base + slots * TLB_SIZE > 1 << 52:
            raise DmaValueError("a multiple of 256 KiB, below 2**52", argument="base", value=base)
        self.memory, self.slots, self.areas, self.base, self.force = memory, slots, areas, base, force
        self.dynamic, self.restricted = dynamic, restricted
        cdef char *host = <char *>aligned_alloc(4096, slots * TLB_SIZE)
        if host == NULL or swiotlb_init(&self.pool, base, host, slots, areas, force or restricted):
            free(host)
            raise MemoryError("no memory for the pool")
        memset(host, 0, slots * TLB_SIZE)
        self.ready = True
        self.pool.dynamic = dynamic
        if memory is None:
            return
        self.pool.mem = memory.mem
        for i in range(slots * TLB_SIZE // 4096):
            rc = memory.add_frame(<uint64_t>base + i * 4096, host + i * 4096)
            if rc:
                raise error_for(-rc, "the machine has memory there already, or none is left for the map", "base", base)
            self.nframes += 1

    def __dealloc__(self):
        if self.nframes:
            self.memory.remove_frames(range(self.base, self.base + self.nframes * 4096, 4096))
        if self.ready:
            swiotlb_destroy(&self.pool)

    def __repr__(self):
        words = [w for w in ("force", "dynamic", "restricted") if getattr(self, w)]
        return f"Swiotlb({', '.join([f'{self.slots} slots', *words])})"

    def __contains__(self, phys):
        return swiotlb_has(<swiotlb *>&self.pool, as_phys(phys))

    def fresh(self):
        """An empty pool of the same kind that copies nothing."""
        return Swiotlb(None, slots=self.slots, areas=self.areas, base=self.base, force=self.force, dynamic=self.dynamic,
                       restricted=self.restricted)

    def max_mapping_size(self, min_align_mask=0):
        """Bytes of the largest buffer that can bounce for a device with that mask (swiotlb_max_mapping_size)."""
        return swiotlb_max_size(min_align_mask)

    @property
    def used(self):
        """Slots in use."""
        return swiotlb_used(&self.pool)

    def counters(self):
        """Exact counts: maps, maps live, bytes copied in and out, slots used and slots there are, pools, and pools that were
        made for one mapping."""
        return dict(bounces=self.pool.maps, bounces_live=self.pool.maps - self.pool.unmaps, bytes_in=self.pool.bytes_in,
                    bytes_out=self.pool.bytes_out, slots_used=self.used, slots=swiotlb_slots(&self.pool),
                    pools=self.pool.pools, transients=self.pool.transients)

    def fail_nth(self, n):
        """Make the nth bounce from now fail (1: the next; 0: none). Returns what was left of the last order."""
        left = self.pool.fail.nth
        self.pool.fail.nth = as_length(n, "n", least=0)
        return max(0, left)
