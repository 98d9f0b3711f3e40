# cython: language_level=3
from dmapath.abi cimport dma_device, dma_ops


cdef class Backend:
    cdef dma_ops ops
    cdef int attach(self, dma_device *dev) except -1


cdef class CapsuleBackend(Backend):
    cdef object owner, capsule
