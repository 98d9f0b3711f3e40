# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t

from dmapath.abi cimport dma_addr_t, dma_seg

cdef enum:
    FORM_AUTO = 0, FORM_PRP = 1, FORM_SGL = 2
    LIST_PAGES = 5  # of one command's PRP list

# a piece of memory for descriptors: where the CPU writes it, and where the device reads it
cdef struct desc_page:
    void *host
    dma_addr_t addr

# the data pointer of a command, as its two halves stand there, and what it took
cdef struct data_pointer:
    uint64_t first, second
    uint32_t entries    # descriptors outside the command

# a form, and why: an index of FORM_RULES
cdef struct form_choice:
    uint32_t form, why

cdef form_choice nvme_form(const dma_seg *segs, uint32_t n, uint32_t physical, uint64_t gap_mask, uint32_t wanted,
                           bint can_sgl, uint64_t threshold) noexcept nogil
cdef int desc_pages(uint32_t form, const dma_seg *segs, uint32_t n, bint quirks, bint *small) noexcept nogil
cdef void describe(uint32_t form, const dma_seg *segs, uint32_t n, const desc_page *pages, data_pointer *out) noexcept nogil
cdef int describe_metadata(const dma_seg *segs, uint32_t n, const desc_page *page, uint64_t *mptr) noexcept nogil
