# cython: language_level=3
from dmapath.abi cimport dma_device, dma_map_iter, dma_map_state, dma_policy, dma_request, dma_seg

cdef int map_start(dma_device *dev, const dma_request *rq, dma_policy policy, dma_map_state *st,
                   dma_map_iter *it) noexcept nogil
cdef int map_next(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil
cdef int unmap(dma_device *dev, dma_map_state *st) noexcept nogil
