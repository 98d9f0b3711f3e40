# cython: language_level=3
"""Another package's driver, in Cython: it maps requests through the wrapper and gives each segment to the hardware."""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_Import
from libc.stdint cimport uint64_t
from libc.string cimport memset

from dmapath.abi cimport (
    DMA_POLICY_UNIFIED, DMA_TO_DEVICE, DMAPATH_API_CAPSULE, DMAPATH_DEVICE_CAPSULE, DMAPATH_MMIO_CAPSULE, dma_cursor,
    dma_device, dma_limits, dma_map_iter, dma_map_state, dma_mmio, dma_readq, dma_request, dma_seg, dma_writeq, dmapath_api,
    phys_vec,
)

cdef const dmapath_api *api = <const dmapath_api *>PyCapsule_Import(DMAPATH_API_CAPSULE, 0)
cdef enum:
    MOST = 64


cdef uint64_t vecs_fill(const dma_request *rq, dma_cursor *c, phys_vec *out, uint64_t cap) noexcept nogil:
    cdef uint64_t n = 0
    while c.item < rq.max_vecs and n < cap:
        out[n] = (<const phys_vec *>rq.priv)[c.item]
        c.item += 1
        n += 1
    return n


cdef unsigned int fill(const dma_request *rq, dma_cursor *c, const dma_limits *lim, phys_vec *out,
                       unsigned int cap) noexcept nogil:
    return <unsigned int>vecs_fill(rq, c, out, cap)


cdef int run(dma_device *dev, const dma_mmio *regs, const dma_request *rq, uint64_t *result) noexcept nogil:
    cdef dma_map_state st
    cdef dma_map_iter it
    cdef dma_seg seg
    cdef uint64_t state = 1, go = 1
    cdef int rc = api.map_start(dev, rq, DMA_POLICY_UNIFIED, &st, &it)
    if rc:
        return rc
    while state == 1:
        rc = api.map_next(dev, &st, &it, &seg)
        if rc <= 0:
            break
        dma_writeq(regs, 0, seg.addr.v)
        dma_writeq(regs, 8, seg.len)
        dma_writeq(regs, 16, go)
        go = 2
        while dma_readq(regs, 32) == 0:
            regs.relax(regs.priv)
        state = dma_readq(regs, 32)
    result[0] = dma_readq(regs, 24)
    api.unmap(dev, &st)
    return rc if rc < 0 else 0 if state == 1 else -5


cdef class ChecksumDriver:
    cdef object hardware, device

    def __init__(self, hardware, device):
        self.hardware, self.device = hardware, device

    def sum(self, ranges):
        """The sum of the bytes of physical ranges (phys, bytes)."""
        cdef phys_vec vecs[MOST]
        cdef dma_request rq
        cdef uint64_t total = 0, result = 0
        cdef dma_device *dev = <dma_device *>PyCapsule_GetPointer(self.device.capsule, DMAPATH_DEVICE_CAPSULE)
        cdef const dma_mmio *regs = <const dma_mmio *>PyCapsule_GetPointer(self.hardware.mmio, DMAPATH_MMIO_CAPSULE)
        cdef int rc, i
        if len(ranges) > MOST:
            raise ValueError(f"at most {MOST} ranges")
        for i, (at, n) in enumerate(ranges):
            vecs[i].paddr.v, vecs[i].len = at, n
            total += <uint64_t>n
        memset(&rq, 0, sizeof(rq))
        rq.fill, rq.priv, rq.total, rq.max_vecs, rq.dir = fill, vecs, total, len(ranges), DMA_TO_DEVICE
        with nogil:
            rc = run(dev, regs, &rq, &result)
        if rc:
            raise OSError(-rc, "the checksum engine failed")
        return result
