# cython: language_level=3
"""Loops that measure, without Python between two operations. Used by ``dmapath compare`` and scripts/bench."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from dmapath._clock cimport now_ns
from dmapath.abi cimport (
    DMA_POLICY_LINUX, DMA_POLICY_UNIFIED, DMA_TO_DEVICE, dma_addr_t, dma_device,
    dma_fault, dma_iova_destroy, dma_iova_link, dma_iova_state, dma_iova_sync, dma_iova_try_alloc, dma_map_iter,
    dma_map_phys, dma_map_state, dma_policy, dma_seg, dma_unmap_phys, phys_addr, phys_addr_t, phys_vec,
)
from dmapath.device cimport Device
from dmapath.memory cimport PhysMemory
from dmapath.request cimport Mappable
from dmapath.wrapper cimport map_next, map_start, unmap

from dmapath.errors import DmaError, DmaValueError

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t, size_t)


cdef int request_once(dma_device *dev, Mappable rq, dma_policy policy, uint64_t *map_ns,
                      uint64_t *unmap_ns) noexcept nogil:
    cdef dma_map_state st
    cdef dma_map_iter it
    cdef dma_seg seg
    cdef uint64_t t0 = now_ns(), t1, t2
    cdef int rc = map_start(dev, &rq.rq, policy, &st, &it)
    if rc:
        return rc
    while True:
        rc = map_next(dev, &st, &it, &seg)
        if rc <= 0:
            break
    t1 = now_ns()
    unmap(dev, &st)
    t2 = now_ns()
    map_ns[0] = t1 - t0
    unmap_ns[0] = t2 - t1
    return rc


# each vector of the request by itself, by the classic calls
cdef int calls_once(dma_device *dev, Mappable rq, dma_addr_t *addrs, uint64_t *map_ns,
                    uint64_t *unmap_ns) noexcept nogil:
    cdef uint64_t t0 = now_ns(), t1
    cdef uint32_t i, n = rq.nr
    cdef int rc = 0
    for i in range(n):
        rc = dma_map_phys(dev, rq.vecs_[i].paddr, rq.vecs_[i].len, rq.rq.dir, 0, &addrs[i])
        if rc:
            n = i
            break
    t1 = now_ns()
    for i in range(n):
        rc |= dma_unmap_phys(dev, addrs[i], rq.vecs_[i].len, rq.rq.dir, 0)
    unmap_ns[0] = now_ns() - t1
    map_ns[0] = t1 - t0
    return rc


def time_request(Device dev not None, Mappable rq not None, policy, int rounds):
    """Median nanoseconds of mapping (start and all segments) and of unmapping a request: (map_ns, unmap_ns). By policy
    "none" its vectors are mapped one by one, by dma_map_phys and dma_unmap_phys."""
    cdef dma_policy p = DMA_POLICY_LINUX if policy == "linux" else DMA_POLICY_UNIFIED
    cdef bint alone = policy == "none"
    cdef dma_addr_t *addrs = <dma_addr_t *>malloc(rq.nr * sizeof(dma_addr_t))
    cdef uint64_t *t = <uint64_t *>malloc(2 * rounds * sizeof(uint64_t))
    cdef int i, rc = 0
    if t == NULL or addrs == NULL:
        free(t)
        free(addrs)
        raise MemoryError("no memory for the times")
    with nogil:
        for i in range(rounds):
            if alone:
                rc = calls_once(&dev.c, rq, addrs, &t[i], &t[rounds + i])
            else:
                rc = request_once(&dev.c, rq, p, &t[i], &t[rounds + i])
            if rc:
                break
    try:
        if rc:
            raise DmaError("the request cannot be mapped", errno=-rc, argument="rq", value=rq)
        return sorted(t[i] for i in range(rounds))[rounds // 2], sorted(t[rounds + i] for i in range(rounds))[rounds // 2]
    finally:
        free(t)
        free(addrs)


# ---- operations of scripts/bench: each a function of its own, so that callgrind can collect inside it alone ---------

cdef int op_two_step(dma_device *dev, const phys_vec *v, uint32_t n, uint64_t total) noexcept nogil:
    cdef dma_iova_state st
    cdef uint64_t at = 0
    cdef uint32_t i
    cdef int rc = 0
    if not dma_iova_try_alloc(dev, &st, v[0].paddr, total):
        return -1
    for i in range(n):
        rc |= dma_iova_link(dev, &st, v[i].paddr, at, v[i].len, DMA_TO_DEVICE, 0)
        at += v[i].len
    rc |= dma_iova_sync(dev, &st, 0, total)
    return rc | dma_iova_destroy(dev, &st, total, DMA_TO_DEVICE, 0)


cdef int op_two_step_vec(dma_device *dev, const phys_vec *v, uint32_t n, uint64_t total) noexcept nogil:
    cdef dma_iova_state st
    cdef int rc
    if not dma_iova_try_alloc(dev, &st, v[0].paddr, total):
        return -1
    rc = dev.ops.iova_link_vec(dev, &st, v, n, 0, DMA_TO_DEVICE, 0)
    rc |= dma_iova_sync(dev, &st, 0, total)
    return rc | dma_iova_destroy(dev, &st, total, DMA_TO_DEVICE, 0)


cdef int op_classic(dma_device *dev, const phys_vec *v, uint32_t n, dma_addr_t *out) noexcept nogil:
    cdef uint32_t i
    cdef int rc = 0
    for i in range(n):
        rc |= dma_map_phys(dev, v[i].paddr, v[i].len, DMA_TO_DEVICE, 0, &out[i])
    for i in range(n):
        rc |= dma_unmap_phys(dev, out[i], v[i].len, DMA_TO_DEVICE, 0)
    return rc


cdef int op_alloc(dma_device *dev, uint64_t size) noexcept nogil:
    cdef dma_iova_state st
    if not dma_iova_try_alloc(dev, &st, phys_addr(0), size):
        return -1
    return dma_iova_destroy(dev, &st, 0, DMA_TO_DEVICE, 0)


cdef int op_request(dma_device *dev, Mappable rq, dma_policy policy) noexcept nogil:
    cdef dma_map_state st
    cdef dma_map_iter it
    cdef dma_seg seg
    cdef int rc = map_start(dev, &rq.rq, policy, &st, &it)
    while rc == 0:
        if map_next(dev, &st, &it, &seg) <= 0:
            break
    return rc | unmap(dev, &st)


def run(name, Device dev not None, Mappable rq not None, long rounds, policy="unified"):
    """Run one operation ``rounds`` times; returns ns for each on average.

    two-step, two-step-vec, classic: the calls over the request's vectors; alloc: IOVA alloc and free of the request's
    size; request: through the wrapper.
    """
    cdef dma_policy p = DMA_POLICY_LINUX if policy == "linux" else DMA_POLICY_UNIFIED
    cdef dma_addr_t out[256]
    cdef const phys_vec *v = rq.vecs_
    cdef uint32_t n = rq.nr
    cdef uint64_t total = rq.rq.total, t0
    cdef long _round
    cdef int rc = 0, op = ("two-step", "two-step-vec", "classic", "alloc", "request").index(name)
    if op == 2 and n > 256:
        raise DmaValueError("at most 256 vectors", argument="rq", value=n)
    t0 = now_ns()
    with nogil:
        for _round in range(rounds):
            if op == 0:
                rc |= op_two_step(&dev.c, v, n, total)
            elif op == 1:
                rc |= op_two_step_vec(&dev.c, v, n, total)
            elif op == 2:
                rc |= op_classic(&dev.c, v, n, out)
            elif op == 3:
                rc |= op_alloc(&dev.c, total)
            else:
                rc |= op_request(&dev.c, rq, p)
    if rc:
        raise DmaError(f"{name} failed", errno=abs(rc))
    return (now_ns() - t0) / rounds


def dma_against_memcpy(Device dev not None, segments, pages, long rounds):
    """Seconds for ``rounds`` device reads through translation, and for plain memcpy of the same pages.

    ``pages`` are (offset, bytes) in the device's memory arena. The two are interleaved; returns (dma_ns, memcpy_ns)
    as the best of each.
    """
    cdef PhysMemory mem = dev.memory
    cdef uint64_t total = sum(n for _, n in pages), t0, t1, t2, best_dma = 1 << 62, best_copy = 1 << 62
    cdef Py_ssize_t i, ns = len(segments), np = len(pages)
    cdef char *buf = <char *>malloc(total)
    cdef dma_seg *segs = <dma_seg *>malloc(ns * sizeof(dma_seg))
    cdef uint64_t *at = <uint64_t *>malloc(2 * np * sizeof(uint64_t))
    cdef char *to
    cdef dma_fault fault
    cdef int rc = 0
    cdef long _round
    if buf == NULL or segs == NULL or at == NULL:
        free(buf)
        free(segs)
        free(at)
        raise MemoryError("no memory for the run")
    for i in range(ns):
        segs[i].addr.v, segs[i].len = segments[i].addr, segments[i].length
    for i in range(np):
        at[2 * i], at[2 * i + 1] = pages[i]
    with nogil:
        for _round in range(rounds):
            t0 = now_ns()
            to = buf
            for i in range(ns):
                rc |= dev.c.bus.access(&dev.c, segs[i].addr, segs[i].len, to, 0, &fault)
                to += segs[i].len
            t1 = now_ns()
            to = buf
            for i in range(np):
                memcpy(to, mem.arena + at[2 * i], at[2 * i + 1])
                to += at[2 * i + 1]
            t2 = now_ns()
            best_dma = t1 - t0 if t1 - t0 < best_dma else best_dma
            best_copy = t2 - t1 if t2 - t1 < best_copy else best_copy
    free(buf)
    free(segs)
    free(at)
    if rc:
        raise DmaError("the device faulted", errno=14)
    return best_dma, best_copy


def bounce_against_memcpy(Device dev not None, uint64_t offset, uint64_t size, long rounds):
    """Mapping and unmapping ``size`` bytes of the device's arena through its pool, to the device (one copy), and memcpy of
    the same bytes into memory as large as the pool, in turn: best (bounce_ns, memcpy_ns) of blocks of 16."""
    cdef PhysMemory mem = dev.memory
    cdef uint64_t ring = <uint64_t>dev.swiotlb.slots * 2048, at = 0, t0, t1, t2, best_map = 1 << 62, best_copy = 1 << 62
    cdef phys_addr_t phys = phys_addr(int(mem.phys(offset)))
    cdef char *copy = <char *>aligned_alloc(4096, (ring + size + 4095) & ~<uint64_t>4095)  # as the pool is
    cdef dma_addr_t addr
    cdef int rc = 0
    cdef long _round, _i
    if copy == NULL:
        raise MemoryError("no memory for the copies")
    memset(copy, 0, ring + size)
    with nogil:
        for _round in range(rounds):
            t0 = now_ns()
            for _i in range(16):
                rc |= dma_map_phys(&dev.c, phys, size, DMA_TO_DEVICE, 0, &addr)
                rc |= dma_unmap_phys(&dev.c, addr, size, DMA_TO_DEVICE, 0)
            t1 = now_ns()
            for _i in range(16):
                memcpy(copy + at, mem.arena + offset, size)
                at = at + size if at + size < ring else 0
            t2 = now_ns()
            best_map = t1 - t0 if t1 - t0 < best_map else best_map
            best_copy = t2 - t1 if t2 - t1 < best_copy else best_copy
    free(copy)
    if rc:
        raise DmaError("the pool is full", errno=12)
    return best_map / 16, best_copy / 16
