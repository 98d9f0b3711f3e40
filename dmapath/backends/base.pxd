# cython: language_level=3
from libc.stdint cimport uint64_t

from dmapath.abi cimport dma_addr_t, dma_device, dma_ops


cdef class Backend:
    cdef dma_ops ops
    cdef bint native  # its calls run without Python code, and so at any time
    cdef int attach(self, dma_device *dev) except -1
    cdef int map_coherent(self, dma_device *dev, uint64_t phys, uint64_t size, dma_addr_t *out) noexcept
    cdef void unmap_coherent(self, dma_device *dev, dma_addr_t addr, uint64_t size) noexcept


cdef class CapsuleBackend(Backend):
    cdef object owner, capsule
