# cython: language_level=3
from dmapath.abi cimport dma_bus_ops, dma_device, dma_map_iter, dma_map_state, dma_ops, dma_seg


cdef class Call:
    cdef readonly str op
    cdef public object phys, addr, size, offset, dir, attrs, vecs, segments, state, rc, write, done, mapping, index, region
    cdef object where_


cdef class Tap:
    cdef dma_ops ops
    cdef dma_bus_ops bus
    cdef const dma_ops *inner
    cdef const dma_bus_ops *inner_bus
    cdef list observers
    cdef readonly bint need_unmap
    cdef int begin(self, Call call)
    cdef int finish(self, Call call, int rc)
    cdef int ask(self, observer, Call call) noexcept
    cdef void tell(self, observer, Call call) noexcept
    cdef void put(self, dma_device *dev)
    cdef void take(self, dma_device *dev)


cdef void tap_segment(dma_device *dev, const dma_map_state *st, dma_map_iter *it, const dma_seg *seg) noexcept with gil
