# cython: language_level=3
"""No IOMMU: a DMA address is a physical address, moved by a bus offset where the platform has one, or a machine address
where Xen lies below.

Mirrors kernel/dma/direct.c and drivers/xen/swiotlb-xen.c of Linux 7.3: what the device cannot use where it is bounces, if
there is a pool.
"""
cimport cython
from libc.errno cimport EFAULT, EINVAL, EIO, ENOMEM, EOPNOTSUPP, EREMOTEIO
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from dmapath._core cimport (
    add_atomic as add, below_top, dma_mark_bounced, p2p_dropped, p2p_route, phys_mem_clean, phys_mem_copy, phys_mem_dma,
    phys_mem_inval, phys_mem_read_lock, phys_mem_read_unlock, swiotlb_has, swiotlb_map, swiotlb_pool, swiotlb_sync,
    swiotlb_unmap, swiotlb_want, xen_domain, xen_machine, xen_phys, xen_straddles,
)
from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_ATTR_REQUIRE_COHERENT, DMA_ATTR_SKIP_CPU_SYNC, DMA_DEV_COHERENT, DMA_FAULT_BUS,
    DMA_FROM_DEVICE, DMA_NONE, DMA_P2P_BUS_ADDR, DMA_P2P_NOT_SUPPORTED, DMA_TO_DEVICE, DMAPATH_ABI, dma_addr,
    dma_addr_t, dma_bus_ops, dma_data_direction, dma_device, dma_fault, dma_fault_at, dma_has_bounced, dma_ops,
    dma_ops_init, dma_p2p_bus, dma_p2p_find, dma_p2p_peer, dma_p2p_range, dma_seg, phys_addr, phys_addr_t, phys_vec,
)
from dmapath.backends.base cimport Backend
from dmapath.xen cimport XenDomain

from dmapath.backends.base import COUNTERS

cdef struct direct_counts:
    uint64_t maps, unmaps, sg_maps, sg_unmaps, clean, inval, barriers, faults, bounces, unbounces, bounced_bytes

cdef struct direct_priv:
    direct_counts counts
    xen_domain *xen  # NULL: machine and physical addresses are one


cdef inline direct_counts *counts_of(dma_device *dev) noexcept nogil:
    return &(<direct_priv *>dev.priv).counts


cdef inline xen_domain *xen_of(dma_device *dev) noexcept nogil:
    return (<direct_priv *>dev.priv).xen


# phys_to_dma: the first region that holds the address; none of them: all ones, which no device can reach
cdef uint64_t phys_to_dma(dma_device *dev, uint64_t phys) noexcept nogil:
    cdef uint32_t i
    if xen_of(dev) != NULL:
        return xen_machine(xen_of(dev), phys)
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
    if xen_of(dev) != NULL:
        return xen_phys(xen_of(dev), addr)
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
    dma_mark_bounced(dev)
    add(&counts_of(dev).bounces, 1)
    add(&counts_of(dev).bounced_bytes, size)
    out[0] = dma_addr(addr)
    return 0


# where the pool holds what a DMA address names. Under Xen another guest's frame is looked up where it is mapped here, so it
# cannot be taken for one of the pool's (which Linux has to rule out, bfn_to_local_pfn)
cdef inline bint pooled(dma_device *dev, uint64_t addr, uint64_t *phys) noexcept nogil:
    if dev.swiotlb == NULL:
        return False
    phys[0] = dma_to_phys(dev, addr)
    return swiotlb_has(dev.swiotlb, phys[0])


cdef inline void give_back(dma_device *dev, uint64_t phys, bint copy) noexcept nogil:
    swiotlb_unmap(dev.swiotlb, phys, copy)
    add(&counts_of(dev).unbounces, 1)


cdef inline bint forced(dma_device *dev) noexcept nogil:
    return dev.swiotlb != NULL and (<swiotlb_pool *>dev.swiotlb).force


# xen_swiotlb_map_phys, dma_direct_map_phys: may the device use the range where it is?
cdef inline bint usable(dma_device *dev, uint64_t phys, uint64_t addr, uint64_t size) noexcept nogil:
    cdef xen_domain *xen = xen_of(dev)
    if not capable(dev, addr, size) or forced(dev):
        return False
    return xen == NULL or not xen_straddles(xen, phys, size, not dev.flags & DMA_DEV_COHERENT)


cdef void clean(dma_device *dev, uint64_t phys, uint64_t size) noexcept nogil:
    add(&counts_of(dev).clean, size)
    add(&counts_of(dev).barriers, 1)
    phys_mem_clean(dev.mem, phys, size)


cdef void inval(dma_device *dev, uint64_t phys, uint64_t size) noexcept nogil:
    add(&counts_of(dev).inval, size)
    add(&counts_of(dev).barriers, 1)
    phys_mem_inval(dev.mem, phys, size)


cdef int direct_map_one(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir,
                        unsigned long attrs, dma_addr_t *out) noexcept nogil:
    cdef uint64_t addr
    out.v = UINT64_MAX
    if dir == DMA_NONE or size == 0:
        return -EINVAL
    if attrs & DMA_ATTR_REQUIRE_COHERENT and not dev.flags & DMA_DEV_COHERENT:
        return -EOPNOTSUPP
    if attrs & DMA_ATTR_MMIO:
        if not capable(dev, phys.v, size) or (xen_of(dev) == NULL and forced(dev)):
            return -ENOMEM
        out[0] = dma_addr(phys.v)  # a resource keeps its address: neither offsets nor pools concern it
        return 0
    addr = phys_to_dma(dev, phys.v)
    if addr == UINT64_MAX and xen_of(dev) != NULL:
        return -EFAULT  # no frame is behind it
    if usable(dev, phys.v, addr, size):
        out[0] = dma_addr(addr)
    elif attrs & DMA_ATTR_REQUIRE_COHERENT or bounce(dev, phys.v, size, out):
        return -ENOMEM
    if cpu_sync(dev, attrs):
        clean(dev, dma_to_phys(dev, out.v), size)
    return 0


cdef int direct_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir,
                         unsigned long attrs, dma_addr_t *out) noexcept nogil:
    cdef int rc = direct_map_one(dev, phys, size, dir, attrs, out)
    if rc == 0:
        add(&counts_of(dev).maps, 1)
    return rc


cdef inline void direct_unmap_one(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                                  unsigned long attrs) noexcept nogil:
    cdef uint64_t phys
    if attrs & DMA_ATTR_MMIO or dma_p2p_find(dev, phys_addr(addr.v)) != NULL:
        return
    if cpu_sync(dev, attrs):
        inval(dev, dma_to_phys(dev, addr.v), size)
    if not attrs & DMA_ATTR_REQUIRE_COHERENT and pooled(dev, addr.v, &phys):
        give_back(dev, phys, dir != DMA_TO_DEVICE and not attrs & DMA_ATTR_SKIP_CPU_SYNC)


cdef int direct_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                           unsigned long attrs) noexcept nogil:
    direct_unmap_one(dev, addr, size, dir, attrs)
    add(&counts_of(dev).unmaps, 1)
    return 0


# one entry of a list: a peer's memory by its bus address, whatever the device may reach through the host as it is
cdef int map_entry(dma_device *dev, const phys_vec *v, dma_data_direction dir, unsigned long attrs,
                   dma_addr_t *out) noexcept nogil:
    cdef const dma_p2p_range *peer = dma_p2p_find(dev, v.paddr)
    if peer == NULL:
        return direct_map_one(dev, v.paddr, v.len, dir, attrs, out)
    if peer.type == DMA_P2P_NOT_SUPPORTED:
        return -EREMOTEIO
    if peer.type == DMA_P2P_BUS_ADDR:
        out[0] = dma_p2p_bus(peer, v.paddr)
        return 0
    return direct_map_one(dev, v.paddr, v.len, dir, attrs | DMA_ATTR_MMIO, out)


cdef inline void unmap_entry(dma_device *dev, const dma_seg *s, dma_data_direction dir, unsigned long attrs) noexcept nogil:
    if dma_p2p_peer(dev, s.addr) == NULL:
        direct_unmap_one(dev, s.addr, s.len, dir, attrs)


cdef int direct_map_sg(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                       dma_seg *out) noexcept nogil:
    cdef uint32_t i, j
    cdef int rc
    for i in range(n):
        rc = map_entry(dev, &v[i], dir, attrs, &out[i].addr)
        if rc:
            for j in range(i):
                unmap_entry(dev, &out[j], dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
            return rc if rc == -EOPNOTSUPP or rc == -EREMOTEIO else -EIO
        out[i].len = v[i].len
    add(&counts_of(dev).sg_maps, 1)
    return <int>n


cdef int direct_unmap_sg(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                         unsigned long attrs) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        unmap_entry(dev, &s[i], dir, attrs)
    add(&counts_of(dev).sg_unmaps, 1)
    return 0


cdef int direct_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size,
                             dma_data_direction dir) noexcept nogil:
    cdef uint64_t phys
    if not dev.flags & DMA_DEV_COHERENT:
        inval(dev, dma_to_phys(dev, addr.v), size)
    if dir != DMA_TO_DEVICE and pooled(dev, addr.v, &phys):
        swiotlb_sync(dev.swiotlb, phys, size, False)
    return 0


cdef int direct_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size,
                                dma_data_direction dir) noexcept nogil:
    cdef uint64_t phys
    if dir != DMA_FROM_DEVICE and pooled(dev, addr.v, &phys):
        swiotlb_sync(dev.swiotlb, phys, size, True)
    if not dev.flags & DMA_DEV_COHERENT:
        clean(dev, dma_to_phys(dev, addr.v), size)
    return 0


# dma_need_unmap: a coherent direct device that never bounced may forget its addresses
cdef int direct_need_unmap(dma_device *dev) noexcept nogil:
    return 0 if dev.flags & DMA_DEV_COHERENT and not dma_has_bounced(dev) else 1


cdef int direct_is_bounced(dma_device *dev, dma_addr_t addr) noexcept nogil:
    cdef uint64_t phys
    return pooled(dev, addr.v, &phys)


# machine pages need not lie as the guest's do
cdef uint64_t host_access(dma_device *dev, uint64_t addr, uint64_t n, char *mine, int write) noexcept nogil:
    cdef uint64_t done = 0, part, phys, moved
    if xen_of(dev) == NULL:
        phys = dma_to_phys(dev, addr)
        return 0 if dev.p2p != NULL and p2p_dropped(dev, phys) else phys_mem_dma(dev.mem, dev, phys, mine, n, write != 0)
    while done < n:
        part = 4096 - (addr + done & 4095)
        part = part if part < n - done else n - done
        phys = xen_phys(xen_of(dev), addr + done)
        moved = phys_mem_dma(dev.mem, dev, phys, mine + done, part, write != 0) if phys != UINT64_MAX else 0
        done += moved
        if moved < part:
            break
    return done


cdef int direct_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write,
                       dma_fault *fault) noexcept nogil:
    cdef uint64_t reach = below_top(addr.v, n), done = 0, part = reach, phys = 0, moved = 0
    phys_mem_read_lock(dev.mem)
    while done < reach:
        if dev.p2p != NULL:
            part = p2p_route(dev, addr.v + done, reach - done, &phys)
        if phys:
            moved = phys_mem_copy(dev.mem, phys, <char *>buf + done, part, write != 0)
        else:
            moved = host_access(dev, addr.v + done, part, <char *>buf + done, write)
        done += moved
        if moved < part:
            break
    phys_mem_read_unlock(dev.mem)
    if done == n:
        return 0
    add(&counts_of(dev).faults, 1)
    return dma_fault_at(fault, addr.v, done, DMA_FAULT_BUS, write)


cdef dma_bus_ops direct_bus
direct_bus.access = direct_access


@cython.no_gc_clear  # mappings are given back through it
cdef class DirectBackend(Backend):
    """No IOMMU, an IOMMU in passthrough, or Xen's own bounce pool (swiotlb-xen)."""

    cdef direct_priv priv
    cdef XenDomain xen

    def __cinit__(self, XenDomain xen=None):
        cdef dma_ops mine
        mine = dma_ops(abi=DMAPATH_ABI, size=sizeof(dma_ops), name=b"direct", map_phys=direct_map_phys,
                       unmap_phys=direct_unmap_phys, iova_try_alloc=NULL, iova_link=NULL, iova_link_vec=NULL,
                       iova_link_gapped=NULL, iova_sync=NULL, iova_unlink=NULL, iova_free=NULL,
                       map_sg=direct_map_sg, unmap_sg=direct_unmap_sg, sync_for_cpu=direct_sync_for_cpu,
                       sync_for_device=direct_sync_for_device, merge_boundary=NULL, need_unmap=direct_need_unmap,
                       is_bounced=direct_is_bounced, keys_of=NULL)
        dma_ops_init(&self.ops, &mine)
        self.xen, self.native = xen, True
        if xen is not None:
            self.priv.xen = &xen.c

    @property
    def name(self):
        return "direct" if self.xen is None else "xen"

    cdef int attach(self, dma_device *dev) except -1:
        dev.ops = &self.ops
        dev.priv = &self.priv
        dev.bus = &direct_bus
        if self.xen is not None:
            self.xen.attach(dev)
        return 0

    cdef int map_coherent(self, dma_device *dev, uint64_t phys, uint64_t size, dma_addr_t *out) noexcept:
        cdef uint64_t addr = phys_to_dma(dev, phys)
        out[0] = dma_addr(addr)
        return 0 if capable(dev, addr, size) else -ENOMEM

    cdef void unmap_coherent(self, dma_device *dev, dma_addr_t addr, uint64_t size) noexcept:
        pass

    def counters(self):
        """Exact counts; every IOVA and page-table figure is 0 here."""
        c = self.priv.counts
        out = dict.fromkeys(COUNTERS, 0)
        out.update(maps=c.maps, unmaps=c.unmaps, sg_maps=c.sg_maps, sg_unmaps=c.sg_unmaps, cache_clean_bytes=c.clean,
                   cache_inval_bytes=c.inval, barriers=c.barriers, faults=c.faults, bounces=c.bounces,
                   bounces_live=c.bounces - c.unbounces, bounced_bytes=c.bounced_bytes)
        return out
