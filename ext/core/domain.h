/* SPDX-License-Identifier: MIT */
/* The simulated IOMMU: units (IOTLB, clock) and domains (IOVA space, page table, flush queues), and what Linux's
 * drivers/iommu/dma-iommu.c and iommu.c do with them below the DMA API. */
#ifndef DMAPATH_DOMAIN_H
#define DMAPATH_DOMAIN_H

#include "dmapath/dmapath.h"
#include "iotlb.h"
#include "iova.h"
#include "swiotlb.h"

enum { FQ_SIZE = 256 };          /* ring slots a CPU; one stays empty */
#define FQ_TIMEOUT_NS 10000000ull

struct fq_entry { uint64_t pfn, pages, counter; struct pgt_freelist freed; };
struct fq { struct lock lock; uint32_t head, tail; struct fq_entry e[FQ_SIZE]; };

/* One thing that happened, for those who asked (explain, replay, tests). */
enum event_kind { EV_ALLOC, EV_FREE, EV_MAP, EV_UNMAP, EV_SYNC, EV_FLUSH, EV_FLUSH_NP, EV_FLUSH_ALL, EV_CLEAN,
                  EV_CACHE_INVAL, EV_BARRIER, EV_FAULT, EV_BOUNCE };
struct event { uint64_t kind, a, b, c, now; }; /* now: ns of the unit's simulated time */
struct event_log { struct lock lock; bool on; struct event *e; uint64_t n, cap; };

struct iommu_domain;
struct iommu_unit {
    struct iotlb tlb;
    struct lock lock;            /* the list of domains, the clock */
    struct iommu_domain *domains;
    uint64_t now_ns;
    uint32_t next_did;
};

struct iommu_domain {
    struct iommu_unit *unit;
    struct iommu_domain *next;
    struct counters *counters;
    uint32_t did, granule_shift;
    uint64_t granule_mask;
    uint64_t aperture_last, limit_pfn; /* limit_pfn: of the device's masks, set when it is attached */
    bool lazy, caching_mode, arm;
    bool trusting;               /* the device is coherent, trusted and not to be treated as Linux's defects would */
    bool plain;                  /* 4 KiB granules, a coherent trusted device, nobody records: links need no second look */
    struct pgt pgt;
    struct iova_domain iova;
    struct fq *fq;               /* one a CPU; NULL: strict */
    uint64_t flush_start, flush_finish, fq_deadline; /* deadline 0: timer not armed */
    struct event_log log;
    struct fail_point fail;
};

int iommu_unit_init(struct iommu_unit *, uint32_t sets, uint32_t ways, bool caching_mode, struct fail_point *);
void iommu_unit_destroy(struct iommu_unit *);
/* Let simulated time pass: expired flush-queue timers fire, depots are trimmed. */
void iommu_unit_advance(struct iommu_unit *, uint64_t ns);

struct iommu_domain_config {
    uint64_t page_sizes, aperture_first, aperture_last;
    uint32_t ncpu;
    bool lazy, arm;
};
int iommu_domain_create(struct iommu_domain **, struct iommu_unit *, const struct iommu_domain_config *);
void iommu_domain_free(struct iommu_domain *);

static inline uint64_t dom_granule(const struct iommu_domain *d) { return d->granule_mask + 1; }
static inline uint64_t dom_off(const struct iommu_domain *d, uint64_t x) { return x & d->granule_mask; }
static inline uint64_t dom_up(const struct iommu_domain *d, uint64_t x)
{ return (x + d->granule_mask) & ~d->granule_mask; }
/* Take the masks of the device that the domain is for. */
void dom_attach(struct iommu_domain *, const struct dma_device *);

/* Granule-aligned IOVA for `size` bytes under the device's masks, or 0 (iommu_dma_alloc_iova). */
uint64_t dom_alloc_iova(struct iommu_domain *, struct dma_device *, uint64_t size);
/* For a mapping that begins `off` bytes into its first granule: never at all ones, which stand for "not mapped"
 * (DMA_MAPPING_ERROR). Linux gives that address out, takes it for an error and loses it. */
RARE uint64_t dom_alloc_other_iova(struct iommu_domain *, struct dma_device *, uint64_t size, uint64_t instead_of);
static inline uint64_t dom_alloc_iova_at(struct iommu_domain *d, struct dma_device *dev, uint64_t size, uint64_t off)
{
    uint64_t iova = dom_alloc_iova(d, dev, size);
    return likely(iova + off != UINT64_MAX) ? iova : dom_alloc_other_iova(d, dev, size, iova);
}
void dom_free_iova(struct iommu_domain *, uint64_t iova, uint64_t size);
/* One core map call without IOTLB sync (iommu_map_nosync). */
int dom_map(struct iommu_domain *, struct pgt_walk *, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot);
/* n core map calls in one walk; all or nothing. vec: side by side, iova names the first byte; gapped: each range at
 * the next granule, iova is a granule. `room`: bytes of the allocation from iova on (gapped: whole granules). -ERANGE: the
 * ranges need more; -EINVAL: one is empty; -EIO: a range after the first begins inside a granule (vec). */
int dom_link_vec(struct iommu_domain *, uint64_t iova, uint64_t room, const struct phys_vec *, uint32_t n,
                 unsigned prot);
int dom_link_gapped(struct iommu_domain *, uint64_t iova, uint64_t room, const struct phys_vec *, uint32_t n,
                    unsigned prot);
/* One core unmap call and one ranged flush, at once (iommu_unmap). Returns bytes unmapped. */
uint64_t dom_unmap(struct iommu_domain *, uint64_t iova, uint64_t size);
/* What the classic unmap does: strict flushes and frees, lazy queues (__iommu_dma_unmap). Returns bytes unmapped. */
uint64_t dom_unmap_free(struct iommu_domain *, uint64_t iova, uint64_t size);
RARE void dom_sync_flush(struct iommu_domain *, uint64_t iova, uint64_t size);
/* Exact byte behind an IOVA, or all ones (iommu_iova_to_phys, whose 0 is an address too). */
uint64_t dom_iova_to_phys(struct iommu_domain *, uint64_t iova);
/* The same with the page's protection, and the bytes to its end; false where nothing is mapped: to the end of what no table
 * covers. */
struct translation { uint64_t phys, left; unsigned prot; };
bool dom_translate(struct iommu_domain *, uint64_t iova, struct translation *);

/* One flush of everything a domain has cached, in its two halves: what is queued between them waits for the next. */
void dom_flush_begin(struct iommu_domain *);
void dom_flush_end(struct iommu_domain *);
void dom_flush_queues(struct iommu_domain *); /* flush now, free what may go */
uint64_t dom_queued(struct iommu_domain *);

void dom_record(struct iommu_domain *, bool on);
RARE void log_event(struct event_log *, uint64_t now, enum event_kind, uint64_t a, uint64_t b, uint64_t c);
static inline void note(struct iommu_domain *d, enum event_kind k, uint64_t a, uint64_t b, uint64_t c)
{
    if (unlikely(load_relaxed(&d->log.on)))
        log_event(&d->log, load_relaxed(&d->unit->now_ns), k, a, b, c);
}

/* dma_iova_link as it nearly always is: one range within one page, in a table that exists. false: take the long way. */
static inline bool dom_link_page(struct iommu_domain *d, const struct dma_iova_state *s, uint64_t phys, uint64_t offset,
                                 uint64_t size, unsigned prot)
{
    uint64_t off = phys & 4095, at = s->addr.v + offset - off;
    struct pgt_walk w = { NULL, 0 };
    if (unlikely(!load_relaxed(&d->plain) || (off && offset) || off + size - 1 > 4095 || size - 1 >= s->__size ||
                 offset > s->__size - size || s->__size >> 63 || !prot))
        return false;
    if (unlikely(!pgt_map_page(&d->pgt, &w, at, phys - off, prot | PROT_CACHE | PTE_LEAF)))
        return false;
    struct tally t = tally_of(d->counters);
    tally(t, C_PTE_SET, 1);
    tally(t, C_LINKS, 1);
    return true;
}

/* iommu_sync_map: hardware that remembers "not present" must forget it, no other need do anything. */
static inline void dom_sync_map(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    note(d, EV_SYNC, iova, size, 0);
    if (unlikely(d->caching_mode))
        dom_sync_flush(d, iova, size);
}

/* The device's side: struct dma_bus_ops.access through the IOTLB. */
int dom_bus_access(struct iommu_domain *, struct dma_device *, uint64_t iova, uint64_t len, void *buf, int write,
                   struct dma_fault *);
#endif
