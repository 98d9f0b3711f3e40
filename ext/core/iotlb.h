/* SPDX-License-Identifier: MIT */
/* A set-associative IOTLB with page-walk caches. What it holds stays usable until invalidated, whatever the page table
 * says by then. One lock covers look-up, walk and invalidation: a flush that has returned has outlived every walk that
 * began before it, so page-table pages may be freed after it. */
#ifndef DMAPATH_IOTLB_H
#define DMAPATH_IOTLB_H

#include "mem.h"
#include "pgtable.h"

struct iotlb_entry { /* one cache line */
    uint64_t page;   /* iova >> shift */
    uint64_t pte;    /* 0 in a valid entry: remembered "not present" (caching mode) */
    void *host;      /* where the page's bytes are, or NULL; good while the memory's epoch is the same */
    uint64_t epoch;
    uint64_t used;   /* LRU stamp */
    uint32_t did;    /* domain, 0: empty entry */
    uint32_t level;
    uint64_t unused[2];
};
enum { PWC_LEVELS = 3, PWC_WAYS = 16 };
struct pwc_entry { uint64_t region; struct pgt_table *table; uint64_t used; uint32_t did, unused; };
struct iotlb_stats { uint64_t hits, misses, walk_reads, pwc_hits, evictions; };

struct iotlb {
    struct lock lock;
    struct iotlb_entry *e;
    uint64_t *tag;               /* of each entry, 0: empty; apart, so that a look-up reads one line for a whole set */
    struct pwc_entry pwc[PWC_LEVELS][PWC_WAYS]; /* [l]: tables of level l, keyed by iova >> level_shift(l + 1) */
    uint64_t live, pwc_live, clock;
    uint32_t sets, ways;
    uint32_t levels_seen;  /* bit per leaf level that may be present */
    bool caching_mode;
    struct iotlb_stats stats;
};

struct xlate { uint64_t phys, left; void *host; unsigned prot; }; /* left: bytes to the end of the page */

int iotlb_init(struct iotlb *, uint32_t sets, uint32_t ways, bool caching_mode, struct fail_point *);
void iotlb_destroy(struct iotlb *);
/* Nothing cached, and no walk under way that could change that. */
static inline bool iotlb_empty(struct iotlb *t)
{
    lock_acquire(&t->lock);
    bool empty = !(t->live | t->pwc_live);
    lock_release(&t->lock);
    return empty;
}
/* Drop what overlaps [first, last] of a domain (its large pages and walk caches included). */
void iotlb_invalidate(struct iotlb *, uint32_t did, uint64_t first, uint64_t last);
void iotlb_invalidate_domain(struct iotlb *, uint32_t did);
#endif
