# cython: language_level=3
from libc.stdint cimport uint32_t

from dmapath.abi cimport dma_request, phys_vec


cdef class Mappable:
    cdef dma_request rq
    cdef phys_vec *vecs_
    cdef uint32_t nr
    cdef object keeps
    cdef object __weakref__
    cdef int load(self, vecs) except -1
