/* SPDX-License-Identifier: MIT */
#include "swiotlb.h"

#include <errno.h>

static inline uint32_t slots_of(uint64_t bytes) { return (uint32_t)((bytes + TLB_SIZE - 1) >> TLB_SHIFT); }
static inline uint32_t in_segment(uint32_t i) { return i & (TLB_SEGMENT - 1); }
static inline uint64_t slot_addr(uint64_t start, uint32_t i) { return start + ((uint64_t)i << TLB_SHIFT); }

static const struct swiotlb_ops pool_ops;

static int pool_init(struct tlb_pool *q, uint64_t start, char *host, uint32_t slots, uint32_t areas, struct fail_point *fail)
{
    memset(q, 0, sizeof(*q));
    q->start = start;
    q->slots = slots;
    q->areas = areas;
    q->area_slots = slots / areas;
    q->slot = core_alloc(fail, slots * sizeof(*q->slot));
    q->area = core_alloc(fail, areas * sizeof(*q->area));
    q->busy = core_alloc(fail, (slots + 63) / 64 * sizeof(*q->busy));
    q->host = host;
    return q->slot && q->area && q->busy ? 0 : -ENOMEM;
}

static void pool_free(struct tlb_pool *q)
{
    free(q->slot);
    free(q->area);
    free(q->busy);
    free(q->host);
    q->slot = NULL;
    q->area = NULL;
    q->busy = NULL;
    q->host = NULL;
}

int swiotlb_init(struct swiotlb *p, uint64_t start, char *host, uint32_t slots, uint32_t areas, bool force)
{
    memset(p, 0, sizeof(*p));
    p->force = force;
    p->ops = &pool_ops;
    p->next_start = start + ((uint64_t)slots << TLB_SHIFT);
    p->pools = 1;
    if (pthread_rwlock_init(&p->grown_lock, NULL))
        return -ENOMEM;
    if (!pool_init(&p->first, start, host, slots, areas, &p->fail))
        return 0;
    p->first.host = NULL; /* still the caller's */
    pool_free(&p->first);
    return -ENOMEM;
}

static uint64_t frames_of(const struct tlb_pool *q) { return (((uint64_t)q->slots << TLB_SHIFT) + 4095) >> 12; }

/* Take a pool's pages out of the machine's memory. */
static void pool_withdraw(struct swiotlb *p, const struct tlb_pool *q, uint64_t frames)
{
    for (uint64_t i = 0, phys; p->mem && i < frames; i++) {
        phys = q->start + (i << 12);
        phys_mem_remove(p->mem, &phys, 1);
    }
}

static void pool_drop(struct swiotlb *p, struct tlb_pool *q)
{
    pool_withdraw(p, q, frames_of(q));
    pool_free(q);
    free(q);
}

void swiotlb_destroy(struct swiotlb *p)
{
    while (p->grown) {
        struct tlb_pool *q = p->grown;
        p->grown = q->next;
        pool_drop(p, q);
    }
    pool_free(&p->first);
    pthread_rwlock_destroy(&p->grown_lock);
}

/* ---- placement ---------------------------------------------------------------------------------------------------- */

/* Bits of the original address that are kept inside the allocation: swiotlb_align_offset */
static inline uint64_t align_offset(const struct swiotlb_want *w, uint64_t orig)
{
    return orig & w->min_align_mask & (w->alloc_align_mask | (TLB_SIZE - 1));
}

static inline bool crosses(uint64_t mask, uint64_t first, uint64_t bytes)
{
    return ((first ^ (first + bytes - 1)) & ~mask) != 0;
}

/* The bits of a run of n slots in the word of slot i: as many as that word holds. */
static inline uint64_t run_bits(uint32_t i, uint32_t n, uint32_t *held)
{
    uint32_t bit = i & 63;
    *held = n < 64 - bit ? n : 64 - bit;
    return (~0ull >> (64 - *held)) << bit;
}

/* Are n slots from i on free? A run never leaves its segment. */
static inline bool run_free(const struct tlb_pool *p, uint32_t i, uint32_t n)
{
    uint32_t k;
    if (in_segment(i) + n > TLB_SEGMENT)
        return false;
    for (; n; i += k, n -= k)
        if (p->busy[i >> 6] & run_bits(i, n, &k))
            return false;
    return true;
}

static inline void run_flip(struct tlb_pool *p, uint32_t i, uint32_t n)
{
    uint32_t k;
    for (; n; i += k, n -= k)
        p->busy[i >> 6] ^= run_bits(i, n, &k);
}

/* A run of n slots in one area, or -1. */
static int64_t search_area(struct tlb_pool *p, uint32_t which, const struct swiotlb_want *w, uint64_t orig, uint64_t size)
{
    struct tlb_area *a = &p->area[which];
    uint32_t base = which * p->area_slots, n = slots_of(size), checked = 0, index, stride;
    uint64_t alloc = w->alloc_align_mask, keep = w->min_align_mask;
    int64_t found = -1;
    if (!alloc && !keep && size >= 4096)
        alloc = 4095; /* page sized buffers are page aligned */
    alloc |= TLB_SIZE - 1;
    keep &= ~alloc;
    stride = (uint32_t)((alloc > keep ? alloc : keep) >> TLB_SHIFT) + 1;
    lock_acquire(&a->lock);
    if (n > p->area_slots - a->used)
        goto out;
    for (index = a->index; checked < p->area_slots;) {
        uint64_t addr = slot_addr(p->start, base + index);
        uint32_t step = stride;
        if (addr & alloc || (addr & keep) != (orig & keep)) {
            step = 1;
        } else if (!crosses(w->boundary_mask, addr, (uint64_t)n << TLB_SHIFT) && run_free(p, base + index, n)) {
            found = base + index;
            run_flip(p, base + index, n);
            a->index = index + n < p->area_slots ? index + n : 0; /* addresses advance rather than be reused */
            a->used += n;
            break;
        }
        index += step;
        if (index >= p->area_slots)
            index = 0;
        checked += step;
    }
out:
    lock_release(&a->lock);
    return found;
}

static void give_slots(struct tlb_pool *p, uint32_t first, uint32_t n)
{
    struct tlb_area *a = &p->area[first / p->area_slots];
    lock_acquire(&a->lock);
    run_flip(p, first, n);
    a->used -= n;
    lock_release(&a->lock);
}

/* ---- growing ------------------------------------------------------------------------------------------------------ */

static bool overlaps(const struct tlb_pool *a, const struct tlb_pool *b)
{
    return a->start < b->start + ((uint64_t)b->slots << TLB_SHIFT) && b->start < a->start + ((uint64_t)a->slots << TLB_SHIFT);
}

/* Give a pool its place: the first free one above the others. */
static bool pool_place(struct swiotlb *p, struct tlb_pool *q)
{
    q->start = p->next_start;
    for (int tries = 0; tries < 256; tries++, q->start += TLB_MAX_MAPPING) {
        bool taken = q->start + ((uint64_t)q->slots << TLB_SHIFT) > 1ull << MEM_PHYS_BITS;
        for (struct tlb_pool *o = p->grown; o && !taken; o = o->next)
            taken = overlaps(o, q);
        uint64_t i = 0, frames = p->mem && !taken ? frames_of(q) : 0;
        while (i < frames && !phys_mem_add(p->mem, q->start + (i << 12), q->host + (i << 12), false))
            i++;
        if (!taken && i == frames)
            return true;
        pool_withdraw(p, q, i); /* something else is there */
    }
    return false;
}

/* A further pool; the caller holds grown_lock for writing. */
static struct tlb_pool *pool_make(struct swiotlb *p, uint32_t slots, bool transient)
{
    uint64_t bytes = (((uint64_t)slots << TLB_SHIFT) + 4095) & ~4095ull;
    struct tlb_pool *q = core_alloc(&p->fail, sizeof(*q));
    char *host = q && !fail_now(&p->fail) ? aligned_alloc(4096, bytes) : NULL;
    if (host)
        memset(host, 0, bytes);
    if (!host || pool_init(q, 0, host, slots, 1, &p->fail) || !pool_place(p, q)) {
        if (host)
            pool_free(q);
        free(q);
        return NULL;
    }
    q->transient = transient;
    q->next = p->grown;
    p->grown = q;
    return q;
}

/* The worker that a full pool asked for has run by now: one more pool of the first one's size (swiotlb_dyn_alloc). */
static void run_worker(struct swiotlb *p)
{
    pthread_rwlock_wrlock(&p->grown_lock);
    if (p->grow) {
        p->grow = false;
        if (pool_make(p, p->first.slots, false))
            __atomic_fetch_add(&p->pools, 1, __ATOMIC_RELAXED);
    }
    pthread_rwlock_unlock(&p->grown_lock);
}

static struct tlb_pool *pool_of(struct swiotlb *p, uint64_t phys)
{
    if (likely(tlb_pool_has(&p->first, phys)))
        return &p->first;
    struct tlb_pool *q = p->grown;
    while (q && !tlb_pool_has(q, phys))
        q = q->next;
    return q;
}

static void read_lock(struct swiotlb *p)
{
    if (unlikely(p->dynamic))
        pthread_rwlock_rdlock(&p->grown_lock);
}

static void read_unlock(struct swiotlb *p)
{
    if (unlikely(p->dynamic))
        pthread_rwlock_unlock(&p->grown_lock);
}

static bool grown_has(struct swiotlb *p, uint64_t phys)
{
    read_lock(p);
    bool has = pool_of(p, phys) != NULL;
    read_unlock(p);
    return has;
}

/* ---- copying ------------------------------------------------------------------------------------------------------ */

static void copy(struct swiotlb *p, const struct tlb_pool *q, uint64_t orig, uint64_t addr, uint64_t size, bool to_pool)
{
    if (p->mem) {
        phys_mem_read_lock(p->mem);
        size = phys_mem_copy(p->mem, orig, q->host + (addr - q->start), size, !to_pool);
        phys_mem_read_unlock(p->mem);
    }
    __atomic_fetch_add(to_pool ? &p->bytes_in : &p->bytes_out, size, __ATOMIC_RELAXED);
}

static void pool_sync(struct swiotlb *p, uint64_t addr, uint64_t size, bool to_pool)
{
    read_lock(p);
    const struct tlb_pool *q = pool_of(p, addr);
    const struct tlb_slot *s = &q->slot[q->slot[(addr - q->start) >> TLB_SHIFT].owner];
    uint64_t at = addr - s->addr, left = at < s->size ? s->size - at : 0;
    size = size < left ? size : left; /* Linux warns once and clips */
    if (size)
        copy(p, q, s->orig + at, addr, size, to_pool);
    read_unlock(p);
}

static void pool_zero_around(struct swiotlb *p, uint64_t addr, uint64_t size, uint64_t granule_mask)
{
    uint64_t from = addr & ~granule_mask, end = addr + size, to = (end + granule_mask) & ~granule_mask;
    read_lock(p);
    struct tlb_pool *q = pool_of(p, addr);
    memset(q->host + (from - q->start), 0, addr - from);
    memset(q->host + (end - q->start), 0, to - end);
    read_unlock(p);
}

/* ---- map, unmap --------------------------------------------------------------------------------------------------- */

static int64_t search_pool(struct tlb_pool *q, const struct swiotlb_want *w, uint64_t orig, uint64_t need)
{
    uint32_t start = (thread_number() - 1) & (q->areas - 1);
    int64_t first = -1;
    for (uint32_t i = 0; i < q->areas && first < 0; i++)
        first = search_area(q, (start + i) & (q->areas - 1), w, orig, need);
    return first;
}

/* No room anywhere: ask the worker for a pool, and serve this mapping from one of exactly its size. */
static struct tlb_pool *make_transient(struct swiotlb *p, const struct swiotlb_want *w, uint64_t orig, uint64_t need,
                                       int64_t *first)
{
    p->grow = true;
    uint64_t pad = (w->min_align_mask | w->alloc_align_mask) & ~(TLB_SIZE - 1); /* room to keep the address bits */
    uint32_t slots = slots_of(need + (pad < TLB_MAX_MAPPING ? pad : TLB_MAX_MAPPING));
    struct tlb_pool *q = pool_make(p, slots, true);
    if (!q)
        return NULL;
    *first = search_pool(q, w, orig, need);
    if (*first >= 0) {
        __atomic_fetch_add(&p->transients, 1, __ATOMIC_RELAXED);
        return q;
    }
    p->grown = q->next; /* the latest */
    pool_drop(p, q);
    return NULL;
}

static struct tlb_pool *find_room(struct swiotlb *p, const struct swiotlb_want *w, uint64_t orig, uint64_t need,
                                  int64_t *first)
{
    struct tlb_pool *q = &p->first;
    do {
        *first = q->transient ? -1 : search_pool(q, w, orig, need);
        if (*first >= 0)
            return q;
        q = q == &p->first ? p->grown : q->next;
    } while (q);
    return NULL;
}

static int pool_map(struct swiotlb *p, const struct swiotlb_want *w, uint64_t orig, uint64_t size, uint64_t *out)
{
    uint64_t offset = align_offset(w, orig), need = (size + offset + w->alloc_align_mask) & ~w->alloc_align_mask;
    uint32_t pad, n = slots_of(need), data;
    int64_t first = -1;
    if (size > TLB_MAX_MAPPING || need > TLB_MAX_MAPPING || fail_now(&p->fail))
        return -ENOMEM;
    if (unlikely(p->dynamic && load_relaxed(&p->grow)))
        run_worker(p);
    read_lock(p);
    struct tlb_pool *q = find_room(p, w, orig, need, &first);
    if (unlikely(!q && p->dynamic)) {
        read_unlock(p);
        pthread_rwlock_wrlock(&p->grown_lock);
        q = make_transient(p, w, orig, need, &first); /* known to nobody else yet */
        pthread_rwlock_unlock(&p->grown_lock);
        read_lock(p);
    }
    if (!q) {
        read_unlock(p);
        return -ENOMEM;
    }
    pad = (uint32_t)(offset >> TLB_SHIFT);
    data = (uint32_t)first + pad;
    for (uint32_t i = (uint32_t)first; i < (uint32_t)first + n; i++)
        q->slot[i].owner = data;
    struct tlb_slot *s = &q->slot[data];
    s->orig = orig;
    s->addr = slot_addr(q->start, data) + (offset & (TLB_SIZE - 1));
    s->size = size;
    s->first = (uint32_t)first;
    s->slots = n;
    __atomic_fetch_add(&p->maps, 1, __ATOMIC_RELAXED);
    copy(p, q, orig, s->addr, size, true); /* for every direction: what the device leaves alone must come back unchanged */
    *out = s->addr;
    read_unlock(p);
    return 0;
}

static void transient_gone(struct swiotlb *p, struct tlb_pool *gone)
{
    pthread_rwlock_wrlock(&p->grown_lock);
    struct tlb_pool **at = &p->grown;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    pthread_rwlock_unlock(&p->grown_lock);
    pool_drop(p, gone);
}

static void pool_unmap(struct swiotlb *p, uint64_t addr, bool copy_back)
{
    read_lock(p);
    struct tlb_pool *q = pool_of(p, addr);
    const struct tlb_slot *s = &q->slot[q->slot[(addr - q->start) >> TLB_SHIFT].owner];
    if (copy_back)
        copy(p, q, s->orig, s->addr, s->size, false);
    __atomic_fetch_add(&p->unmaps, 1, __ATOMIC_RELAXED);
    give_slots(q, s->first, s->slots);
    read_unlock(p);
    if (unlikely(q->transient))
        transient_gone(p, q);
}

static const struct swiotlb_ops pool_ops = { pool_map, pool_unmap, pool_sync, pool_zero_around, grown_has };

static uint64_t pool_used(struct tlb_pool *q)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < q->areas; i++) {
        lock_acquire(&q->area[i].lock);
        n += q->area[i].used;
        lock_release(&q->area[i].lock);
    }
    return n;
}

uint64_t swiotlb_used(struct swiotlb *p)
{
    read_lock(p);
    uint64_t n = pool_used(&p->first);
    for (struct tlb_pool *q = p->grown; q; q = q->next)
        n += pool_used(q);
    read_unlock(p);
    return n;
}

uint64_t swiotlb_slots(struct swiotlb *p)
{
    read_lock(p);
    uint64_t n = p->first.slots;
    for (struct tlb_pool *q = p->grown; q; q = q->next)
        n += q->slots;
    read_unlock(p);
    return n;
}
