# cython: language_level=3
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from dmapath.abi cimport dma_device, dma_mmio

cdef extern from "nvme.h" nogil:
    enum:
        NVME_ERRORS
    struct nvme_error:
        uint64_t count
        uint16_t sq
        uint16_t cid
        uint16_t status
        uint16_t byte
        uint16_t bit
        uint64_t lba
        uint32_t nsid
    struct nvme_ctrl:
        dma_device *dev
        uint8_t *media
        uint8_t *meta
        uint64_t blocks
        uint32_t block_shift, meta_size, mdts
        bint sgl, metaseg, random
        uint64_t seed
        uint32_t csts
        nvme_error log[64]
        uint64_t nerrors, bad_doorbells, commands, bytes_in, bytes_out
        uint32_t fail_n, fail_status
    uint64_t nvme_read_reg(void *, uint64_t, unsigned int)
    void nvme_write_reg(void *, uint64_t, unsigned int, uint64_t)
    int nvme_work(void *)


cdef class NvmeController:
    cdef nvme_ctrl *c
    cdef dma_mmio regs
    cdef readonly object device, mmio, media, metadata
    cdef readonly int block_size, metadata_size, mdts
    cdef readonly bint sgl
    cdef object kept
