/* SPDX-License-Identifier: MIT */
#include "iotlb.h"

#include <errno.h>
#include <string.h>

int iotlb_init(struct iotlb *t, uint32_t sets, uint32_t ways, bool caching_mode, struct fail_point *fail)
{
    memset(t, 0, sizeof(*t));
    t->sets = sets;
    t->ways = ways;
    t->caching_mode = caching_mode;
    t->e = core_alloc(fail, sizeof(*t->e) * sets * ways);
    t->tag = core_alloc(fail, sizeof(*t->tag) * sets * ways);
    if (t->e && t->tag)
        return 0;
    iotlb_destroy(t);
    return -ENOMEM;
}

void iotlb_destroy(struct iotlb *t)
{
    free(t->e);
    free(t->tag);
    t->e = NULL;
    t->tag = NULL;
}

/* First entry of the set for a page. */
static inline uint64_t set_of(const struct iotlb *t, uint32_t did, uint64_t page)
{
    return ((page ^ did) & (t->sets - 1)) * t->ways;
}
/* Never 0; domains share tags and are told apart by the entry. */
static inline uint64_t tag_of(uint64_t page, unsigned level) { return page << 2 | (level + 1); }

static inline struct iotlb_entry *find(struct iotlb *t, uint32_t did, uint64_t iova)
{
    for (unsigned l = 0, seen = t->levels_seen; seen; l++, seen >>= 1) {
        if (unlikely(!(seen & 1)))
            continue;
        uint64_t page = iova >> level_shift(l), first = set_of(t, did, page), tag = tag_of(page, l);
        for (uint32_t w = 0; w < t->ways; w++)
            if (t->tag[first + w] == tag && t->e[first + w].did == did)
                return &t->e[first + w];
    }
    return NULL;
}

static struct iotlb_entry *insert(struct iotlb *t, uint32_t did, uint64_t iova, unsigned level, uint64_t pte)
{
    uint64_t page = iova >> level_shift(level);
    struct iotlb_entry *e = &t->e[set_of(t, did, page)], *victim = e;
    for (uint32_t w = 0; w < t->ways; w++, e++) {
        if (!e->did) {
            victim = e;
            break;
        }
        if (e->used < victim->used)
            victim = e;
    }
    if (victim->did)
        t->stats.evictions++;
    else
        t->live++;
    victim->page = page;
    victim->pte = pte;
    victim->host = NULL;
    victim->did = did;
    victim->level = level;
    t->tag[victim - t->e] = tag_of(page, level);
    t->levels_seen |= 1u << level;
    return victim;
}

static void pwc_insert(struct iotlb *t, uint32_t did, uint64_t iova, unsigned level, struct pgt_table *table)
{
    struct pwc_entry *e = t->pwc[level], *victim = e;
    for (int w = 0; w < PWC_WAYS; w++, e++) {
        if (!e->did) {
            victim = e;
            break;
        }
        if (e->used < victim->used)
            victim = e;
    }
    t->pwc_live += !victim->did;
    victim->region = iova >> level_shift(level + 1);
    victim->table = table;
    victim->did = did;
    victim->used = ++t->clock;
}

/* The deepest table that the walk caches know for iova. */
static struct pgt_table *pwc_find(struct iotlb *t, uint32_t did, uint64_t iova, unsigned *level)
{
    for (unsigned l = 0; l < PWC_LEVELS; l++) {
        struct pwc_entry *e = t->pwc[l];
        uint64_t region = iova >> level_shift(l + 1);
        for (int w = 0; w < PWC_WAYS; w++, e++)
            if (e->region == region && e->did == did) {
                e->used = ++t->clock;
                t->stats.pwc_hits++;
                *level = l;
                return e->table;
            }
    }
    return NULL;
}

static RARE struct iotlb_entry *walk(struct iotlb *t, struct pgt *p, uint32_t did, uint64_t iova)
{
    unsigned l;
    struct pgt_table *table = pwc_find(t, did, iova, &l);
    uint64_t e;
    if (!table) {
        uint64_t top = load_acquire(&p->top);
        l = (unsigned)(top & 7);
        table = (struct pgt_table *)(uintptr_t)(top & ~7ull);
        if (l < 5 && iova >> level_shift(l + 1))
            return NULL;
    }
    while (t->stats.walk_reads++, e = pgt_entry(table, l, iova), e & PTE_TABLE) {
        table = pgt_child(e);
        if (--l < PWC_LEVELS)
            pwc_insert(t, did, iova, l, table);
    }
    if (e & PTE_LEAF)
        return insert(t, did, iova, l, e);
    if (t->caching_mode)
        insert(t, did, iova, 0, 0);
    return NULL;
}

/* Translate under t->lock, which the caller holds, as it holds the memory's read lock. false: not present. */
static inline bool iotlb_translate(struct iotlb *t, struct pgt *p, uint32_t did, uint64_t iova, const struct phys_mem *mem,
                     struct xlate *x)
{
    struct iotlb_entry *e = find(t, did, iova);
    if (likely(e != NULL)) {
        t->stats.hits++;
    } else {
        t->stats.misses++;
        e = walk(t, p, did, iova);
        if (!e)
            return false;
        e->host = phys_mem_host(mem, e->pte & PTE_ADDR);
        e->epoch = mem->epoch;
    }
    e->used = ++t->clock;
    if (!e->pte)
        return false;
    uint64_t page = 1ull << level_shift(e->level), off = iova & (page - 1);
    x->phys = (e->pte & PTE_ADDR) + off;
    x->left = page - off;
    x->prot = (unsigned)(e->pte & PTE_PROT);
    /* a large page's bytes need not lie together in the host: only its first 4 KiB is remembered */
    x->host = e->host && e->epoch == mem->epoch && off < 4096 ? (char *)e->host + off : NULL;
    return true;
}

static inline void drop(struct iotlb *t, struct iotlb_entry *e)
{
    e->did = 0;
    e->used = 0;
    t->tag[e - t->e] = 0;
    t->live--;
}

static void drop_pages(struct iotlb *t, uint32_t did, uint64_t first, uint64_t last, unsigned level)
{
    unsigned shift = level_shift(level);
    for (uint64_t page = first >> shift;; page++) {
        uint64_t first_way = set_of(t, did, page);
        for (uint32_t w = 0; w < t->ways; w++)
            if (t->tag[first_way + w] == tag_of(page, level) && t->e[first_way + w].did == did)
                drop(t, &t->e[first_way + w]);
        if (page == last >> shift)
            return;
    }
}

static void drop_scan(struct iotlb *t, uint32_t did, uint64_t first, uint64_t last)
{
    struct iotlb_entry *e = t->e;
    for (uint64_t i = 0; i < (uint64_t)t->sets * t->ways; i++, e++) {
        unsigned s = level_shift(e->level);
        if (e->did == did && e->page >= first >> s && e->page <= last >> s)
            drop(t, e);
    }
}

static void pwc_drop(struct iotlb *t, uint32_t did, uint64_t first, uint64_t last)
{
    for (unsigned l = 0; l < PWC_LEVELS; l++)
        for (int w = 0; w < PWC_WAYS; w++) {
            struct pwc_entry *e = &t->pwc[l][w];
            unsigned s = level_shift(l + 1);
            if (e->did == did && e->region >= first >> s && e->region <= last >> s) {
                memset(e, 0, sizeof(*e));
                t->pwc_live--;
            }
        }
}

void iotlb_invalidate(struct iotlb *t, uint32_t did, uint64_t first, uint64_t last)
{
    lock_acquire(&t->lock);
    if (t->live) {
        if ((last - first) >> 12 < t->sets) {
            for (unsigned l = 0; l < 3; l++)
                if (t->levels_seen & 1u << l)
                    drop_pages(t, did, first, last, l);
        } else {
            drop_scan(t, did, first, last);
        }
    }
    if (t->pwc_live)
        pwc_drop(t, did, first, last);
    lock_release(&t->lock);
}

void iotlb_invalidate_domain(struct iotlb *t, uint32_t did)
{
    lock_acquire(&t->lock);
    if (t->live)
        drop_scan(t, did, 0, UINT64_MAX);
    if (t->pwc_live)
        pwc_drop(t, did, 0, UINT64_MAX);
    if (!t->live)
        t->levels_seen = 0;
    lock_release(&t->lock);
}
