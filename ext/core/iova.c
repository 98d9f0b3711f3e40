/* SPDX-License-Identifier: MIT */
#include "iova.h"

#include <errno.h>
#include <string.h>

struct iova_block { struct iova_block *next; struct iova_node node[63]; };

/* ---- red-black tree, threaded by address -------------------------------------------------------------------------- */

static void rotate(struct iova_domain *d, struct iova_node *x, bool left)
{
    struct iova_node *y = left ? x->right : x->left;
    struct iova_node *inner = left ? y->left : y->right;
    if (left) x->right = inner; else x->left = inner;
    if (inner != &d->nil)
        inner->parent = x;
    y->parent = x->parent;
    if (x->parent == &d->nil) d->root = y;
    else if (x == x->parent->left) x->parent->left = y;
    else x->parent->right = y;
    if (left) y->left = x; else y->right = x;
    x->parent = y;
}

/* n goes just below (by address) its known upper neighbour: no search is needed to find its place. */
static void tree_insert_before(struct iova_domain *d, struct iova_node *n, struct iova_node *above)
{
    struct iova_node *below = above->prev, *p;
    n->prev = below;
    n->next = above;
    above->prev = n;
    if (below)
        below->next = n;
    n->left = n->right = &d->nil;
    if (above->left == &d->nil) {
        p = above;
        p->left = n;
    } else {
        p = below; /* the greatest node of above's left subtree: its right child is free */
        p->right = n;
    }
    n->parent = p;
    n->red = 1;
    while (n->parent->red) {
        struct iova_node *g = n->parent->parent;
        bool left = n->parent == g->left;
        struct iova_node *uncle = left ? g->right : g->left;
        if (uncle->red) {
            n->parent->red = uncle->red = 0;
            g->red = 1;
            n = g;
            continue;
        }
        if (n == (left ? n->parent->right : n->parent->left)) {
            n = n->parent;
            rotate(d, n, left);
        }
        n->parent->red = 0;
        g->red = 1;
        rotate(d, g, !left);
    }
    d->root->red = 0;
    d->nodes++;
}

static void transplant(struct iova_domain *d, struct iova_node *u, struct iova_node *v)
{
    if (u->parent == &d->nil) d->root = v;
    else if (u == u->parent->left) u->parent->left = v;
    else u->parent->right = v;
    v->parent = u->parent;
}

static void delete_fixup(struct iova_domain *d, struct iova_node *x)
{
    while (x != d->root && !x->red) {
        bool left = x == x->parent->left;
        struct iova_node *w = left ? x->parent->right : x->parent->left;
        if (w->red) {
            w->red = 0;
            x->parent->red = 1;
            rotate(d, x->parent, left);
            w = left ? x->parent->right : x->parent->left;
        }
        if (!w->left->red && !w->right->red) {
            w->red = 1;
            x = x->parent;
            continue;
        }
        if (!(left ? w->right : w->left)->red) {
            (left ? w->left : w->right)->red = 0;
            w->red = 1;
            rotate(d, w, !left);
            w = left ? x->parent->right : x->parent->left;
        }
        w->red = x->parent->red;
        x->parent->red = 0;
        (left ? w->right : w->left)->red = 0;
        rotate(d, x->parent, left);
        x = d->root;
    }
    x->red = 0;
}

static void tree_delete(struct iova_domain *d, struct iova_node *z)
{
    struct iova_node *x;
    uint64_t red = z->red;
    if (z->left == &d->nil) {
        x = z->right;
        transplant(d, z, x);
    } else if (z->right == &d->nil) {
        x = z->left;
        transplant(d, z, x);
    } else {
        struct iova_node *y = z->next; /* has no left child */
        red = y->red;
        x = y->right;
        if (y->parent == z) {
            x->parent = y;
        } else {
            transplant(d, y, x);
            y->right = z->right;
            y->right->parent = y;
        }
        transplant(d, z, y);
        y->left = z->left;
        y->left->parent = y;
        y->red = z->red;
    }
    if (!red)
        delete_fixup(d, x);
    z->next->prev = z->prev;
    if (z->prev)
        z->prev->next = z->next;
    d->nodes--;
}

static struct iova_node *tree_find(struct iova_domain *d, uint64_t pfn)
{
    struct iova_node *n = d->root;
    while (n != &d->nil) {
        if (pfn < n->lo) n = n->left;
        else if (pfn > n->hi) n = n->right;
        else return n;
    }
    return NULL;
}

/* The lowest node that begins at or above pfn; the anchor at the latest. */
static struct iova_node *tree_at_or_above(struct iova_domain *d, uint64_t pfn)
{
    struct iova_node *n = d->root, *best = &d->anchor;
    while (n != &d->nil) {
        if (n->lo >= pfn) { best = n; n = n->left; }
        else n = n->right;
    }
    return best;
}

static struct iova_node *node_get(struct iova_domain *d)
{
    struct iova_node *n;
    if (fail_now(d->fail))
        return NULL;
    if (!d->pool) {
        struct iova_block *b = calloc(1, sizeof(*b));
        if (!b)
            return NULL;
        b->next = d->blocks;
        d->blocks = b;
        for (size_t i = 0; i < sizeof(b->node) / sizeof(b->node[0]); i++) {
            b->node[i].next = d->pool;
            d->pool = &b->node[i];
        }
    }
    n = d->pool;
    d->pool = n->next;
    return n;
}

static void node_put(struct iova_domain *d, struct iova_node *n)
{
    n->next = d->pool;
    d->pool = n;
}

/* ---- allocation from the tree ------------------------------------------------------------------------------------- */

/* Highest aligned place below `limit` (exclusive) and under the remembered node, or 0; *above: its upper neighbour. */
static uint64_t tree_search(struct iova_domain *d, uint64_t size, uint64_t limit, struct iova_node **above)
{
    uint64_t align = ~0ull << order_base_2(size), low = d->start_pfn, high = limit, at;
    struct iova_node *cur = limit <= d->dma_32bit_pfn ? d->cached32 : d->cached;
    uint64_t retry_from = cur->hi;
    for (;;) {
        struct iova_node *up;
        do {
            high = high < cur->lo ? high : cur->lo;
            at = (high - size) & align;
            up = cur;
            cur = cur->prev;
        } while (cur && at <= cur->hi && at >= low);
        if (high >= size && at >= low) {
            *above = up;
            return at;
        }
        if (low != d->start_pfn || retry_from >= limit)
            return 0;
        /* once more over what lies above the remembered node */
        high = limit;
        low = retry_from + 1;
        cur = tree_at_or_above(d, limit);
    }
}

static uint64_t tree_alloc(struct iova_domain *d, uint64_t size, uint64_t limit)
{
    struct iova_node *n, *above;
    uint64_t at = 0;
    lock_acquire(&d->lock);
    if (limit <= d->dma_32bit_pfn && size >= d->max32_alloc_size)
        goto out;
    n = node_get(d);
    if (!n)
        goto out;
    at = tree_search(d, size, limit, &above);
    if (!at) {
        d->max32_alloc_size = size;
        node_put(d, n);
        goto out;
    }
    n->lo = at;
    n->hi = at + size - 1;
    tree_insert_before(d, n, above);
    *(n->hi < d->dma_32bit_pfn ? &d->cached32 : &d->cached) = n;
    d->tree_allocs++;
out:
    lock_release(&d->lock);
    return at;
}

static void tree_free_locked(struct iova_domain *d, struct iova_node *n)
{
    if (n == d->cached32 || (n->hi < d->dma_32bit_pfn && n->lo >= d->cached32->lo))
        d->cached32 = n->next;
    if (n->lo < d->dma_32bit_pfn)
        d->max32_alloc_size = d->dma_32bit_pfn;
    if (n->lo >= d->cached->lo)
        d->cached = n->next;
    tree_delete(d, n);
    node_put(d, n);
}

static RARE void tree_free(struct iova_domain *d, uint64_t pfn)
{
    lock_acquire(&d->lock);
    struct iova_node *n = tree_find(d, pfn);
    if (n)
        tree_free_locked(d, n);
    lock_release(&d->lock);
}

/* ---- per-CPU caches ----------------------------------------------------------------------------------------------- */

/* The newest that the limit allows. */
static RARE uint64_t mag_search(struct iova_mag *m, uint64_t limit)
{
    for (uint64_t i = m->size; i-- > 0;) {
        uint64_t pfn = m->pfn[i];
        if (pfn > limit)
            continue;
        m->pfn[i] = m->pfn[--m->size];
        return pfn;
    }
    return 0;
}

static void mag_empty(struct iova_domain *d, struct iova_mag *m)
{
    lock_acquire(&d->lock);
    for (uint64_t i = 0; i < m->size; i++) {
        struct iova_node *n = tree_find(d, m->pfn[i]);
        if (n)
            tree_free_locked(d, n);
    }
    lock_release(&d->lock);
    m->size = 0;
}

static struct iova_mag *depot_pop(struct iova_depot *q)
{
    struct iova_mag *m = q->head;
    q->head = m->next;
    q->size--;
    return m;
}

/* The loaded magazine is empty: the previous one, else one from the depot, else none. */
static RARE struct iova_mag *rcache_reload(struct iova_domain *d, struct iova_cpu *c, unsigned order)
{
    struct iova_mag *m = c->cache[order].loaded;
    if (c->cache[order].prev->size) {
        c->cache[order].loaded = c->cache[order].prev;
        c->cache[order].prev = m;
    } else {
        struct iova_depot *q = &d->depot[order];
        lock_acquire(&q->lock);
        if (q->head) {
            free(m);
            c->cache[order].loaded = depot_pop(q);
        }
        lock_release(&q->lock);
    }
    return c->cache[order].loaded;
}

/* The loaded magazine is full: the previous one if that has room, else a fresh one, the full one going to the depot. */
static RARE struct iova_mag *rcache_unload(struct iova_domain *d, struct iova_cpu *c, unsigned order)
{
    struct iova_mag *m = c->cache[order].loaded, *fresh;
    struct iova_depot *q = &d->depot[order];
    if (c->cache[order].prev->size < IOVA_MAG_SIZE) {
        c->cache[order].loaded = c->cache[order].prev;
        c->cache[order].prev = m;
        return c->cache[order].loaded;
    }
    fresh = core_alloc(d->fail, sizeof(*fresh));
    if (!fresh)
        return NULL;
    lock_acquire(&q->lock);
    m->next = q->head;
    q->head = m;
    q->size++;
    lock_release(&q->lock);
    c->cache[order].loaded = fresh;
    return fresh;
}

static inline uint64_t rcache_get(struct iova_domain *d, unsigned order, uint64_t limit)
{
    struct iova_cpu *c = &d->cpu[(thread_number() - 1) % d->ncpu];
    uint64_t pfn = 0;
    lock_acquire(&c->lock);
    struct iova_mag *m = c->cache[order].loaded;
    if (unlikely(!m->size))
        m = rcache_reload(d, c, order);
    if (likely(m->size)) {
        pfn = m->pfn[m->size - 1];
        if (likely(pfn <= limit))
            m->size--;
        else
            pfn = mag_search(m, limit);
    }
    lock_release(&c->lock);
    return pfn;
}

static inline bool rcache_put(struct iova_domain *d, unsigned order, uint64_t pfn)
{
    struct iova_cpu *c = &d->cpu[(thread_number() - 1) % d->ncpu];
    lock_acquire(&c->lock);
    struct iova_mag *m = c->cache[order].loaded;
    if (unlikely(m->size == IOVA_MAG_SIZE))
        m = rcache_unload(d, c, order);
    if (likely(m != NULL))
        m->pfn[m->size++] = pfn;
    lock_release(&c->lock);
    return m != NULL;
}

static void rcache_flush(struct iova_domain *d)
{
    for (unsigned i = 0; i < d->ncpu; i++) {
        struct iova_cpu *c = &d->cpu[i];
        lock_acquire(&c->lock);
        for (unsigned o = 0; o < IOVA_ORDERS; o++) {
            mag_empty(d, c->cache[o].loaded);
            mag_empty(d, c->cache[o].prev);
        }
        lock_release(&c->lock);
    }
    for (unsigned o = 0; o < IOVA_ORDERS; o++) {
        struct iova_depot *q = &d->depot[o];
        lock_acquire(&q->lock);
        while (q->head) {
            struct iova_mag *m = depot_pop(q);
            mag_empty(d, m);
            free(m);
        }
        lock_release(&q->lock);
    }
    __atomic_add_fetch(&d->rcache_flushes, 1, __ATOMIC_RELAXED);
}

/* ---- the calls ---------------------------------------------------------------------------------------------------- */

static RARE uint64_t alloc_slow(struct iova_domain *d, uint64_t size, uint64_t limit, bool flush)
{
    uint64_t pfn = tree_alloc(d, size, limit);
    if (!pfn && flush) {
        rcache_flush(d);
        pfn = tree_alloc(d, size, limit);
    }
    return pfn;
}

uint64_t iova_alloc_fast(struct iova_domain *d, uint64_t size, uint64_t limit_pfn, bool flush)
{
    unsigned order = order_base_2(size);
    uint64_t pfn, limit = limit_pfn + 1;
    if (likely(order < IOVA_ORDERS)) {
        if (size < 1u << (IOVA_ORDERS - 1))
            size = 1ull << order; /* so that a freed range of any size of its class serves any other */
        if (limit > size) {
            pfn = rcache_get(d, order, limit - size);
            if (likely(pfn))
                return pfn;
        }
    }
    return alloc_slow(d, size, limit, flush);
}

void iova_free_fast(struct iova_domain *d, uint64_t pfn, uint64_t size)
{
    unsigned order = order_base_2(size);
    if (unlikely(order >= IOVA_ORDERS || !rcache_put(d, order, pfn)))
        tree_free(d, pfn);
}

int iova_reserve(struct iova_domain *d, uint64_t lo, uint64_t hi)
{
    int rc = 0;
    lock_acquire(&d->lock);
    struct iova_node *n = tree_at_or_above(d, lo), *fresh;
    if (n->prev && n->prev->hi >= lo)
        n = n->prev;
    for (; n != &d->anchor && n->lo <= hi; n = n->next) {
        if (lo < n->lo)
            n->lo = lo; /* what lies under it is free: the node simply grows down */
        lo = n->hi + 1;
        if (lo > hi)
            goto out;
    }
    fresh = node_get(d);
    if (!fresh) {
        rc = -ENOMEM;
        goto out;
    }
    fresh->lo = lo;
    fresh->hi = hi;
    tree_insert_before(d, fresh, tree_at_or_above(d, lo));
out:
    lock_release(&d->lock);
    return rc;
}

void iova_depot_trim(struct iova_domain *d, uint64_t now_ns)
{
    for (bool trimmed = true; trimmed && now_ns - d->trimmed_at >= IOVA_TRIM_NS;) {
        d->trimmed_at += IOVA_TRIM_NS;
        trimmed = false;
        for (unsigned o = 0; o < IOVA_ORDERS; o++) {
            struct iova_depot *q = &d->depot[o];
            struct iova_mag *m = NULL;
            lock_acquire(&q->lock);
            if (q->size > d->ncpu)
                m = depot_pop(q);
            lock_release(&q->lock);
            if (m) {
                mag_empty(d, m);
                free(m);
                trimmed = true;
            }
        }
    }
    d->trimmed_at = now_ns - (now_ns - d->trimmed_at) % IOVA_TRIM_NS; /* the rounds that had nothing to do */
}

uint64_t iova_cached_ranges(struct iova_domain *d)
{
    uint64_t n = 0;
    for (unsigned o = 0; o < IOVA_ORDERS; o++) {
        for (unsigned i = 0; i < d->ncpu; i++) {
            lock_acquire(&d->cpu[i].lock);
            n += d->cpu[i].cache[o].loaded->size + d->cpu[i].cache[o].prev->size;
            lock_release(&d->cpu[i].lock);
        }
        lock_acquire(&d->depot[o].lock);
        n += d->depot[o].size * IOVA_MAG_SIZE;
        lock_release(&d->depot[o].lock);
    }
    return n;
}

int iova_domain_init(struct iova_domain *d, unsigned granule_shift, uint64_t start_pfn, unsigned ncpu,
                     struct fail_point *fail)
{
    memset(d, 0, sizeof(*d));
    d->fail = fail;
    d->nil.left = d->nil.right = d->nil.parent = &d->nil;
    d->anchor.lo = d->anchor.hi = UINT64_MAX;
    d->anchor.left = d->anchor.right = d->anchor.parent = &d->nil;
    d->root = d->cached = d->cached32 = &d->anchor;
    d->start_pfn = start_pfn ? start_pfn : 1;
    d->dma_32bit_pfn = 1ull << (32 - granule_shift);
    d->max32_alloc_size = d->dma_32bit_pfn;
    d->ncpu = ncpu;
    d->cpu = core_alloc(fail, ncpu * sizeof(*d->cpu));
    if (!d->cpu)
        return -ENOMEM;
    for (unsigned i = 0; i < ncpu; i++)
        for (unsigned o = 0; o < IOVA_ORDERS; o++) {
            d->cpu[i].cache[o].loaded = core_alloc(fail, sizeof(struct iova_mag));
            d->cpu[i].cache[o].prev = core_alloc(fail, sizeof(struct iova_mag));
            if (!d->cpu[i].cache[o].loaded || !d->cpu[i].cache[o].prev) {
                iova_domain_destroy(d);
                return -ENOMEM;
            }
        }
    return 0;
}

void iova_domain_destroy(struct iova_domain *d)
{
    for (unsigned i = 0; d->cpu && i < d->ncpu; i++)
        for (unsigned o = 0; o < IOVA_ORDERS; o++) {
            free(d->cpu[i].cache[o].loaded);
            free(d->cpu[i].cache[o].prev);
        }
    free(d->cpu);
    for (unsigned o = 0; o < IOVA_ORDERS; o++)
        while (d->depot[o].head)
            free(depot_pop(&d->depot[o]));
    while (d->blocks) {
        struct iova_block *b = d->blocks;
        d->blocks = b->next;
        free(b);
    }
    memset(d, 0, sizeof(*d));
}
