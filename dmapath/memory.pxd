# cython: language_level=3
from libc.stdint cimport uint64_t

from dmapath.abi cimport phys_mem


cdef class PhysMemory:
    cdef phys_mem *mem
    cdef char *arena
    cdef readonly int fd
    cdef readonly size_t size
    cdef readonly size_t page_size
    cdef readonly size_t backing_page
    cdef readonly str layout
    cdef object frames_
    cdef uint64_t flat  # physical address of the arena while it lies there in one piece and in order; 0: it does not
    cdef uint64_t next_synthetic
    cdef readonly list peers  # Bars of this machine
    cdef list tags
    cdef dict borrowed  # physical address -> another machine's memory that is there
    cdef object moving  # one migration at a time
    cdef readonly object watchers, notifiers  # devices that reach them; who must know when pages move
    cdef object __weakref__
    cdef _place(self, uint64_t base, seed)
    cdef int add_frame(self, uint64_t phys, void *host, bint uncached=*) noexcept
    cdef void remove_frames(self, frames) noexcept
