# cython: language_level=3
"""The simulated IOMMU's ops table: what Linux 7.3's drivers/iommu/dma-iommu.c decides above page table and allocator.

Error codes and the order of checks are dma-iommu.c's; the numbers in comments are errno values it returns.
"""
cimport cython
from libc.errno cimport EINVAL, EIO, ENOENT, ENOMEM, EOPNOTSUPP, EPERM, ERANGE, EREMOTEIO
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from dmapath._core cimport (
    C_BARRIERS, C_BOUNCED_BYTES, C_BOUNCES, C_CACHE_CLEAN, C_CACHE_INVAL, C_COUNT, C_FAULTS, C_INVAL_FULL,
    C_INVAL_RANGE, C_IOVA_ALLOC_BYTES, C_IOVA_ALLOCS, C_IOVA_FREE_BYTES, C_IOVA_FREES, C_LINKS, C_MAPS, C_PTE_CLEAR,
    C_PTE_SET, C_SG_MAPS, C_SG_UNMAPS, C_SYNC_FLUSH, C_SYNCS, C_UNBOUNCES, C_UNLINKS, C_UNMAPS, EV_BARRIER,
    EV_BOUNCE, EV_CACHE_INVAL, EV_CLEAN, IOVA_ORDERS, PROT_CACHE, PTE_LEAF, PTE_PROT, PROT_MMIO, PROT_PRIV,
    PROT_READ_, PROT_WRITE_, below_top, count, core_alloc, counter_read, dma_mark_bounced, dom_alloc_iova,
    dom_alloc_iova_at, dom_attach, dom_bus_access, dom_flush_begin, dom_flush_end, dom_flush_queues, dom_free_iova,
    dom_granule, dom_iova_to_phys, dom_link_gapped, dom_link_page, dom_link_vec, dom_map, dom_off, dom_queued, dom_record,
    dom_sync_map, dom_translate, dom_unmap, dom_unmap_free, dom_up, fail_point, iommu_domain, iommu_domain_config,
    iommu_domain_create, iommu_domain_free, iommu_unit, iommu_unit_advance, iommu_unit_destroy, iommu_unit_init,
    iova_alloc_fast, iova_cached_ranges, iova_free_fast, iova_reserve, lock_acquire, lock_release, note, pgt_lookup,
    pgt_walk, phys_mem_clean, phys_mem_inval, swiotlb_has, swiotlb_map, swiotlb_sync, swiotlb_unmap, swiotlb_want,
    swiotlb_zero_around, translation,
)
from dmapath.abi cimport (
    DMAPATH_ABI, DMA_ATTR_MMIO, DMA_ATTR_PRIVILEGED, DMA_ATTR_REQUIRE_COHERENT, DMA_ATTR_SKIP_CPU_SYNC,
    DMA_DEV_COHERENT, DMA_DEV_QUIRKS, DMA_DEV_UNTRUSTED, DMA_FROM_DEVICE, DMA_IOVA_USE_SWIOTLB, DMA_NONE,
    DMA_P2P_BUS_ADDR, DMA_P2P_NONE, DMA_P2P_NOT_SUPPORTED, DMA_TO_DEVICE, dma_addr, dma_addr_t, dma_bus_ops,
    dma_data_direction, dma_device, dma_fault, dma_iova_size, dma_iova_state, dma_ops, dma_ops_init, dma_p2p_bus,
    dma_p2p_kind, dma_p2p_find, dma_p2p_peer, dma_seg, phys_addr_t, phys_vec,
)
from dmapath.backends.base cimport Backend

from dmapath.addr import DmaAddr, Iova, PhysAddr, as_iova, as_length, as_phys
from dmapath.backends.base import COUNTERS
from dmapath.errors import DmaValueError, error_for

_EVENTS = ("alloc", "free", "map", "unmap", "sync", "flush", "flush_np", "flush_all", "cache_clean", "cache_inval",
           "barrier", "fault", "bounce")
_MODES = ("strict", "lazy", "passthrough")


cdef extern from *:
    """
    #define unlikely(x) __builtin_expect(!!(x), 0)
    """
    bint unlikely(bint) noexcept nogil


cdef inline iommu_domain *domain_of(dma_device *dev) noexcept nogil:
    return <iommu_domain *>dev.priv


# dma_info_to_prot
cdef inline unsigned dir_prot(dma_data_direction dir) noexcept nogil:
    # two bits for each direction: bidirectional reads and writes, to_device reads, from_device writes, none nothing
    return (0x27 >> (2 * <unsigned>dir)) & (PROT_READ_ | PROT_WRITE_)


cdef inline unsigned prot_of(dma_device *dev, dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef unsigned prot = dir_prot(dir)
    if attrs & DMA_ATTR_MMIO:
        prot |= PROT_MMIO
    elif dev.flags & DMA_DEV_COHERENT:
        prot |= PROT_CACHE
    if attrs & DMA_ATTR_PRIVILEGED:
        prot |= PROT_PRIV
    return prot


cdef inline bint cpu_sync(dma_device *dev, unsigned long attrs) noexcept nogil:
    return not (dev.flags & DMA_DEV_COHERENT) and not (attrs & (DMA_ATTR_SKIP_CPU_SYNC | DMA_ATTR_MMIO))


cdef void barrier(iommu_domain *d) noexcept nogil:
    count(d.counters, C_BARRIERS, 1)
    note(d, EV_BARRIER, 0, 0, 0)


cdef void clean_for_device(dma_device *dev, uint64_t phys, uint64_t size) noexcept nogil:
    count(domain_of(dev).counters, C_CACHE_CLEAN, size)
    note(domain_of(dev), EV_CLEAN, phys, size, 0)
    phys_mem_clean(dev.mem, phys, size)


cdef void inval_for_cpu(dma_device *dev, uint64_t phys, uint64_t size) noexcept nogil:
    count(domain_of(dev).counters, C_CACHE_INVAL, size)
    note(domain_of(dev), EV_CACHE_INVAL, phys, size, 0)
    phys_mem_inval(dev.mem, phys, size)


# hand `size` bytes from addr on over as they lie in memory, granule by granule: what bounced is copied, what the caches hold
# is maintained (devices' registers have no cache), in the order that keeps the newer bytes
cdef void hand_over(dma_device *dev, uint64_t addr, uint64_t size, bint for_cpu, bint copy) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t left = below_top(addr, size), n
    cdef bint cached = not dev.flags & DMA_DEV_COHERENT
    cdef translation t
    while (copy or cached) and left:
        if dom_translate(d, addr, &t):
            n = granule_part(d, addr, left)
            if for_cpu and cached and not t.prot & PROT_MMIO:
                inval_for_cpu(dev, t.phys, n)
            if copy and swiotlb_has(dev.swiotlb, t.phys):
                swiotlb_sync(dev.swiotlb, t.phys, n, not for_cpu)
            if not for_cpu and cached and not t.prot & PROT_MMIO:
                clean_for_device(dev, t.phys, n)
        else:
            n = t.left if t.left < left else left
        addr += n
        left -= n


# bytes from addr to the end of its granule, at most `left`
cdef inline uint64_t granule_part(iommu_domain *d, uint64_t addr, uint64_t left) noexcept nogil:
    cdef uint64_t n = dom_granule(d) - dom_off(d, addr)
    return n if n < left else left


# ---- two steps ----------------------------------------------------------------------------------------------------

# dma_iova_try_alloc
cdef int iommu_try_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off = dom_off(d, phys.v), iova
    st.addr = dma_addr(0)
    st.size = 0
    if size == 0 or size & DMA_IOVA_USE_SWIOTLB:
        return 0
    iova = dom_alloc_iova(d, dev, dom_up(d, size + off))
    if iova == 0:
        return 0
    st.addr = dma_addr(iova + off)
    st.size = size
    return 1


# ---- bouncing (iommu_dma_map_swiotlb) --------------------------------------------------------------------------------

# a buffer of whole granules in the pool; an untrusted device sees zeros around the data
cdef int bounce(dma_device *dev, uint64_t phys, uint64_t size, uint64_t *out) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef swiotlb_want want
    if dev.swiotlb == NULL:
        return -ENOMEM
    want.min_align_mask = dev.min_align_mask
    want.alloc_align_mask = dom_granule(d) - 1
    want.boundary_mask = dev.limits.seg_boundary_mask
    if swiotlb_map(dev.swiotlb, &want, phys, size, out):
        return -ENOMEM
    if dev.flags & DMA_DEV_UNTRUSTED:
        swiotlb_zero_around(dev.swiotlb, out[0], size, dom_granule(d) - 1)
    dma_mark_bounced(dev)
    count(d.counters, C_BOUNCES, 1)
    count(d.counters, C_BOUNCED_BYTES, size)
    note(d, EV_BOUNCE, phys, size, out[0])
    return 0


cdef inline void drop_bounce(dma_device *dev, uint64_t phys, bint copy_back) noexcept nogil:
    swiotlb_unmap(dev.swiotlb, phys, copy_back)
    count(domain_of(dev).counters, C_UNBOUNCES, 1)


cdef inline void unbounce(dma_device *dev, uint64_t phys, dma_data_direction dir, unsigned long attrs) noexcept nogil:
    if swiotlb_has(dev.swiotlb, phys):
        drop_bounce(dev, phys, dir != DMA_TO_DEVICE and not attrs & DMA_ATTR_SKIP_CPU_SYNC)


# undo links of a call that fails: nothing is copied back
cdef void take_back(dma_device *dev, uint64_t addr, uint64_t size, unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off = dom_off(d, addr)
    unlink_slow(dev, addr, size, DMA_TO_DEVICE, attrs)
    dom_unmap(d, addr - off, dom_up(d, size + off))


# iommu_dma_iova_bounce_and_link: a part of one granule, `pad` bytes into it
cdef int bounce_and_link(dma_device *dev, dma_iova_state *st, uint64_t addr, uint64_t phys, uint64_t size, uint64_t pad,
                         unsigned prot, unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t at
    cdef pgt_walk w
    cdef int rc = bounce(dev, phys, size, &at)
    if rc:
        return rc
    memset(&w, 0, sizeof(w))
    rc = dom_map(d, &w, addr - pad, at - pad, dom_up(d, size + pad), prot)
    if rc:
        drop_bounce(dev, at, False)
        return rc
    if cpu_sync(dev, attrs):
        clean_for_device(dev, at - pad, dom_up(d, size + pad))
    st.size |= DMA_IOVA_USE_SWIOTLB
    return 0


# iommu_dma_iova_link_swiotlb: head and tail bounce, the middle is linked as it is; addr names the first byte
cdef int link_bounced(dma_device *dev, dma_iova_state *st, uint64_t addr, uint64_t phys, uint64_t size,
                      dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t head = dom_off(d, phys), tail = dom_off(d, phys + size), mapped = 0, part
    cdef unsigned prot = prot_of(dev, dir, attrs)
    cdef pgt_walk w
    cdef int rc = 0
    memset(&w, 0, sizeof(w))
    if head:
        part = dom_granule(d) - head
        part = part if part < size else size
        rc = bounce_and_link(dev, st, addr, phys, part, head, prot, attrs)
        if rc or part == size:
            return rc
        mapped = part
    if size - mapped > tail:
        part = size - mapped - tail
        rc = dom_map(d, &w, addr + mapped, phys + mapped, part, prot)
        if rc == 0:
            if cpu_sync(dev, attrs):
                clean_for_device(dev, phys + mapped, part)
            mapped += part
    if rc == 0 and tail:
        rc = bounce_and_link(dev, st, addr + mapped, phys + mapped, tail, 0, prot, attrs)
    if rc and mapped:
        take_back(dev, addr, mapped, attrs)
    return rc


cdef uint64_t span_of(iommu_domain *d, const phys_vec *v, uint32_t n, bint gapped) noexcept nogil:
    cdef uint64_t total = 0, one
    cdef uint32_t i
    for i in range(n):
        if v[i].len > (1ULL << 62):
            return UINT64_MAX
        one = dom_up(d, v[i].len + dom_off(d, v[i].paddr.v)) if gapped else v[i].len
        total += one
        if total > (1ULL << 62):
            return UINT64_MAX
    return total


# the same for each of n ranges; all or nothing
cdef int link_bounced_vec(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                          dma_data_direction dir, unsigned long attrs, bint gapped) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t at = st.addr.v + offset, off
    cdef uint32_t i
    cdef int rc = 0
    for i in range(n):
        off = dom_off(d, v[i].paddr.v)
        if off and not gapped and at != st.addr.v:
            rc = -EIO
        else:
            rc = link_bounced(dev, st, at + off if gapped else at, v[i].paddr.v, v[i].len, dir, attrs)
        if rc:
            break
        at += dom_up(d, v[i].len + off) if gapped else v[i].len
    if rc == 0:
        count(d.counters, C_LINKS, n)
    elif at != st.addr.v + offset:
        take_back(dev, st.addr.v + offset, at - st.addr.v - offset, attrs)
    return rc


# what dma_iova_link refuses before it maps anything, for devices that are more than coherent and trusted; 1: bounce
cdef int link_refused(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n,
                      unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint32_t i
    if attrs & DMA_ATTR_REQUIRE_COHERENT and (st.size & DMA_IOVA_USE_SWIOTLB or not dev.flags & DMA_DEV_COHERENT):
        return -EOPNOTSUPP
    if dev.flags & DMA_DEV_UNTRUSTED:
        for i in range(n):
            if v[i].len == 0:
                return -EINVAL
            if dom_off(d, v[i].paddr.v | v[i].len):
                return -EPERM if attrs & (DMA_ATTR_MMIO | DMA_ATTR_REQUIRE_COHERENT) else 1
    return 0


cdef void clean_linked(dma_device *dev, const phys_vec *v, uint32_t n) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off
    cdef uint32_t i
    for i in range(n):
        off = dom_off(d, v[i].paddr.v)
        clean_for_device(dev, v[i].paddr.v - off, dom_up(d, v[i].len + off))


# dma_iova_link, n times in one walk
cdef inline int link_ranges(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                            dma_data_direction dir, unsigned long attrs, bint gapped) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t room = dma_iova_size(st)
    cdef int rc = 0
    if offset and not gapped and dom_off(d, v[0].paddr.v):
        return -EIO
    if unlikely(dev.flags != DMA_DEV_COHERENT or st.size & DMA_IOVA_USE_SWIOTLB):
        rc = link_refused(dev, st, v, n, attrs)
        if rc < 0:
            return rc
        if dev.flags & DMA_DEV_QUIRKS:
            room = below_top(st.addr.v, UINT64_MAX)
    if unlikely(offset > room):
        return -ERANGE
    room -= offset
    if gapped:
        room = dom_up(d, room)
    if unlikely(rc):
        if span_of(d, v, n, gapped) > room:
            return -ERANGE
        return link_bounced_vec(dev, st, v, n, offset, dir, attrs, gapped)
    if gapped:
        rc = dom_link_gapped(d, st.addr.v + offset, room, v, n, prot_of(dev, dir, attrs))
    else:
        rc = dom_link_vec(d, st.addr.v + offset, room, v, n, prot_of(dev, dir, attrs))
    if unlikely(rc == 0 and cpu_sync(dev, attrs)):
        clean_linked(dev, v, n)
    return rc


cdef int iommu_link_vec(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                        dma_data_direction dir, unsigned long attrs) noexcept nogil:
    if n == 0:
        return -EINVAL
    return link_ranges(dev, st, v, n, offset, dir, attrs, False)


cdef int iommu_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                    dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef phys_vec one
    if attrs == 0 and dom_link_page(domain_of(dev), st, phys.v, offset, size, dir_prot(dir)):
        return 0
    one.paddr = phys
    one.len = size
    return link_ranges(dev, st, &one, 1, offset, dir, attrs, False)


cdef int iommu_link_gapped(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                           dma_data_direction dir, unsigned long attrs) noexcept nogil:
    if n == 0 or dom_off(domain_of(dev), st.addr.v + offset):
        return -EINVAL
    return link_ranges(dev, st, v, n, offset, dir, attrs, True)


# dma_iova_sync
cdef int iommu_sync(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t addr = st.addr.v + offset, off = dom_off(d, addr)
    if unlikely(not dev.flags & DMA_DEV_COHERENT):
        barrier(d)
    dom_sync_map(d, addr - off, dom_up(d, size + off))
    count(d.counters, C_SYNCS, 1)
    return 0


# iommu_dma_iova_unlink_range_slow: granule by granule, by the physical address behind each; slots of the pool go back
# while the IOMMU still maps them
cdef void unlink_slow(dma_device *dev, uint64_t addr, uint64_t size, dma_data_direction dir,
                      unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t left = below_top(addr, size), n
    cdef translation t
    while left and dom_translate(d, addr, &t):
        n = granule_part(d, addr, left)
        if cpu_sync(dev, attrs) and not t.prot & PROT_MMIO:
            inval_for_cpu(dev, t.phys, n)
        unbounce(dev, t.phys, dir, attrs)
        addr += n
        left -= n
    if cpu_sync(dev, attrs):
        barrier(d)


# dma_iova_unlink: always flushed at once, in lazy domains too
cdef int iommu_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                      unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t addr = st.addr.v + offset, off = dom_off(d, addr), span = dom_up(d, size + off), done
    if not dev.flags & DMA_DEV_QUIRKS and (size > dma_iova_size(st) or offset > dma_iova_size(st) - size):
        return -ERANGE
    if unlikely(st.size & DMA_IOVA_USE_SWIOTLB or cpu_sync(dev, attrs)):
        unlink_slow(dev, addr, size, dir, attrs)
    done = dom_unmap(d, addr - off, span)
    count(d.counters, C_UNLINKS, 1)
    return 0 if done == span else -ENOENT


# dma_iova_free
cdef int iommu_free(dma_device *dev, dma_iova_state *st) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off = dom_off(d, st.addr.v)
    dom_free_iova(d, st.addr.v - off, dom_up(d, dma_iova_size(st) + off))
    return 0


# ---- classic ------------------------------------------------------------------------------------------------------

# iommu_dma_map_phys
cdef int iommu_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir,
                        unsigned long attrs, dma_addr_t *out) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off = dom_off(d, phys.v), span = dom_up(d, size + off), iova, at = phys.v
    cdef bint bounced = False
    cdef pgt_walk w
    cdef int rc
    out.v = UINT64_MAX
    if dir == DMA_NONE or size == 0 or span < size:
        return -EINVAL
    if attrs & DMA_ATTR_REQUIRE_COHERENT and not dev.flags & DMA_DEV_COHERENT:
        return -EOPNOTSUPP
    if dev.flags & DMA_DEV_UNTRUSTED and not attrs & DMA_ATTR_MMIO and dom_off(d, phys.v | size):
        if attrs & DMA_ATTR_REQUIRE_COHERENT:
            return -EPERM
        if bounce(dev, phys.v, size, &at):  # the whole buffer, not only its head and tail
            return -ENOMEM
        bounced = True
        off = dom_off(d, at)
        span = dom_up(d, size + off)
    iova = 0
    rc = -EINVAL if dev.min_align_mask > dom_granule(d) - 1 else 0
    if rc == 0:
        iova = dom_alloc_iova_at(d, dev, span, off)
        rc = 0 if iova else -ENOMEM
    if rc == 0:
        memset(&w, 0, sizeof(w))
        if dom_map(d, &w, iova, at - off, span, prot_of(dev, dir, attrs)):
            dom_free_iova(d, iova, span)
            rc = -ENOMEM  # all that DMA_MAPPING_ERROR tells
    if rc:
        if bounced:
            drop_bounce(dev, at, False)
        return rc
    if cpu_sync(dev, attrs):
        clean_for_device(dev, at, size)
        barrier(d)
    dom_sync_map(d, iova, span)
    count(d.counters, C_MAPS, 1)
    out[0] = dma_addr(iova + off)
    return 0


# iommu_dma_unmap_phys
cdef int iommu_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                          unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off = dom_off(d, addr.v), span = dom_up(d, size + off), phys = UINT64_MAX, done
    cdef translation t
    if not attrs & (DMA_ATTR_MMIO | DMA_ATTR_REQUIRE_COHERENT):
        phys = dom_iova_to_phys(d, addr.v)
        if phys == UINT64_MAX:
            return -ENOENT  # Linux warns and does nothing
        if cpu_sync(dev, attrs) and dom_translate(d, addr.v, &t) and not t.prot & PROT_MMIO:
            inval_for_cpu(dev, phys, size)
            barrier(d)
    done = dom_unmap_free(d, addr.v - off, span)
    unbounce(dev, phys, dir, attrs)
    count(d.counters, C_UNMAPS, 1)
    return 0 if done == span else -ENOENT


# how the device reaches an address: NONE is memory of the host's
cdef inline uint32_t bus_type(dma_device *dev, phys_addr_t phys) noexcept nogil:
    return dma_p2p_kind(dma_p2p_find(dev, phys))


# iommu_dma_map_sg, its first pass: bytes of IOVA each entry takes, padded so that no segment crosses a boundary
cdef uint64_t sg_spans(dma_device *dev, const phys_vec *v, uint32_t n, uint64_t *span) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t mask = dev.limits.seg_boundary_mask, total = 0, pad, mine
    cdef int64_t prev = -1
    cdef uint32_t i
    for i in range(n):
        if v[i].len == 0 or total > 1ULL << 62 or v[i].len > (1ULL << 62) - total:
            return UINT64_MAX
        if bus_type(dev, v[i].paddr) == DMA_P2P_BUS_ADDR:
            span[i] = 0
            continue
        mine = dom_up(d, v[i].len + dom_off(d, v[i].paddr.v))
        pad = (mask - total + 1) & mask
        if prev >= 0 and pad and pad < mine - 1:
            span[prev] += pad
            total += pad
        span[i] = mine
        total += mine
        prev = i
    return total


# iommu_map_sg: one map call for each physically contiguous run
cdef int sg_map_runs(dma_device *dev, const phys_vec *v, uint32_t n, const uint64_t *span, uint64_t iova,
                     unsigned prot) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t start = 0, size = 0, at = iova, phys
    cdef pgt_walk w
    cdef uint32_t i
    cdef int rc = 0
    memset(&w, 0, sizeof(w))
    for i in range(n + 1):
        if i < n:
            if span[i] == 0:
                continue  # a peer's: its bus address needs no page table
            phys = v[i].paddr.v - dom_off(d, v[i].paddr.v)
            if size and start + size == phys:
                size += span[i]
                continue
        if size:
            rc = dom_map(d, &w, at, start, size, prot)
            if rc:
                break
            at += size
        if i < n:
            start = phys
            size = span[i]
    if rc and at != iova:
        dom_unmap(d, iova, at - iova)
    return rc


# __finalise_sg: join entries into segments where IOVA, boundary and segment size allow
cdef int sg_finalise(dma_device *dev, const phys_vec *v, uint32_t n, const uint64_t *span, uint64_t iova,
                     dma_seg *out) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t off, cur = 0, most = dev.sg_max_segment_size, mask = dev.limits.seg_boundary_mask
    cdef uint32_t i
    cdef int nents = 0
    for i in range(n):
        off = dom_off(d, v[i].paddr.v)
        if span[i] == 0:
            out[nents].addr = dma_p2p_bus(dma_p2p_find(dev, v[i].paddr), v[i].paddr)
            out[nents].len = v[i].len
            nents += 1
            cur = 0
            continue
        if cur and off == 0 and iova & mask and cur <= most and most - cur >= v[i].len:
            cur += v[i].len
        else:
            out[nents].addr = dma_addr(iova + off)
            cur = v[i].len
            nents += 1
        out[nents - 1].len = cur
        iova += span[i]
        if v[i].len + off < span[i]:
            cur = 0  # it ends inside its granule: nothing can follow it
    return nents


# untrusted devices: each entry alone (iommu_dma_map_sg_swiotlb)
cdef int sg_one_by_one(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                       dma_seg *out) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t type
    for i in range(n):
        type = bus_type(dev, v[i].paddr)
        out[i].len = v[i].len
        if type == DMA_P2P_BUS_ADDR:
            out[i].addr = dma_p2p_bus(dma_p2p_find(dev, v[i].paddr), v[i].paddr)
        elif iommu_map_phys(dev, v[i].paddr, v[i].len, dir, attrs if type == DMA_P2P_NONE else attrs | DMA_ATTR_MMIO,
                            &out[i].addr):
            sg_release(dev, out, i, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
            return -EIO
    return <int>n


cdef int sg_release(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                    unsigned long attrs) noexcept nogil:
    cdef uint32_t i
    cdef int rc = 0, one
    for i in range(n):
        one = 0 if dma_p2p_peer(dev, s[i].addr) != NULL else iommu_unmap_phys(dev, s[i].addr, s[i].len, dir, attrs)
        rc = rc if rc else one
    return rc


cdef int iommu_map_sg(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                      dma_seg *out) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t total, iova
    cdef uint64_t *span
    cdef uint32_t i
    cdef int rc
    if n == 0 or dir == DMA_NONE:
        return -EINVAL
    if attrs & DMA_ATTR_REQUIRE_COHERENT and not dev.flags & DMA_DEV_COHERENT:
        return -EOPNOTSUPP
    for i in range(n if dev.p2p != NULL else 0):
        if bus_type(dev, v[i].paddr) == DMA_P2P_NOT_SUPPORTED:
            return -EREMOTEIO
    if dev.flags & DMA_DEV_UNTRUSTED:
        return sg_one_by_one(dev, v, n, dir, attrs, out)
    span = <uint64_t *>core_alloc(&d.fail, n * sizeof(uint64_t))
    if span == NULL:
        return -ENOMEM
    total = sg_spans(dev, v, n, span)
    iova = dom_alloc_iova(d, dev, total) if total and total != UINT64_MAX else 0
    rc = 0 if iova or total == 0 else (-EINVAL if total == UINT64_MAX else -ENOMEM)
    if rc == 0 and total:
        rc = sg_map_runs(dev, v, n, span, iova, prot_of(dev, dir, attrs))
        if rc:
            dom_free_iova(d, iova, total)
            rc = rc if rc == -ENOMEM else -EINVAL
    if rc == 0:
        if cpu_sync(dev, attrs):
            for i in range(n):
                if span[i]:
                    clean_for_device(dev, v[i].paddr.v, v[i].len)
            barrier(d)
        if total:
            dom_sync_map(d, iova, total)
        count(d.counters, C_SG_MAPS, 1)
        rc = sg_finalise(dev, v, n, span, iova, out)
    free(span)
    return rc


cdef int iommu_unmap_sg(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                        unsigned long attrs) noexcept nogil:
    cdef iommu_domain *d = domain_of(dev)
    cdef uint64_t first = 0, span = 0, done
    cdef bint any = False
    cdef uint32_t i
    if n == 0:
        return -EINVAL
    if dev.flags & DMA_DEV_UNTRUSTED:
        return sg_release(dev, s, n, dir, attrs)
    for i in range(n):  # the span of all that is not a peer's
        if dma_p2p_peer(dev, s[i].addr) != NULL:
            continue
        if not any:
            first = s[i].addr.v - dom_off(d, s[i].addr.v)
        any = True
        span = dom_up(d, s[i].addr.v - first + s[i].len)
        if cpu_sync(dev, attrs):
            hand_over(dev, s[i].addr.v, s[i].len, True, False)
    if cpu_sync(dev, attrs):
        barrier(d)
    count(d.counters, C_SG_UNMAPS, 1)
    if not any:
        return 0
    done = dom_unmap_free(d, first, span)
    return 0 if done == span else -ENOENT


cdef int iommu_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size,
                            dma_data_direction dir) noexcept nogil:
    hand_over(dev, addr.v, size, True, dev.swiotlb != NULL and dir != DMA_TO_DEVICE)
    if not dev.flags & DMA_DEV_COHERENT:
        barrier(domain_of(dev))
    return 0


cdef int iommu_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size,
                               dma_data_direction dir) noexcept nogil:
    hand_over(dev, addr.v, size, False, dev.swiotlb != NULL and dir != DMA_FROM_DEVICE)
    if not dev.flags & DMA_DEV_COHERENT:
        barrier(domain_of(dev))
    return 0


cdef int iommu_is_bounced(dma_device *dev, dma_addr_t addr) noexcept nogil:
    return swiotlb_has(dev.swiotlb, dom_iova_to_phys(domain_of(dev), addr.v))


cdef uint64_t iommu_merge_boundary(dma_device *dev) noexcept nogil:
    return dom_granule(domain_of(dev)) - 1


cdef int iommu_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write,
                      dma_fault *fault) noexcept nogil:
    return dom_bus_access(domain_of(dev), dev, addr.v, n, buf, write, fault)


cdef dma_ops iommu_ops
iommu_ops = dma_ops(
    abi=DMAPATH_ABI, size=sizeof(dma_ops), name=b"iommu", map_phys=iommu_map_phys, unmap_phys=iommu_unmap_phys,
    iova_try_alloc=iommu_try_alloc, iova_link=iommu_link, iova_link_vec=iommu_link_vec,
    iova_link_gapped=iommu_link_gapped, iova_sync=iommu_sync, iova_unlink=iommu_unlink, iova_free=iommu_free,
    map_sg=iommu_map_sg, unmap_sg=iommu_unmap_sg, sync_for_cpu=iommu_sync_for_cpu,
    sync_for_device=iommu_sync_for_device, merge_boundary=iommu_merge_boundary, need_unmap=NULL,
    is_bounced=iommu_is_bounced, keys_of=NULL)
cdef dma_bus_ops iommu_bus
iommu_bus.access = iommu_access


# ---- the Python side ----------------------------------------------------------------------------------------------

cdef uint64_t as_iova_or_dma(value) except? 0xffffffffffffffff:
    # behind an IOMMU a device's address is an IOVA
    return <uint64_t>int(value) if isinstance(value, DmaAddr) else <uint64_t>as_iova(value)


@cython.no_gc_clear  # its domains free themselves through it
cdef class Iommu:
    """A simulated IOMMU: one IOTLB with its walk caches, and a domain for each device behind it.

    Parameters
    ----------
    mode : "strict", "lazy" or "passthrough"
        When an unmapped range is flushed from the IOTLB: at once, or in batches (256 entries or 10 ms of simulated
        time, KERNEL flush queue); passthrough domains do not translate.
    page_sizes : sequence of int
        Bytes; a subset of 4096, 2 MiB and 1 GiB. The smallest is the granule.
    aperture : (int, int)
        First and last IOVA that may be handed out, in bytes.
    reserved : sequence of (int, int)
        First and last byte of ranges never handed out (MSI window, RMRR).
    iotlb_sets, iotlb_ways : int
        Geometry; sets is a power of two.
    cpus : int
        CPUs with IOVA caches and flush queues of their own; thread n runs on CPU n modulo cpus.
    format : "x86" or "arm"
        Error codes and unmap rules of generic_pt (x86) or of ARM's io-pgtable.
    caching_mode : bool
        The IOTLB also remembers "not present" until a sync flushes it, as emulated and shadowing IOMMUs do.
    """

    cdef iommu_unit unit
    cdef bint ready
    cdef readonly str mode, format
    cdef readonly tuple page_sizes, aperture, reserved
    cdef readonly int iotlb_sets, iotlb_ways, cpus
    cdef readonly bint caching_mode

    def __cinit__(self, mode="strict", *, page_sizes=(4096, 1 << 21, 1 << 30), aperture=(0, 2**64 - 1), reserved=(),
                  iotlb_sets=64, iotlb_ways=4, cpus=4, format="x86", caching_mode=False):
        if mode not in _MODES:
            raise DmaValueError("strict, lazy or passthrough", argument="mode", value=mode)
        if format not in ("x86", "arm"):
            raise DmaValueError("x86 or arm", argument="format", value=format)
        sizes = tuple(sorted(as_length(s, "page_sizes") for s in page_sizes))
        if not sizes or not set(sizes) <= {4096, 1 << 21, 1 << 30}:
            raise DmaValueError("a subset of 4096, 2 MiB and 1 GiB", argument="page_sizes", value=page_sizes)
        first, last = (as_iova(a, "aperture") for a in aperture)
        if last < first or last < sizes[0]:
            raise DmaValueError("first <= last, at least one granule", argument="aperture", value=aperture)
        if not 1 <= cpus <= 1024:
            raise DmaValueError("1 to 1024", argument="cpus", value=cpus)
        for name, value in (("iotlb_sets", iotlb_sets), ("iotlb_ways", iotlb_ways)):
            if not 1 <= value <= 1 << 16 or (name == "iotlb_sets" and value & (value - 1)):
                raise DmaValueError("1 to 65536, sets a power of two", argument=name, value=value)
        self.mode, self.format, self.page_sizes, self.aperture = mode, format, sizes, (first, last)
        self.reserved = tuple((as_iova(lo, "reserved"), as_iova(hi, "reserved")) for lo, hi in reserved)
        for lo, hi in self.reserved:
            if hi < lo:
                raise DmaValueError("first <= last", argument="reserved", value=(lo, hi))
        self.iotlb_sets, self.iotlb_ways, self.cpus, self.caching_mode = iotlb_sets, iotlb_ways, cpus, caching_mode
        cdef fail_point never
        never.nth = 0
        if iommu_unit_init(&self.unit, iotlb_sets, iotlb_ways, caching_mode, &never):
            raise MemoryError("no memory for the IOTLB")
        self.ready = True

    def __dealloc__(self):
        if self.ready:
            iommu_unit_destroy(&self.unit)

    def __repr__(self):
        return f"Iommu(mode={self.mode!r})"

    def copy(self, *, mode=None):
        """A fresh Iommu of the same kind, with nothing mapped."""
        return Iommu(mode or self.mode, page_sizes=self.page_sizes, aperture=self.aperture, reserved=self.reserved,
                     iotlb_sets=self.iotlb_sets, iotlb_ways=self.iotlb_ways, cpus=self.cpus, format=self.format,
                     caching_mode=self.caching_mode)

    @property
    def granule(self):
        """Bytes: the smallest page size."""
        return self.page_sizes[0]

    @property
    def now(self):
        """Simulated time in ns."""
        return self.unit.now_ns

    def advance(self, ns):
        """Let ``ns`` nanoseconds of simulated time pass: flush-queue timers (10 ms) fire, depots shrink (100 ms)."""
        cdef uint64_t n = as_length(ns, "ns", least=0)
        if n >= (1ULL << 63) - self.unit.now_ns:
            raise DmaValueError(f"simulated time ends before 2**63 ns, and it is {self.unit.now_ns}", argument="ns",
                                value=ns)
        with nogil:
            iommu_unit_advance(&self.unit, n)

    def iotlb(self):
        """What the IOTLB holds: dict of hits, misses, walk_reads, pwc_hits, evictions, entries, walk_entries."""
        cdef dict out
        lock_acquire(&self.unit.tlb.lock)
        out = dict(hits=self.unit.tlb.stats.hits, misses=self.unit.tlb.stats.misses,
                   walk_reads=self.unit.tlb.stats.walk_reads, pwc_hits=self.unit.tlb.stats.pwc_hits,
                   evictions=self.unit.tlb.stats.evictions, entries=self.unit.tlb.live,
                   walk_entries=self.unit.tlb.pwc_live)
        lock_release(&self.unit.tlb.lock)
        return out

    def iotlb_entries(self):
        """The valid entries: list of (domain number, Iova of the page, bytes, PhysAddr or None for "not present")."""
        out = []
        cdef uint64_t i
        cdef unsigned shift
        lock_acquire(&self.unit.tlb.lock)
        for i in range(<uint64_t>self.unit.tlb.sets * self.unit.tlb.ways):
            e = self.unit.tlb.e[i]
            if e.did:
                shift = 12 + 9 * e.level
                out.append((e.did, e.page << shift, 1 << shift, e.pte & ~0xfff))
        lock_release(&self.unit.tlb.lock)
        return [(did, Iova(at), size, PhysAddr(phys) if phys else None) for did, at, size, phys in out]


@cython.no_gc_clear  # __dealloc__ takes the domain off its unit
cdef class IommuDomain(Backend):
    """A device's own domain behind an Iommu: IOVA space, page table, flush queues."""

    cdef iommu_domain *dom
    cdef readonly Iommu iommu
    cdef readonly str mode
    name = "iommu"

    def __cinit__(self, Iommu iommu not None, *, untrusted=False, reserved=()):
        cdef iommu_domain_config cfg
        # a group with an untrusted device is strict whatever the default says (iommu_get_def_domain_type)
        self.mode = "strict" if untrusted else iommu.mode
        self.iommu, self.native = iommu, True
        cfg.page_sizes = sum(iommu.page_sizes)
        cfg.aperture_first, cfg.aperture_last = iommu.aperture
        cfg.ncpu = iommu.cpus
        cfg.lazy = self.mode == "lazy"
        cfg.arm = iommu.format == "arm"
        rc = iommu_domain_create(&self.dom, &iommu.unit, &cfg)
        if rc:
            raise error_for(-rc, "no memory for a domain", "iommu", iommu)
        cdef unsigned shift = self.dom.granule_shift
        for lo, hi in (*iommu.reserved, *reserved):
            if iova_reserve(&self.dom.iova, lo >> shift, hi >> shift):
                raise error_for(ENOMEM, "no memory for a reserved region", "iommu", iommu)
        dma_ops_init(&self.ops, &iommu_ops)

    def __dealloc__(self):
        if self.dom != NULL:
            iommu_domain_free(self.dom)

    cdef int attach(self, dma_device *dev) except -1:
        dev.ops = &self.ops
        dev.priv = self.dom
        dev.bus = &iommu_bus
        dom_attach(self.dom, dev)
        return 0

    @property
    def did(self):
        """The domain's number in the IOTLB."""
        return self.dom.did

    def counters(self):
        cdef uint64_t c[64]
        cdef int i
        for i in range(C_COUNT):
            c[i] = counter_read(self.dom.counters, i)
        set_, clear = [c[C_PTE_SET + i] for i in range(3)], [c[C_PTE_CLEAR + i] for i in range(3)]
        live = [s - x for s, x in zip(set_, clear, strict=True)]
        values = (
            c[C_IOVA_ALLOCS], c[C_IOVA_FREES], c[C_IOVA_ALLOCS] - c[C_IOVA_FREES],
            c[C_IOVA_ALLOC_BYTES] - c[C_IOVA_FREE_BYTES], c[C_LINKS], c[C_SYNCS], c[C_UNLINKS], c[C_MAPS],
            c[C_UNMAPS], c[C_SG_MAPS], c[C_SG_UNMAPS], *set_, *live,
            live[0] * 4096 + (live[1] << 21) + (live[2] << 30), c[C_INVAL_RANGE] + c[C_INVAL_FULL],
            c[C_INVAL_RANGE], c[C_INVAL_FULL], c[C_SYNC_FLUSH], c[C_CACHE_CLEAN], c[C_CACHE_INVAL], c[C_BARRIERS],
            c[C_FAULTS], dom_queued(self.dom), c[C_BOUNCES], c[C_BOUNCES] - c[C_UNBOUNCES], c[C_BOUNCED_BYTES],
        )
        return dict(zip(COUNTERS, values, strict=True))

    def stats(self):
        """What the inner parts hold: page-table bytes, IOVA ranges in the tree, cached ranges, depot flushes."""
        return dict(page_table_bytes=self.dom.pgt.tables * 4096, iova_nodes=self.dom.iova.nodes,
                    iova_depot=sum(self.dom.iova.depot[i].size for i in range(IOVA_ORDERS)),
                    iova_cached=iova_cached_ranges(&self.dom.iova), iova_tree_allocs=self.dom.iova.tree_allocs,
                    rcache_flushes=self.dom.iova.rcache_flushes)

    def iova_to_phys(self, iova):
        """The PhysAddr behind one IOVA, or None (iommu_iova_to_phys; page table only, no IOTLB)."""
        cdef uint64_t phys = dom_iova_to_phys(self.dom, as_iova_or_dma(iova))
        return None if phys == UINT64_MAX else PhysAddr(phys)

    def prot_of(self, iova):
        """Protection bits of the entry that maps an IOVA (IOMMU_READ 1, WRITE 2, CACHE 4 ...), or None."""
        cdef unsigned level
        entry = pgt_lookup(&self.dom.pgt, as_iova_or_dma(iova), &level)
        return entry & PTE_PROT if entry & PTE_LEAF else None

    def map_raw(self, iova, phys, size, prot=3):
        """One core map call on bare IOVA, as iommu_map for an unmanaged domain: 0 or a negative errno."""
        cdef pgt_walk w
        memset(&w, 0, sizeof(w))
        return dom_map(self.dom, &w, as_iova(iova), as_phys(phys), as_length(size), prot)

    def unmap_raw(self, iova, size):
        """One core unmap call on bare IOVA (iommu_unmap): bytes unmapped."""
        return dom_unmap(self.dom, as_iova(iova), as_length(size))

    def alloc_raw(self, pages, limit_pfn, *, flush=True):
        """alloc_iova_fast: first page frame of a range, or 0."""
        cdef uint64_t n = as_length(pages, "pages", last=1 << 52), limit = as_length(limit_pfn, "limit_pfn", least=0,
                                                                                     last=(1 << 52) - 1)
        return iova_alloc_fast(&self.dom.iova, n, limit, flush)

    def free_raw(self, pfn, pages):
        """free_iova_fast."""
        cdef uint64_t at = as_length(pfn, "pfn", last=(1 << 52) - 1), n = as_length(pages, "pages", last=1 << 52)
        iova_free_fast(&self.dom.iova, at, n)

    def alloc_free_loop(self, uint64_t pages, long rounds):
        """``rounds`` times alloc_iova_fast and free_iova_fast of so many pages below 4 GiB, for scripts/bench."""
        cdef uint64_t pfn
        cdef long _i
        with nogil:
            for _i in range(rounds):
                pfn = iova_alloc_fast(&self.dom.iova, pages, 0xfffff, False)
                iova_free_fast(&self.dom.iova, pfn, pages)

    def flush(self):
        """Flush the queued unmaps of a lazy domain now, as its timer would."""
        with nogil:
            dom_flush_queues(self.dom)

    def flush_halves(self):
        """Iterator over the two halves of one full flush: what is queued between them waits for the next flush."""
        dom_flush_begin(self.dom)
        yield
        dom_flush_end(self.dom)

    def fail_nth(self, n):
        """Make the nth allocation from now fail (1: the next; 0: none). Returns what was left of the last order."""
        left = self.dom.fail.nth
        self.dom.fail.nth = as_length(n, "n", least=0)
        return max(0, left)

    def record(self, bint on):
        """Start (empty) or stop the record of events."""
        dom_record(self.dom, on)

    def take_events(self):
        """The events since the last call, as ``events`` gives them but with the simulated time in ns as a fifth number; the
        record goes on, empty."""
        cdef uint64_t i
        out = [(_EVENTS[self.dom.log.e[i].kind], self.dom.log.e[i].a, self.dom.log.e[i].b, self.dom.log.e[i].c,
                self.dom.log.e[i].now) for i in range(self.dom.log.n)]
        dom_record(self.dom, True)
        return out

    def events(self):
        """What happened since ``record(True)``: list of tuples (kind, a, b, c), plain integers.

        map: iova, phys, bytes. unmap: iova, bytes, bytes done. flush, flush_np, flush_all: first, last, log2 of the
        pages flushed. alloc, free, sync: iova, bytes. cache_clean, cache_inval: phys, bytes. fault: iova, reason, write.
        bounce: phys, bytes, where in the pool.
        """
        cdef uint64_t i
        return [(_EVENTS[self.dom.log.e[i].kind], self.dom.log.e[i].a, self.dom.log.e[i].b, self.dom.log.e[i].c)
                for i in range(self.dom.log.n)]
