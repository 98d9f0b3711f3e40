# cython: language_level=3
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from dmapath._core cimport lock
from dmapath.abi cimport dma_device, dma_ops, phys_mem
from dmapath.memory cimport PhysMemory
from dmapath.verbs.ibv cimport ibv_mr, ibv_pd
from dmapath.verbs.resources cimport Pd


# one registration: bytes of a slot that the device may reach
cdef struct reg:
    ibv_mr *mr
    uint64_t start, end   # DMA addresses
    reg *next


# memory that lies side by side in this process, and so can be registered as one: a range where it is, or a window
cdef struct slot:
    uint8_t kind, indexed, doomed, window
    uint32_t number, users, next_free
    uint32_t first, run   # window whose pages follow each other in the arena: the first, plus 1, and how many
    unsigned int access
    uint64_t base         # DMA address of its first byte
    char *host            # range: that byte. Window: virtual memory, once pages have to be put side by side
    uint64_t bytes        # whole pages
    uint32_t *linked      # window: the arena's page, plus 1, that each of its pages was linked to; 0: none. NULL: see run
    uint32_t *held        # window: the page that was registered last
    uint32_t *there       # window: the page that the virtual memory shows; NULL: none is reserved
    reg *regs
    reg own               # the first of them, most often the only one
    slot *newer
    slot *older
    slot *chain           # window: of its bucket of idle windows


cdef struct verbs_counts:
    uint64_t windows, window_frees, window_bytes, links, syncs, unlinks, maps, unmaps, mmaps
    uint64_t registrations, deregistrations, registered_bytes, deregistered_bytes
    uint64_t hits, misses, evictions, invalidated, uncacheable


cdef struct verbs_priv:
    ibv_pd *pd
    phys_mem *mem
    char *arena
    uint64_t arena_bytes, page  # bytes of the memfd's pages, which are what a window is made of
    const uint64_t *flat  # PhysMemory.flat
    const uintptr_t *theirs  # where a pyverbs owner keeps pd, who may close it behind our back; NULL: it is ours
    const unsigned long *forks
    unsigned long born    # what forks was when this was made; else it is a child's copy of what is its parent's
    int fd, mode, shift   # a page is 1 << shift bytes
    unsigned int access, atomic
    bint by_direction
    uint64_t max_mr
    lock lk
    slot **chunks
    uint32_t nr_slots, first_free
    uint64_t budget, idle_bytes
    slot *newest
    slot *oldest
    slot **index          # cached ranges by address; none overlaps another
    uint32_t nr_index, room_index
    slot **buckets
    uint64_t refused      # bytes of the last registration that failed
    long fail_nth
    verbs_counts n
    void *owner


cdef class Verbs:
    cdef verbs_priv p
    cdef dma_ops ops
    cdef readonly Pd pd
    cdef readonly PhysMemory memory
    cdef readonly str mode
    cdef object engine, engine_lock
    cdef int move(self, dma_device *dev, uint64_t addr, uint64_t n, char *buf, int write, uint64_t *done) except? -1
    cdef object __weakref__
