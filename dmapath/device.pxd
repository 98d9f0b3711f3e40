# cython: language_level=3
from dmapath.abi cimport dma_addr_t, dma_device, dma_iova_state, dma_map_iter, dma_map_state, dma_range_map
from dmapath.backends.base cimport Backend
from dmapath.memory cimport PhysMemory
from dmapath.request cimport Mappable
from dmapath.swiotlb cimport Swiotlb
from dmapath.xen cimport XenDomain


cdef class Device:
    cdef dma_device c
    cdef dma_range_map *ranges_
    cdef readonly Backend backend
    cdef readonly object iommu
    cdef readonly PhysMemory memory
    cdef readonly Swiotlb swiotlb
    cdef readonly XenDomain xen
    cdef readonly object grants, pci
    cdef void **old_p2p
    cdef size_t nold
    cdef bint unmap_early(self) noexcept
    cdef object tap  # a Tap while somebody observes
    cdef object config_
    cdef _limits(self)
    cdef _ranges(self, ranges)
    cdef IovaState _own(self, state)
    cdef dma_device *hardware(self) except NULL
    cdef _inside(self, IovaState st, unsigned long long offset, unsigned long long size)
    cdef object __weakref__


cdef class IovaState:
    cdef dma_iova_state c
    cdef readonly Device device
    cdef bint live


cdef class Segment:
    cdef unsigned long long addr_
    cdef readonly unsigned long long length
    cdef readonly unsigned int lkey, rkey


cdef class CoherentBuffer:
    cdef readonly Device device
    cdef readonly size_t size
    cdef dma_addr_t addr_
    cdef unsigned long long phys_
    cdef char *host
    cdef object frames, ram
    cdef bint live, pooled
    cdef void let_go(self) noexcept
    cdef int views
    cdef make(self, Device device, size_t size)
    cdef int must_live(self) except -1
    cdef tell(self, op)
    cdef release(self)


cdef class Mapping:
    cdef dma_map_state st
    cdef dma_map_iter it
    cdef readonly Device device
    cdef readonly Mappable request
    cdef list segments_
    cdef bint live, ended
    cdef bint maps  # each segment is mapped when it is asked for
    cdef Py_ssize_t at
    cdef int layout_, policy
    cdef size_t kept
    cdef Segment step(self)
    cdef int end(self) noexcept
    cdef size_t state_bytes(self) noexcept
    cdef int must_live(self) except -1
    cdef bint is_whole(self) noexcept
    cdef bint may_bounce(self) noexcept
    cdef list whole(self)
    cdef list read_all(self)
    cdef list mapped(self)
