/* SPDX-License-Identifier: MIT */
/* A radix page table with 512 eight-byte entries a table and leaves of 4 KiB, 2 MiB and 1 GiB. Mapping and unmapping of
 * different addresses need no lock: entries are single atomic words, a table is installed by compare-and-swap, and a
 * table leaves only when one unmap covers all of its span, which that caller then owns. */
#ifndef DMAPATH_PGTABLE_H
#define DMAPATH_PGTABLE_H

#include "util.h"

/* Protection bits, with Linux's numbers (IOMMU_READ ...). */
enum { PROT_READ_ = 1, PROT_WRITE_ = 2, PROT_CACHE = 4, PROT_NOEXEC = 8, PROT_MMIO = 16, PROT_PRIV = 32 };
#define PTE_TABLE (1ull << 10)
#define PTE_LEAF (1ull << 11)
#define PTE_ADDR 0xfffffffffffff000ull
#define PTE_PROT 0x3full
#define PGT_OUT_BITS 52 /* width of a physical address */

static inline unsigned level_shift(unsigned level) { return 12 + 9 * level; }

struct pgt_table { uint64_t e[512]; };
struct pgt_chunk;

/* Tables taken out of the tree, not yet free: a device may still hold them until its caches are flushed. */
struct pgt_freelist { struct pgt_table *head; };

struct pgt {
    uint64_t top;         /* atomic: root table | number of levels */
    uint64_t page_sizes;  /* bitmap of bytes, e.g. 0x40201000 */
    uint64_t va_last;     /* greatest address that may be mapped */
    bool arm;             /* error codes and unmap rules of ARM's io-pgtable; otherwise those of generic_pt (x86) */
    struct lock lock;     /* pool only */
    struct pgt_table *pool;
    struct pgt_chunk *chunks;
    uint64_t tables;      /* live, the root included */
    struct fail_point *fail;
};

/* Where the last walk ended, so that a run of neighbouring pages walks once. Zero it to begin. */
struct pgt_walk { struct pgt_table *leaf; uint64_t base; };
struct pgt_delta { uint64_t set[3]; };

int pgt_init(struct pgt *, uint64_t page_sizes, uint64_t va_last, bool arm, struct fail_point *);
void pgt_destroy(struct pgt *);

/* Map size bytes; all or nothing. -ENXIO/-EINVAL alignment, -EADDRINUSE/-EEXIST already mapped, -ERANGE width,
 * -EOVERFLOW wrap, -EINVAL no permission bit or size 0, -ENOMEM. Entries written are added to *delta by level; empty
 * tables that a large leaf replaced go to *freed. */
int pgt_map(struct pgt *, struct pgt_walk *, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot,
            struct pgt_delta *, struct pgt_freelist *freed);
/* Unmap; returns the bytes unmapped: less at a hole, more when the range ends inside a large leaf (x86). */
uint64_t pgt_unmap(struct pgt *, uint64_t iova, uint64_t size, struct pgt_delta *, struct pgt_freelist *freed);
void pgt_free_tables(struct pgt *, struct pgt_freelist *);

/* One step of a walk: the entry for iova in a table of that level. */
static inline uint64_t pgt_entry(const struct pgt_table *t, unsigned level, uint64_t iova)
{
    return load_acquire(&t->e[(iova >> level_shift(level)) & 511]);
}
static inline struct pgt_table *pgt_child(uint64_t e) { return (struct pgt_table *)(uintptr_t)(e & PTE_ADDR); }

/* The table of 4 KiB entries that holds iova's, or NULL where there is none (yet). */
static inline struct pgt_table *pgt_leaf_table(const struct pgt *p, uint64_t iova)
{
    uint64_t top = load_acquire(&p->top);
    unsigned l = (unsigned)(top & 7);
    struct pgt_table *t = (struct pgt_table *)(uintptr_t)(top & ~7ull);
    if (unlikely(l < 5 && iova >> level_shift(l + 1)))
        return NULL;
    for (unsigned shift = level_shift(l); shift > 12; shift -= 9) {
        uint64_t e = load_acquire(&t->e[(iova >> shift) & 511]);
        if (unlikely(!(e & PTE_TABLE)))
            return NULL;
        t = pgt_child(e);
    }
    return t;
}

/* The common case of pgt_map: one 4 KiB page in a table that exists. false: take the long way. */
static inline bool pgt_map_page(const struct pgt *p, struct pgt_walk *w, uint64_t iova, uint64_t phys, uint64_t bits)
{
    if (unlikely(iova & 0xfff || phys >> PGT_OUT_BITS || iova > p->va_last))
        return false;
    if (unlikely(w->base != iova >> 21 || !w->leaf)) {
        w->base = iova >> 21;
        w->leaf = pgt_leaf_table(p, iova);
        if (unlikely(!w->leaf))
            return false;
    }
    uint64_t *e = &w->leaf->e[(iova >> 12) & 511];
    if (unlikely(load_relaxed(e)))
        return false;
    store_release(e, phys | bits);
    return true;
}

/* The common case of pgt_unmap: 4 KiB pages of one table, not all of it. Returns the pages cleared, fewer at a hole;
 * 0: nothing done, take the long way. */
static inline uint64_t pgt_unmap_pages(const struct pgt *p, uint64_t iova, uint64_t size)
{
    uint64_t i = (iova >> 12) & 511, n = size >> 12, k;
    if (unlikely(i + n > 512 || n == 512 || (iova | size) & 0xfff))
        return 0;
    struct pgt_table *t = pgt_leaf_table(p, iova);
    if (unlikely(!t))
        return 0;
    for (k = 0; k < n; k++) {
        if (unlikely(!(load_relaxed(&t->e[i + k]) & PTE_LEAF)))
            break;
        store_relaxed(&t->e[i + k], 0);
    }
    return k;
}

/* The leaf entry for iova and its level, or 0 and the level of the entry that is empty. */
uint64_t pgt_lookup(struct pgt *, uint64_t iova, unsigned *level);
#endif
