# cython: language_level=3
"""The C core under ext/core: private to this package, and only for the extensions that link it (setup.py)."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from dmapath.abi cimport dma_device, dma_fault, dma_iova_state, phys_addr_t, phys_mem, phys_vec, swiotlb

cdef extern from "util.h" nogil:
    struct lock:
        pass
    void lock_acquire(lock *)
    void lock_release(lock *)
    struct fail_point:
        int64_t nth
    struct counters:
        pass
    enum:
        C_IOVA_ALLOCS, C_IOVA_FREES, C_IOVA_ALLOC_BYTES, C_IOVA_FREE_BYTES
        C_LINKS, C_SYNCS, C_UNLINKS, C_MAPS, C_UNMAPS, C_SG_MAPS, C_SG_UNMAPS
        C_PTE_SET, C_PTE_CLEAR, C_INVAL_RANGE, C_INVAL_FULL, C_SYNC_FLUSH
        C_CACHE_CLEAN, C_CACHE_INVAL, C_BARRIERS, C_FAULTS, C_BOUNCES, C_UNBOUNCES, C_BOUNCED_BYTES, C_COUNT
    void *core_alloc(fail_point *, size_t)
    void count(counters *, int, uint64_t)
    void add_atomic(uint64_t *, uint64_t)
    uint64_t below_top(uint64_t first, uint64_t size)
    uint64_t counter_read(const counters *, unsigned)

cdef extern from "mem.h" nogil:
    int phys_mem_init(phys_mem *)
    void phys_mem_destroy(phys_mem *)
    int phys_mem_add(phys_mem *, uint64_t phys, void *host, bint uncached)
    void phys_mem_remove(phys_mem *, const uint64_t *phys, uint64_t n)
    uint64_t phys_mem_copy(const phys_mem *, uint64_t phys, void *buf, uint64_t len, bint to_mem)
    uint64_t phys_mem_dma(phys_mem *, const dma_device *, uint64_t phys, void *buf, uint64_t len, bint to_mem)
    void phys_mem_clean(phys_mem *, uint64_t phys, uint64_t len)
    void phys_mem_inval(phys_mem *, uint64_t phys, uint64_t len)
    void phys_mem_evict(phys_mem *)
    void *phys_mem_host(const phys_mem *, uint64_t phys)
    uint64_t phys_mem_run(const phys_mem *, uint64_t phys, uint64_t len, char **host)
    uint64_t p2p_route(const dma_device *, uint64_t addr, uint64_t len, uint64_t *phys)
    bint p2p_dropped(const dma_device *, uint64_t phys)
    void phys_mem_read_lock(phys_mem *)
    void phys_mem_read_unlock(phys_mem *)
    ctypedef struct phys_mem_full "struct phys_mem":
        uint64_t frames
        uint64_t epoch

cdef extern from "swiotlb.h" nogil:
    enum:
        TLB_SEGMENT
    uint64_t TLB_SIZE
    struct tlb_pool:
        char *host
    ctypedef struct swiotlb_pool "struct swiotlb":
        phys_mem *mem
        tlb_pool first
        bint force
        bint dynamic
        uint64_t maps, unmaps, bytes_in, bytes_out, transients, pools
        fail_point fail
    struct swiotlb_want:
        uint64_t min_align_mask, alloc_align_mask, boundary_mask
    int swiotlb_init(swiotlb_pool *, uint64_t start, char *host, uint32_t slots, uint32_t areas, bint force)
    void swiotlb_destroy(swiotlb_pool *)
    int swiotlb_map(swiotlb *, const swiotlb_want *, uint64_t orig, uint64_t size, uint64_t *out)
    void swiotlb_unmap(swiotlb *, uint64_t addr, bint copy_back)
    void swiotlb_sync(swiotlb *, uint64_t addr, uint64_t size, bint to_pool)
    void swiotlb_zero_around(swiotlb *, uint64_t addr, uint64_t size, uint64_t granule_mask)
    void dma_mark_bounced(dma_device *)
    uint64_t swiotlb_used(swiotlb_pool *)
    uint64_t swiotlb_slots(swiotlb_pool *)
    uint64_t swiotlb_max_size(uint64_t min_align_mask)
    bint swiotlb_has(swiotlb *, uint64_t phys)

cdef extern from "domain.h" nogil:
    enum:
        PROT_READ_, PROT_WRITE_, PROT_CACHE, PROT_MMIO, PROT_PRIV
    enum:
        EV_CLEAN, EV_CACHE_INVAL, EV_BARRIER, EV_BOUNCE
    struct event:
        uint64_t kind, a, b, c, now
    struct event_log:
        bint on
        event *e
        uint64_t n
    struct iotlb_stats:
        uint64_t hits, misses, walk_reads, pwc_hits, evictions
    struct iotlb_entry:
        uint64_t page, pte
        uint32_t did, level
    struct iotlb:
        lock lock
        iotlb_entry *e
        uint32_t sets, ways
        uint64_t live, pwc_live
        iotlb_stats stats
    struct pgt:
        uint64_t tables
    struct pgt_walk:
        pass
    uint64_t PTE_LEAF
    uint64_t PTE_PROT
    uint64_t pgt_lookup(pgt *, uint64_t iova, unsigned *level)
    struct iova_depot:
        uint64_t size
    struct iova_domain:
        uint64_t nodes, tree_allocs, rcache_flushes
        unsigned ncpu
        iova_depot depot[6]
    struct iommu_unit:
        iotlb tlb
        uint64_t now_ns
    struct iommu_domain:
        iommu_unit *unit
        counters *counters
        uint32_t did, granule_shift
        bint lazy, caching_mode
        pgt pgt
        iova_domain iova
        event_log log
        fail_point fail
    struct iommu_domain_config:
        uint64_t page_sizes, aperture_first, aperture_last
        uint32_t ncpu
        bint lazy, arm

    int iommu_unit_init(iommu_unit *, uint32_t sets, uint32_t ways, bint caching_mode, fail_point *)
    void iommu_unit_destroy(iommu_unit *)
    void iommu_unit_advance(iommu_unit *, uint64_t ns)
    int iommu_domain_create(iommu_domain **, iommu_unit *, const iommu_domain_config *)
    void iommu_domain_free(iommu_domain *)
    uint64_t dom_granule(const iommu_domain *)
    uint64_t dom_off(const iommu_domain *, uint64_t)
    uint64_t dom_up(const iommu_domain *, uint64_t)
    uint64_t dom_alloc_iova(iommu_domain *, dma_device *, uint64_t size)
    uint64_t dom_alloc_iova_at(iommu_domain *, dma_device *, uint64_t size, uint64_t off)
    void dom_free_iova(iommu_domain *, uint64_t iova, uint64_t size)
    int dom_map(iommu_domain *, pgt_walk *, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot)
    int dom_link_vec(iommu_domain *, uint64_t iova, uint64_t room, const phys_vec *, uint32_t n, unsigned prot)
    int dom_link_gapped(iommu_domain *, uint64_t iova, uint64_t room, const phys_vec *, uint32_t n, unsigned prot)
    void dom_attach(iommu_domain *, const dma_device *)
    void dom_record(iommu_domain *, bint on)
    bint dom_link_page(iommu_domain *, const dma_iova_state *, uint64_t phys, uint64_t offset, uint64_t size, unsigned prot)
    uint64_t dom_unmap(iommu_domain *, uint64_t iova, uint64_t size)
    uint64_t dom_unmap_free(iommu_domain *, uint64_t iova, uint64_t size)
    void dom_sync_map(iommu_domain *, uint64_t iova, uint64_t size)
    uint64_t dom_iova_to_phys(iommu_domain *, uint64_t iova)
    struct translation:
        uint64_t phys, left
        unsigned prot
    bint dom_translate(iommu_domain *, uint64_t iova, translation *)
    void dom_flush_begin(iommu_domain *)
    void dom_flush_end(iommu_domain *)
    void dom_flush_queues(iommu_domain *)
    uint64_t dom_queued(iommu_domain *)
    void note(iommu_domain *, int, uint64_t, uint64_t, uint64_t)
    int dom_bus_access(iommu_domain *, dma_device *, uint64_t iova, uint64_t len, void *buf, int write, dma_fault *)

cdef extern from "iova.h" nogil:
    int iova_reserve(iova_domain *, uint64_t lo, uint64_t hi)
    uint64_t iova_cached_ranges(iova_domain *)
    uint64_t iova_alloc_fast(iova_domain *, uint64_t size, uint64_t limit_pfn, bint flush)
    void iova_free_fast(iova_domain *, uint64_t pfn, uint64_t size)
    enum:
        IOVA_ORDERS

cdef extern from "xen.h" nogil:
    struct xen_domain:
        bint arm
    uint64_t xen_machine(const xen_domain *, uint64_t phys)
    uint64_t xen_phys(const xen_domain *, uint64_t machine)
    bint xen_straddles(const xen_domain *, uint64_t phys, uint64_t size, bint noncoherent)
    int xen_mergeable(const void *, phys_addr_t, phys_addr_t) noexcept nogil
    int xen_init(xen_domain *, bint arm)
    void xen_destroy(xen_domain *)
    int xen_set(xen_domain *, uint64_t phys, uint64_t machine, bint foreign)
    void xen_clear(xen_domain *, uint64_t phys)
