# cython: language_level=3
"""No IOMMU: a DMA address is a physical address, moved by a bus offset where the platform has one.

Mirrors kernel/dma/direct.c of Linux 7.3: what the device cannot reach bounces, if it has a pool.
"""
from libc.errno cimport EINVAL, EIO, ENOMEM, EOPNOTSUPP
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from dmapath._core cimport (
    phys_mem_copy, phys_mem_read_lock, phys_mem_read_unlock, swiotlb_has, swiotlb_map, swiotlb_pool, swiotlb_sync,
    swiotlb_unmap, swiotlb_want,
)
from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_ATTR_REQUIRE_COHERENT, DMA_ATTR_SKIP_CPU_SYNC, DMA_DEV_BOUNCED, DMA_DEV_COHERENT, DMA_FAULT_BUS,
    DMA_FROM_DEVICE, DMA_NONE, DMA_TO_DEVICE, DMAPATH_ABI, dma_addr, dma_addr_t, dma_bus_ops,
    dma_data_direction, dma_device, dma_fault, dma_ops, dma_ops_init, dma_seg, phys_addr_t, phys_vec,
)
from dmapath.backends.base cimport Backend

from dmapath.backends.base import COUNTERS

cdef extern from *:
    """
    #include <stdint.h>
    struct direct_counts { uint64_t maps, unmaps, sg_maps, sg_unmaps, clean, inval, barriers, faults; };
    #define add(p, n) ((void)__atomic_fetch_add(&(p), (n), __ATOMIC_RELAXED))
    """
    struct direct_counts:
        uint64_t maps, unmaps, sg_maps, sg_unmaps, clean, inval, barriers, faults
    void add(uint64_t, uint64_t) noexcept nogil


cdef extern from *:
    """
    /* the first bounce ends the device's licence to forget its addresses, for good */
    #define mark_bounced(dev) ((void)__atomic_fetch_or(&(dev)->flags, DMA_DEV_BOUNCED, __ATOMIC_RELAXED))
    """
    void mark_bounced(dma_device *) noexcept nogil


cdef inline direct_counts *counts_of(dma_device *dev) noexcept nogil:
    return <direct_counts *>dev.priv


# phys_to_dma: the first region that holds the address; none of them: all ones, which no device can reach
cdef uint64_t phys_to_dma(dma_device *dev, uint64_t phys) noexcept nogil:
    cdef uint32_t i
    if not dev.nr_ranges:
        return phys
    for i in range(dev.nr_ranges):
        if phys - dev.ranges[i].cpu_start.v < dev.ranges[i].size:
            return phys - dev.ranges[i].cpu_start.v + dev.ranges[i].dma_start.v
    return UINT64_MAX


# dma_capable: the last byte is within min_nonzero(mask, bus limit)
cdef bint capable(dma_device *dev, uint64_t addr, uint64_t size) noexcept nogil:
    cdef uint64_t last = addr + size - 1, limit = dev.dma_mask
    if addr == UINT64_MAX or last < addr:
        return False
    if dev.bus_dma_limit and (not limit or dev.bus_dma_limit < limit):
        limit = dev.bus_dma_limit
    return last <= limit


# dma_to_phys
cdef uint64_t dma_to_phys(dma_device *dev, uint64_t addr) noexcept nogil:
    cdef uint32_t i
    for i in range(dev.nr_ranges):
        if addr - dev.ranges[i].dma_start.v < dev.ranges[i].size:
            return addr - dev.ranges[i].dma_start.v + dev.ranges[i].cpu_start.v
    return addr


cdef inline bint cpu_sync(dma_device *dev, unsigned long attrs) noexcept nogil:
    return not (dev.flags & DMA_DEV_COHERENT) and not (attrs & (DMA_ATTR_SKIP_CPU_SYNC | DMA_ATTR_MMIO))


# swiotlb_map
cdef int bounce(dma_device *dev, uint64_t phys, uint64_t size, dma_addr_t *out) noexcept nogil:
    cdef swiotlb_want want
    cdef uint64_t at, addr
    if dev.swiotlb == NULL:
        return -ENOMEM
    want.min_align_mask = dev.min_align_mask
    want.alloc_align_mask = 0
    want.boundary_mask = dev.limits.seg_boundary_mask
    if swiotlb_map(dev.swiotlb, &want, phys, size, &at):
        return -ENOMEM
    addr = phys_to_dma(dev, at)
    if not capable(dev, addr, size):
        swiotlb_unmap(dev.swiotlb, at, False)
        return -ENOMEM
    mark_bounced(dev)
    out[0] = dma_addr(addr)
    return 0


cdef int direct_map_one(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir,
                        unsigned long attrs, dma_addr_t *out) noexcept nogil:
    cdef uint64_t addr
    out.v = UINT64_MAX
    if dir == DMA_NONE or size == 0:
        return -EINVAL
    if attrs & DMA_ATTR_REQUIRE_COHERENT and not dev.flags & DMA_DEV_COHERENT:
        return -EOPNOTSUPP
    addr = phys.v if attrs & DMA_ATTR_MMIO else phys_to_dma(dev, phys.v)
    if not capable(dev, addr, size) or (dev.swiotlb != NULL and (<swiotlb_pool *>dev.swiotlb).force):
        if attrs & (DMA_ATTR_MMIO | DMA_ATTR_REQUIRE_COHERENT):
            return -ENOMEM
        if bounce(dev, phys.v, size, out):
            return -ENOMEM
    else:
        out[0] = dma_addr(addr)
    if cpu_sync(dev, attrs):
        add(counts_of(dev).clean, size)
        add(counts_of(dev).barriers, 1)
    return 0


cdef int direct_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir,
                         unsigned long attrs, dma_addr_t *out) noexcept nogil:
    cdef int rc = direct_map_one(dev, phys, size, dir, attrs, out)
    if rc == 0:
        add(counts_of(dev).maps, 1)
    return rc


cdef inline void direct_unmap_one(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                                  unsigned long attrs) noexcept nogil:
    cdef uint64_t phys
    if cpu_sync(dev, attrs):
        add(counts_of(dev).inval, size)
        add(counts_of(dev).barriers, 1)
    if dev.swiotlb != NULL and not attrs & (DMA_ATTR_MMIO | DMA_ATTR_REQUIRE_COHERENT):
        phys = dma_to_phys(dev, addr.v)
        if swiotlb_has(dev.swiotlb, phys):
            swiotlb_unmap(dev.swiotlb, phys, dir != DMA_TO_DEVICE and not attrs & DMA_ATTR_SKIP_CPU_SYNC)


cdef int direct_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                           unsigned long attrs) noexcept nogil:
    direct_unmap_one(dev, addr, size, dir, attrs)
    add(counts_of(dev).unmaps, 1)
    return 0


cdef int direct_map_sg(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                       dma_seg *out) noexcept nogil:
    cdef uint32_t i, j
    cdef int rc
    for i in range(n):
        rc = direct_map_one(dev, v[i].paddr, v[i].len, dir, attrs, &out[i].addr)
        if rc:
            for j in range(i):
                direct_unmap_one(dev, out[j].addr, out[j].len, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
            return rc if rc == -EOPNOTSUPP else -EIO
        out[i].len = v[i].len
    add(counts_of(dev).sg_maps, 1)
    return <int>n


cdef int direct_unmap_sg(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                         unsigned long attrs) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        direct_unmap_one(dev, s[i].addr, s[i].len, dir, attrs)
    add(counts_of(dev).sg_unmaps, 1)
    return 0


cdef int direct_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size,
                             dma_data_direction dir) noexcept nogil:
    if not dev.flags & DMA_DEV_COHERENT:
        add(counts_of(dev).inval, size)
        add(counts_of(dev).barriers, 1)
    if dir != DMA_TO_DEVICE and direct_is_bounced(dev, addr):
        swiotlb_sync(dev.swiotlb, dma_to_phys(dev, addr.v), size, False)
    return 0


cdef int direct_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size,
                                dma_data_direction dir) noexcept nogil:
    if dir != DMA_FROM_DEVICE and direct_is_bounced(dev, addr):
        swiotlb_sync(dev.swiotlb, dma_to_phys(dev, addr.v), size, True)
    if not dev.flags & DMA_DEV_COHERENT:
        add(counts_of(dev).clean, size)
        add(counts_of(dev).barriers, 1)
    return 0


# dma_need_unmap: a coherent direct device that never bounced may forget its addresses
cdef int direct_need_unmap(dma_device *dev) noexcept nogil:
    return 0 if dev.flags & DMA_DEV_COHERENT and not dev.flags & DMA_DEV_BOUNCED else 1


cdef int direct_is_bounced(dma_device *dev, dma_addr_t addr) noexcept nogil:
    return swiotlb_has(dev.swiotlb, dma_to_phys(dev, addr.v))


cdef int direct_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write,
                       dma_fault *fault) noexcept nogil:
    cdef uint64_t phys = dma_to_phys(dev, addr.v), done
    phys_mem_read_lock(dev.mem)
    done = phys_mem_copy(dev.mem, phys, buf, n, write != 0)
    phys_mem_read_unlock(dev.mem)
    if done == n:
        return 0
    fault.addr = dma_addr(addr.v + done)
    fault.done = done
    fault.reason = DMA_FAULT_BUS
    fault.write = write
    add(counts_of(dev).faults, 1)
    return -14


cdef dma_bus_ops direct_bus
direct_bus.access = direct_access


cdef class DirectBackend(Backend):
    """No IOMMU, or an IOMMU in passthrough."""

    cdef direct_counts counts
    name = "direct"

    def __cinit__(self):
        cdef dma_ops mine
        mine = dma_ops(abi=DMAPATH_ABI, size=sizeof(dma_ops), name=b"direct", map_phys=direct_map_phys,
                       unmap_phys=direct_unmap_phys, iova_try_alloc=NULL, iova_link=NULL, iova_link_vec=NULL,
                       iova_link_gapped=NULL, iova_sync=NULL, iova_unlink=NULL, iova_free=NULL,
                       map_sg=direct_map_sg, unmap_sg=direct_unmap_sg, sync_for_cpu=direct_sync_for_cpu,
                       sync_for_device=direct_sync_for_device, merge_boundary=NULL, need_unmap=direct_need_unmap,
                       is_bounced=direct_is_bounced)
        dma_ops_init(&self.ops, &mine)

    cdef int attach(self, dma_device *dev) except -1:
        dev.ops = &self.ops
        dev.priv = &self.counts
        dev.bus = &direct_bus
        return 0

    def counters(self):
        """Exact counts; every IOVA and page-table figure is 0 here."""
        out = dict.fromkeys(COUNTERS, 0)
        out.update(maps=self.counts.maps, unmaps=self.counts.unmaps, sg_maps=self.counts.sg_maps,
                   sg_unmaps=self.counts.sg_unmaps, cache_clean_bytes=self.counts.clean,
                   cache_inval_bytes=self.counts.inval, barriers=self.counts.barriers, faults=self.counts.faults)
        return out
