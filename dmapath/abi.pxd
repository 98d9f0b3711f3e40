# cython: language_level=3
"""The public header for Cython drivers and backends: extern declarations only, so that it holds across builds."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "dmapath/dmapath.h" nogil:
    enum:
        DMAPATH_ABI
        DMA_ATTR_SKIP_CPU_SYNC
        DMA_ATTR_NO_WARN
        DMA_ATTR_PRIVILEGED
        DMA_ATTR_MMIO
        DMA_ATTR_REQUIRE_COHERENT
        DMA_DEV_COHERENT
        DMA_DEV_UNTRUSTED
        DMA_DEV_QUIRKS
        DMA_RQ_SG
        DMA_MAP_CHUNK
    uint64_t DMA_MAPPING_ERROR_V
    uint64_t DMA_IOVA_USE_SWIOTLB
    const char *DMAPATH_API_CAPSULE
    const char *DMAPATH_MEMORY_CAPSULE
    const char *DMAPATH_DEVICE_CAPSULE
    const char *DMAPATH_OPS_CAPSULE
    const char *DMAPATH_BUS_CAPSULE
    const char *DMAPATH_MMIO_CAPSULE

    ctypedef struct phys_addr_t:
        uint64_t v
    ctypedef struct dma_addr_t:
        uint64_t v
    ctypedef struct iova_t:
        uint64_t v
    phys_addr_t phys_addr(uint64_t)
    dma_addr_t dma_addr(uint64_t)
    iova_t iova_addr(uint64_t)
    bint dma_range_wraps(uint64_t first, uint64_t size)

    enum dma_data_direction:
        DMA_BIDIRECTIONAL
        DMA_TO_DEVICE
        DMA_FROM_DEVICE
        DMA_NONE
    enum dma_p2p_type:
        DMA_P2P_NONE
        DMA_P2P_NOT_SUPPORTED
        DMA_P2P_BUS_ADDR
        DMA_P2P_THRU_HOST_BRIDGE
    enum dma_policy:
        DMA_POLICY_UNIFIED
        DMA_POLICY_LINUX
        DMA_POLICY_LINUX_SPLIT
    enum dma_layout:
        DMA_LAYOUT_NONE
        DMA_LAYOUT_DIRECT
        DMA_LAYOUT_LINEAR
        DMA_LAYOUT_GAPPED
        DMA_LAYOUT_PER_RANGE
        DMA_LAYOUT_BOUNCED
    enum dma_fault_reason:
        DMA_FAULT_NONE
        DMA_FAULT_NOT_PRESENT
        DMA_FAULT_READ
        DMA_FAULT_WRITE
        DMA_FAULT_BUS

    struct phys_vec:
        phys_addr_t paddr
        uint64_t len
    struct dma_seg:
        dma_addr_t addr
        uint64_t len
    struct dma_keys:
        uint32_t lkey
        uint32_t rkey
    struct dma_iova_state:
        dma_addr_t addr
        uint64_t size "__size"
    uint64_t dma_iova_size(const dma_iova_state *)
    bint dma_use_iova(const dma_iova_state *)

    struct dma_limits:
        uint32_t max_segments
        uint32_t dma_alignment
        uint64_t max_segment_size
        uint64_t seg_boundary_mask
        uint64_t virt_boundary
        int (*mergeable)(const void *, phys_addr_t, phys_addr_t) noexcept nogil
        const void *machine
    uint64_t dma_segment_room(const dma_limits *, uint64_t addr, uint64_t len)
    struct dma_p2p_range:
        phys_addr_t start
        uint64_t size
        uint64_t bus_offset
        uint32_t type
    struct dma_p2p:
        uint32_t nr
        dma_p2p_range *ranges
    struct dma_range_map:
        phys_addr_t cpu_start
        dma_addr_t dma_start
        uint64_t size
    struct phys_mem
    struct swiotlb
    struct dma_device:
        const dma_ops *ops
        void *priv
        const dma_bus_ops *bus
        phys_mem *mem
        uint64_t dma_mask
        uint64_t bus_dma_limit
        uint64_t min_align_mask
        uint32_t flags
        uint32_t pci_32bit_workaround
        dma_limits limits
        uint64_t sg_max_segment_size
        const dma_range_map *ranges
        uint32_t nr_ranges
        swiotlb *swiotlb
        const dma_p2p *p2p
        void *tap
        dma_limits uncut
        uint64_t reach
        uint32_t sg_max_segments
    bint dma_has_bounced(const dma_device *)
    const dma_p2p_range *dma_p2p_at(const dma_p2p *, phys_addr_t, int *)
    const dma_p2p_range *dma_p2p_find(const dma_device *, phys_addr_t)
    uint32_t dma_p2p_kind(const dma_p2p_range *)
    dma_addr_t dma_p2p_bus(const dma_p2p_range *, phys_addr_t)
    const dma_p2p_range *dma_p2p_peer(const dma_device *, dma_addr_t)
    struct dma_ops:
        uint32_t abi
        uint32_t size
        const char *name
        int (*map_phys)(dma_device *, phys_addr_t, uint64_t, dma_data_direction, unsigned long, dma_addr_t *) noexcept nogil
        int (*unmap_phys)(dma_device *, dma_addr_t, uint64_t, dma_data_direction, unsigned long) noexcept nogil
        int (*iova_try_alloc)(dma_device *, dma_iova_state *, phys_addr_t, uint64_t) noexcept nogil
        int (*iova_link)(dma_device *, dma_iova_state *, phys_addr_t, uint64_t, uint64_t, dma_data_direction,
                         unsigned long) noexcept nogil
        int (*iova_link_vec)(dma_device *, dma_iova_state *, const phys_vec *, uint32_t, uint64_t,
                             dma_data_direction, unsigned long) noexcept nogil
        int (*iova_link_gapped)(dma_device *, dma_iova_state *, const phys_vec *, uint32_t, uint64_t,
                                dma_data_direction, unsigned long) noexcept nogil
        int (*iova_sync)(dma_device *, dma_iova_state *, uint64_t, uint64_t) noexcept nogil
        int (*iova_unlink)(dma_device *, dma_iova_state *, uint64_t, uint64_t, dma_data_direction,
                           unsigned long) noexcept nogil
        int (*iova_free)(dma_device *, dma_iova_state *) noexcept nogil
        int (*map_sg)(dma_device *, const phys_vec *, uint32_t, dma_data_direction, unsigned long,
                      dma_seg *) noexcept nogil
        int (*unmap_sg)(dma_device *, const dma_seg *, uint32_t, dma_data_direction, unsigned long) noexcept nogil
        int (*sync_for_cpu)(dma_device *, dma_addr_t, uint64_t, dma_data_direction) noexcept nogil
        int (*sync_for_device)(dma_device *, dma_addr_t, uint64_t, dma_data_direction) noexcept nogil
        uint64_t (*merge_boundary)(dma_device *) noexcept nogil
        int (*need_unmap)(dma_device *) noexcept nogil
        int (*is_bounced)(dma_device *, dma_addr_t) noexcept nogil
        int (*keys_of)(dma_device *, dma_addr_t, uint64_t, dma_keys *) noexcept nogil
    struct dma_fault:
        dma_addr_t addr
        uint64_t done
        uint32_t reason
        uint32_t write
    struct dma_bus_ops:
        int (*access)(dma_device *, dma_addr_t, uint64_t, void *, int, dma_fault *) noexcept nogil
    struct dma_mmio:
        void *priv
        uint64_t (*read)(void *, uint64_t, unsigned int) noexcept nogil
        void (*write)(void *, uint64_t, unsigned int, uint64_t) noexcept nogil
        int (*relax)(void *) noexcept nogil
    uint64_t dma_readl(const dma_mmio *, uint64_t)
    uint64_t dma_readq(const dma_mmio *, uint64_t)
    void dma_writel(const dma_mmio *, uint64_t, uint32_t)
    void dma_writeq(const dma_mmio *, uint64_t, uint64_t)
    int dma_fault_at(dma_fault *, uint64_t addr, uint64_t done, uint32_t reason, int write)
    int dma_ops_init(dma_ops *, const dma_ops *)

    int dma_map_phys(dma_device *, phys_addr_t, uint64_t, dma_data_direction, unsigned long, dma_addr_t *)
    int dma_unmap_phys(dma_device *, dma_addr_t, uint64_t, dma_data_direction, unsigned long)
    int dma_iova_try_alloc(dma_device *, dma_iova_state *, phys_addr_t, uint64_t)
    int dma_iova_link(dma_device *, dma_iova_state *, phys_addr_t, uint64_t, uint64_t, dma_data_direction,
                      unsigned long)
    int dma_iova_sync(dma_device *, dma_iova_state *, uint64_t, uint64_t)
    int dma_iova_unlink(dma_device *, dma_iova_state *, uint64_t, uint64_t, dma_data_direction, unsigned long)
    int dma_iova_free(dma_device *, dma_iova_state *)
    int dma_iova_destroy(dma_device *, dma_iova_state *, uint64_t, dma_data_direction, unsigned long)
    uint64_t dma_get_merge_boundary(dma_device *)
    int dma_keys_of(dma_device *, dma_addr_t, uint64_t, dma_keys *)

    struct dma_cursor:
        uint64_t item
        uint64_t sub
        uint64_t pos
    struct dma_request:
        uint32_t (*fill)(const dma_request *, dma_cursor *, const dma_limits *, phys_vec *, uint32_t) noexcept nogil
        const void *priv
        uint64_t total
        uint64_t gap_mask
        uint32_t max_vecs
        uint32_t flags
        unsigned long attrs
        dma_data_direction dir
    struct dma_map_state:
        dma_iova_state iova
        uint64_t mapped
        dma_seg *saved
        uint32_t nr_saved
        uint8_t layout
        uint8_t dir
        uint8_t sg
        unsigned long attrs
        uint64_t rules
    struct dma_map_iter:
        const dma_request *rq
        int (*next)(dma_device *, dma_map_state *, dma_map_iter *, dma_seg *) noexcept nogil
        dma_cursor cursor
        const dma_limits *lim
        uint64_t addr
        uint64_t left
        uint64_t base
        uint64_t end
        uint64_t keep
        uint64_t granule_mask
        uint32_t have
        uint32_t at
        uint32_t whole
        uint32_t p2p
        uint32_t flags
        uint32_t given
        uint64_t pos
        uint64_t delta
        uint32_t room
        uint32_t shown
        phys_vec rest
        phys_vec window[64]
    struct dmapath_memory_api:
        uint32_t abi
        uint32_t size
        int (*access)(dma_device *, phys_addr_t, uint64_t, void *, int, dma_fault *) noexcept nogil
    struct dmapath_api:
        uint32_t abi
        uint32_t size
        int (*map_start)(dma_device *, const dma_request *, dma_policy, dma_map_state *, dma_map_iter *) noexcept nogil
        int (*map_next)(dma_device *, dma_map_state *, dma_map_iter *, dma_seg *) noexcept nogil
        int (*unmap)(dma_device *, dma_map_state *) noexcept nogil
