# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t

from dmapath.abi cimport dma_device, dma_mmio

cdef extern from "rnic.h" nogil:
    struct rnic:
        dma_device *dev
        rnic *peer
        uint32_t keys, cqs
        uint64_t requests, bytes, faults, mtt_reads, events
    uint64_t rnic_read_reg(void *, uint64_t, unsigned int)
    void rnic_write_reg(void *, uint64_t, unsigned int, uint64_t)
    int rnic_work(void *)


cdef class Rnic:
    cdef rnic *c
    cdef dma_mmio regs
    cdef readonly object device, mmio
    cdef object peer
    cdef object __weakref__
