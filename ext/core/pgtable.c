/* SPDX-License-Identifier: MIT */
#include "pgtable.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum { TOP_LEVEL_MAX = 5, CHUNK_TABLES = 64 };
struct pgt_chunk { struct pgt_chunk *next; void *mem; };

static inline unsigned top_level(uint64_t top) { return (unsigned)(top & 7); }
static inline struct pgt_table *top_table(uint64_t top) { return (struct pgt_table *)(uintptr_t)(top & ~7ull); }
static inline bool covers(unsigned level, uint64_t last) { return level >= TOP_LEVEL_MAX || !(last >> level_shift(level + 1)); }

/* ---- tables ------------------------------------------------------------------------------------------------------- */

static int pool_grow(struct pgt *p)
{
    struct pgt_chunk *c = malloc(sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->mem = mmap(NULL, CHUNK_TABLES * sizeof(struct pgt_table), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (c->mem == MAP_FAILED) {
        free(c);
        return -ENOMEM;
    }
    c->next = p->chunks;
    p->chunks = c;
    struct pgt_table *t = c->mem;
    for (int i = CHUNK_TABLES; i-- > 0;) {
        t[i].e[0] = (uint64_t)(uintptr_t)p->pool;
        p->pool = &t[i];
    }
    return 0;
}

/* A table from the pool is zero: only empty tables ever come back. */
static struct pgt_table *table_get(struct pgt *p)
{
    struct pgt_table *t = NULL;
    if (fail_now(p->fail))
        return NULL;
    lock_acquire(&p->lock);
    if (p->pool || !pool_grow(p)) {
        t = p->pool;
        p->pool = (struct pgt_table *)(uintptr_t)t->e[0];
        t->e[0] = 0;
        p->tables++;
    }
    lock_release(&p->lock);
    return t;
}

void pgt_free_tables(struct pgt *p, struct pgt_freelist *f)
{
    if (!f->head)
        return;
    lock_acquire(&p->lock);
    while (f->head) {
        struct pgt_table *t = f->head;
        f->head = (struct pgt_table *)(uintptr_t)t->e[0];
        t->e[0] = (uint64_t)(uintptr_t)p->pool;
        p->pool = t;
        p->tables--;
    }
    lock_release(&p->lock);
}

/* The chain lies in entry 0 of each removed table. A stale walk-cache entry may still lead there until the flush; a page
 * aligned pointer has neither the table nor the leaf bit, so such a walk finds "not present", as it should. */
static void freelist_add(struct pgt_freelist *f, struct pgt_table *t)
{
    store_relaxed(&t->e[0], (uint64_t)(uintptr_t)f->head);
    f->head = t;
}

static void table_unused(struct pgt *p, struct pgt_table *t)
{
    struct pgt_freelist f = { NULL };
    freelist_add(&f, t);
    pgt_free_tables(p, &f);
}

int pgt_init(struct pgt *p, uint64_t page_sizes, uint64_t va_last, bool arm, struct fail_point *fail)
{
    memset(p, 0, sizeof(*p));
    p->page_sizes = page_sizes;
    p->va_last = va_last;
    p->arm = arm;
    p->fail = fail;
    struct pgt_table *t = table_get(p);
    if (!t)
        return -ENOMEM;
    p->top = (uint64_t)(uintptr_t)t | 2; /* three levels, 512 GiB: grown on demand, so that short walks stay short */
    return 0;
}

void pgt_destroy(struct pgt *p)
{
    while (p->chunks) {
        struct pgt_chunk *c = p->chunks;
        p->chunks = c->next;
        munmap(c->mem, CHUNK_TABLES * sizeof(struct pgt_table));
        free(c);
    }
    memset(p, 0, sizeof(*p));
}

/* Put roots above the root until `last` can be reached. */
static int grow_top(struct pgt *p, uint64_t last, uint64_t *top)
{
    while (!covers(top_level(*top), last)) {
        struct pgt_table *t = table_get(p);
        if (!t)
            return -ENOMEM;
        t->e[0] = (uint64_t)(uintptr_t)top_table(*top) | PTE_TABLE;
        uint64_t bigger = (uint64_t)(uintptr_t)t | (top_level(*top) + 1);
        if (__atomic_compare_exchange_n(&p->top, top, bigger, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            *top = bigger;
        } else {
            t->e[0] = 0;
            table_unused(p, t);
        }
    }
    return 0;
}

/* ---- mapping ------------------------------------------------------------------------------------------------------ */

/* The table of `level` that holds iova's entry, made where it is missing. */
static int walk_make(struct pgt *p, uint64_t iova, unsigned level, struct pgt_table **out)
{
    uint64_t top = load_acquire(&p->top);
    if (unlikely(!covers(top_level(top), iova))) {
        int rc = grow_top(p, iova, &top);
        if (rc)
            return rc;
    }
    struct pgt_table *t = top_table(top);
    for (unsigned l = top_level(top); l > level; l--) {
        uint64_t *slot = &t->e[(iova >> level_shift(l)) & 511], e = load_acquire(slot);
        if (unlikely(!e)) {
            struct pgt_table *fresh = table_get(p);
            if (!fresh)
                return -ENOMEM;
            if (__atomic_compare_exchange_n(slot, &e, (uint64_t)(uintptr_t)fresh | PTE_TABLE, false, __ATOMIC_ACQ_REL,
                                            __ATOMIC_ACQUIRE))
                e = (uint64_t)(uintptr_t)fresh | PTE_TABLE;
            else
                table_unused(p, fresh);
        }
        if (unlikely(e & PTE_LEAF))
            return -EADDRINUSE;
        t = pgt_child(e);
    }
    *out = t;
    return 0;
}

/* Is everything below this table unmapped? Then hand its tables over. */
static bool table_empty(const struct pgt_table *t, unsigned level)
{
    for (unsigned i = 0; i < 512; i++) {
        uint64_t e = load_acquire(&t->e[i]);
        if (e && (!(e & PTE_TABLE) || !level || !table_empty(pgt_child(e), level - 1)))
            return false;
    }
    return true;
}

static void table_take(struct pgt_table *t, unsigned level, struct pgt_freelist *freed)
{
    for (unsigned i = 0; level && i < 512; i++)
        if (t->e[i]) {
            table_take(pgt_child(t->e[i]), level - 1, freed);
            store_relaxed(&t->e[i], 0);
        }
    freelist_add(freed, t);
}

static inline int best_level(const struct pgt *p, uint64_t iova, uint64_t phys, uint64_t size)
{
    uint64_t both = iova | phys;
    if (likely(size < 1ull << 21 || both & ((1ull << 21) - 1))) {
        if (likely(p->page_sizes & 1ull << 12))
            return both & 0xfff || size < 1ull << 12 ? -1 : 0;
        return -1;
    }
    for (int l = 2; l >= 0; l--) {
        uint64_t page = 1ull << level_shift((unsigned)l);
        if (p->page_sizes & page && size >= page && !(both & (page - 1)))
            return l;
    }
    return -1;
}

/* Large leaves one after another in one table, replacing tables that hold nothing. */
static int fill_large(struct pgt_table *t, unsigned level, uint64_t *iova, uint64_t *phys, uint64_t *left,
                      uint64_t bits, struct pgt_delta *d, struct pgt_freelist *freed)
{
    uint64_t page = 1ull << level_shift(level);
    for (unsigned i = (*iova >> level_shift(level)) & 511; i < 512 && *left >= page; i++) {
        uint64_t e = load_acquire(&t->e[i]);
        if (e) {
            if (e & PTE_LEAF || !table_empty(pgt_child(e), level - 1))
                return -EADDRINUSE;
            store_release(&t->e[i], *phys | bits);
            table_take(pgt_child(e), level - 1, freed);
        } else {
            store_release(&t->e[i], *phys | bits);
        }
        d->set[level]++;
        *iova += page;
        *phys += page;
        *left -= page;
    }
    return 0;
}

static int fill_small(struct pgt_table *t, uint64_t *iova, uint64_t *phys, uint64_t *left, uint64_t bits,
                      struct pgt_delta *d)
{
    uint64_t i = (*iova >> 12) & 511, n = *left >> 12, pte = *phys | bits, k;
    uint64_t *e = &t->e[i];
    n = n < 512 - i ? n : 512 - i;
    for (k = 0; k < n; k++, pte += 4096) {
        if (unlikely(load_relaxed(&e[k])))
            break;
        store_release(&e[k], pte);
    }
    d->set[0] += k;
    *iova += k << 12;
    *phys += k << 12;
    *left -= k << 12;
    return k < n ? -EADDRINUSE : 0;
}

static int check_map(const struct pgt *p, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot)
{
    if (unlikely(!size || !(prot & (PROT_READ_ | PROT_WRITE_))))
        return -EINVAL;
    if (unlikely(iova + (size - 1) < iova || phys + (size - 1) < phys))
        return -EOVERFLOW;
    if (unlikely((phys + (size - 1)) >> PGT_OUT_BITS || iova + (size - 1) > p->va_last))
        return -ERANGE;
    return 0;
}

int pgt_map(struct pgt *p, struct pgt_walk *w, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot,
            struct pgt_delta *d, struct pgt_freelist *freed)
{
    uint64_t left = size, at = iova, bits = (prot & PTE_PROT) | PTE_LEAF;
    struct pgt_delta mine = { { 0, 0, 0 } };
    int rc = check_map(p, iova, phys, size, prot);
    if (rc)
        return rc;
    do {
        int level = best_level(p, at, phys, left);
        if (unlikely(level < 0)) {
            rc = p->arm ? -EINVAL : -ENXIO;
        } else if (likely(level == 0)) {
            if (w->leaf && w->base == at >> 21) {
                rc = 0;
            } else {
                rc = walk_make(p, at, 0, &w->leaf);
                w->base = at >> 21;
            }
            if (likely(!rc))
                rc = fill_small(w->leaf, &at, &phys, &left, bits, &mine);
            else
                w->leaf = NULL;
        } else {
            struct pgt_table *t;
            w->leaf = NULL; /* a large leaf may replace the remembered table */
            rc = walk_make(p, at, (unsigned)level, &t);
            if (!rc)
                rc = fill_large(t, (unsigned)level, &at, &phys, &left, bits, &mine, freed);
        }
    } while (likely(!rc) && left);
    if (unlikely(rc)) {
        struct pgt_delta undone = { { 0, 0, 0 } };
        if (at != iova)
            pgt_unmap(p, iova, at - iova, &undone, freed);
        w->leaf = NULL; /* the undo may have removed it */
        return p->arm && rc == -EADDRINUSE ? -EEXIST : rc;
    }
    d->set[0] += mine.set[0];
    d->set[1] += mine.set[1];
    d->set[2] += mine.set[2];
    return 0;
}

/* ---- unmapping ---------------------------------------------------------------------------------------------------- */

/* Tables that end at `at` and began inside the range are empty now: take them out, from the bottom up. */
static void drop_covered(struct pgt_table **path, unsigned from, unsigned top, uint64_t start, uint64_t at,
                         struct pgt_freelist *freed)
{
    for (unsigned l = from; l < top; l++) {
        uint64_t span = 1ull << level_shift(l + 1);
        if (at & (span - 1) || at - span < start)
            return;
        store_release(&path[l + 1]->e[((at - 1) >> level_shift(l + 1)) & 511], 0);
        freelist_add(freed, path[l]);
    }
}

uint64_t pgt_unmap(struct pgt *p, uint64_t iova, uint64_t size, struct pgt_delta *d, struct pgt_freelist *freed)
{
    uint64_t done = 0, top = load_acquire(&p->top);
    size = below_top(iova, size);
    struct pgt_table *path[TOP_LEVEL_MAX + 1];
    if (!covers(top_level(top), iova))
        return 0;
    while (done < size) {
        uint64_t at = iova + done, e, page;
        unsigned l = top_level(top), i;
        if (unlikely(!covers(l, at)))
            break;
        path[l] = top_table(top);
        while (e = pgt_entry(path[l], l, at), e & PTE_TABLE) {
            path[l - 1] = pgt_child(e);
            l--;
        }
        page = 1ull << level_shift(l);
        if (!e || at & (page - 1))
            break;
        for (i = (at >> level_shift(l)) & 511; i < 512 && done < size; i++, done += page) {
            e = load_relaxed(&path[l]->e[i]);
            if (!(e & PTE_LEAF) || (p->arm && size - done < page))
                break;
            store_relaxed(&path[l]->e[i], 0);
            d->set[l]++;
        }
        at = iova + done;
        if (i == 512)
            drop_covered(path, l, top_level(top), iova, at, freed);
        else if (done < size && !(e & PTE_TABLE))
            break;
    }
    return done;
}

uint64_t pgt_lookup(struct pgt *p, uint64_t iova, unsigned *level)
{
    uint64_t top = load_acquire(&p->top), e;
    unsigned l = top_level(top);
    *level = TOP_LEVEL_MAX;
    if (!covers(l, iova))
        return 0;
    struct pgt_table *t = top_table(top);
    while (e = pgt_entry(t, l, iova), e & PTE_TABLE) {
        t = pgt_child(e);
        l--;
    }
    *level = l;
    return e;
}
