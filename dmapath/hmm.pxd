# cython: language_level=3
"""Pages by index, for C-level drivers; needs nothing but the public header."""
from libc.stdint cimport uint64_t

from dmapath.abi cimport dma_addr_t, dma_device, dma_iova_state, phys_addr_t


cdef struct hmm_dma_map:
    dma_iova_state state
    uint64_t *pfn_list
    dma_addr_t *dma_list  # where there is no IOVA range and addresses must be kept
    uint64_t nr
    uint64_t entry_size   # bytes, a power of two

cdef int hmm_dma_map_alloc(dma_device *dev, hmm_dma_map *map, uint64_t nr, uint64_t entry_size) noexcept nogil
cdef int hmm_dma_map_pfn(dma_device *dev, hmm_dma_map *map, uint64_t i, phys_addr_t phys, bint write,
                         dma_addr_t *out) noexcept nogil
cdef bint hmm_dma_unmap_pfn(dma_device *dev, hmm_dma_map *map, uint64_t i) noexcept nogil
cdef void hmm_dma_map_free(dma_device *dev, hmm_dma_map *map) noexcept nogil
