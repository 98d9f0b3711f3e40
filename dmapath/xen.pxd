# cython: language_level=3
from libc.stdint cimport uint64_t

from dmapath._core cimport xen_domain
from dmapath.abi cimport dma_device
from dmapath.memory cimport PhysMemory


cdef class XenDomain:
    cdef xen_domain c
    cdef bint ready
    cdef readonly PhysMemory memory
    cdef readonly str layout
    cdef object next_machine_, low_
    cdef dict foreign_
    cdef attach(self, dma_device *dev)
    cdef void forget(self, uint64_t phys, uint64_t size) noexcept nogil
    cdef _set(self, uint64_t phys, uint64_t machine, bint foreign)
