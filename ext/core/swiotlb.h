/* SPDX-License-Identifier: MIT */
/* A bounce-buffer pool as Linux 7.3's kernel/dma/swiotlb.c keeps it: slots of 2 KiB, segments of 128, areas with a lock
 * each, and, where it may grow, further pools behind the first. Placement, alignment and copying are its own; the pool's
 * bytes are part of the machine's physical memory. */
#ifndef DMAPATH_SWIOTLB_H
#define DMAPATH_SWIOTLB_H

#include "mem.h"

enum { TLB_SHIFT = 11, TLB_SEGMENT = 128 };
#define TLB_SIZE (1ull << TLB_SHIFT)
#define TLB_MAX_MAPPING ((uint64_t)TLB_SEGMENT << TLB_SHIFT) /* 256 KiB */

struct tlb_slot {
    uint64_t orig;     /* of the slot that holds a mapping's first byte: the buffer's address */
    uint64_t addr;     /* and where that byte is in the pool */
    uint64_t size;     /* bytes mapped */
    uint32_t first, slots; /* the whole allocation, leading pad slots included */
    uint32_t owner;    /* the slot that holds all this */
};

struct tlb_area { struct lock lock; uint32_t index, used; };

struct swiotlb_want { /* what a device asks of a bounce buffer */
    uint64_t min_align_mask, alloc_align_mask, boundary_mask;
};

struct tlb_pool { /* one run of slots */
    struct tlb_pool *next;
    char *host;
    uint64_t start;       /* physical, a multiple of 256 KiB */
    uint32_t slots, areas, area_slots;
    bool transient;       /* made for one mapping, gone with it */
    struct tlb_slot *slot;
    uint64_t *busy;       /* a bit for each slot: two words are a segment, so no word is shared between areas */
    struct tlb_area *area;
};

struct swiotlb;
/* A pool carries its functions, so that back ends in other extensions need this header and nothing to link. */
struct swiotlb_ops {
    int (*map)(struct swiotlb *, const struct swiotlb_want *, uint64_t orig, uint64_t size, uint64_t *out);
    void (*unmap)(struct swiotlb *, uint64_t addr, bool copy_back);
    void (*sync)(struct swiotlb *, uint64_t addr, uint64_t size, bool to_pool);
    void (*zero_around)(struct swiotlb *, uint64_t addr, uint64_t size, uint64_t granule_mask);
    bool (*grown_has)(struct swiotlb *, uint64_t phys);
};

struct swiotlb {
    const struct swiotlb_ops *ops;
    struct phys_mem *mem; /* where original buffers are; NULL: addresses only, nothing is copied */
    struct tlb_pool first;
    bool force;           /* bounce all that has no IOMMU */
    bool dynamic;         /* grow when it is full */
    bool grow;            /* the worker has been asked for another pool; under grown_lock */
    pthread_rwlock_t grown_lock; /* the pools behind the first */
    struct tlb_pool *grown;
    uint64_t next_start;  /* physical: where to look for room for another */
    uint64_t maps, unmaps, bytes_in, bytes_out, transients, pools; /* atomic */
    struct fail_point fail;
};

/* host: page aligned, slots * 2 KiB; swiotlb_destroy frees it. */
int swiotlb_init(struct swiotlb *, uint64_t start, char *host, uint32_t slots, uint32_t areas, bool force);
void swiotlb_destroy(struct swiotlb *);
/* Bounce [orig, orig + size): *out is the buffer's address in the pool, its bytes those of the original. -ENOMEM: full,
 * or more than a mapping may have. */
static inline int swiotlb_map(struct swiotlb *p, const struct swiotlb_want *w, uint64_t orig, uint64_t size, uint64_t *out)
{ return p->ops->map(p, w, orig, size, out); }
/* Copy back all of it (where asked) and release the buffer that addr lies in. */
static inline void swiotlb_unmap(struct swiotlb *p, uint64_t addr, bool copy_back) { p->ops->unmap(p, addr, copy_back); }
/* Copy a part of a live buffer in or out; clipped to the mapping. */
static inline void swiotlb_sync(struct swiotlb *p, uint64_t addr, uint64_t size, bool to_pool)
{ p->ops->sync(p, addr, size, to_pool); }
/* Zero what an allocation of whole granules holds around [addr, addr + size): nothing of others may be seen there. */
static inline void swiotlb_zero_around(struct swiotlb *p, uint64_t addr, uint64_t size, uint64_t granule_mask)
{ p->ops->zero_around(p, addr, size, granule_mask); }
uint64_t swiotlb_used(struct swiotlb *);
uint64_t swiotlb_slots(struct swiotlb *);
/* The first bounce ends a device's licence to forget its addresses, for good. */
static inline void dma_mark_bounced(struct dma_device *dev)
{ store_relaxed(&dev->bounced, 1); }
/* swiotlb_max_mapping_size */
static inline uint64_t swiotlb_max_size(uint64_t min_align_mask)
{ return TLB_MAX_MAPPING - ((min_align_mask + TLB_SIZE - 1) & ~(TLB_SIZE - 1)); }
static inline bool tlb_pool_has(const struct tlb_pool *q, uint64_t phys)
{ return phys - q->start < (uint64_t)q->slots << TLB_SHIFT; }
static inline bool swiotlb_has(struct swiotlb *p, uint64_t phys)
{ return p && (tlb_pool_has(&p->first, phys) || (unlikely(p->dynamic) && p->ops->grown_has(p, phys))); }
#endif
