# cython: language_level=3
from libc.stdint cimport uint64_t

from dmapath._core cimport swiotlb_pool
from dmapath.memory cimport PhysMemory


cdef class Swiotlb:
    cdef swiotlb_pool pool
    cdef readonly PhysMemory memory
    cdef readonly size_t slots
    cdef readonly int areas
    cdef readonly object base
    cdef readonly bint force, dynamic, restricted
    cdef bint ready
    cdef uint64_t nframes  # from `base` on, that the memory has of it
