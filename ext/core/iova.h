/* SPDX-License-Identifier: MIT */
/* The IOVA allocator: a red-black tree of ranges searched from the top down, behind per-CPU caches of freed ranges.
 * Same answers as Linux 7.3's drivers/iommu/iova.c in the same order of calls. Unit: page frames (pfn). */
#ifndef DMAPATH_IOVA_H
#define DMAPATH_IOVA_H

#include "util.h"

enum { IOVA_ORDERS = 6, IOVA_MAG_SIZE = 127 };
#define IOVA_TRIM_NS 100000000ull /* one depot magazine per 100 ms while there are more of them than CPUs */

struct iova_node {
    uint64_t lo, hi; /* first and last pfn */
    struct iova_node *left, *right, *parent;
    struct iova_node *prev, *next; /* neighbours by address: a step of the search is one load */
    uint64_t red;
};

struct iova_mag { uint64_t size; struct iova_mag *next; uint64_t pfn[IOVA_MAG_SIZE]; };
struct iova_cpu { struct lock lock; struct { struct iova_mag *loaded, *prev; } cache[IOVA_ORDERS]; };
struct iova_depot { struct lock lock; uint64_t size; struct iova_mag *head; };

struct iova_domain {
    struct lock lock; /* tree, cached nodes, node pool */
    struct iova_node nil, anchor, *root, *cached, *cached32, *pool;
    struct iova_block *blocks;
    uint64_t start_pfn, dma_32bit_pfn, max32_alloc_size;
    uint64_t nodes;             /* live ranges in the tree: allocated, cached and reserved ones */
    struct iova_depot depot[IOVA_ORDERS];
    struct iova_cpu *cpu;
    unsigned ncpu;
    uint64_t trimmed_at;        /* simulated ns of the last depot trim */
    uint64_t tree_allocs, rcache_flushes;
    struct fail_point *fail;
};

int iova_domain_init(struct iova_domain *, unsigned granule_shift, uint64_t start_pfn, unsigned ncpu,
                     struct fail_point *);
void iova_domain_destroy(struct iova_domain *);

/* First pfn of a range of `size` pages whose last pfn is at most limit_pfn, or 0. flush: on exhaustion give all cached
 * ranges back to the tree once and search again. */
uint64_t iova_alloc_fast(struct iova_domain *, uint64_t size, uint64_t limit_pfn, bool flush);
void iova_free_fast(struct iova_domain *, uint64_t pfn, uint64_t size);
/* Keep [lo, hi] from ever being handed out. -ENOMEM; ranges already there are joined. */
int iova_reserve(struct iova_domain *, uint64_t lo, uint64_t hi);
void iova_depot_trim(struct iova_domain *, uint64_t now_ns);
uint64_t iova_cached_ranges(struct iova_domain *);
#endif
