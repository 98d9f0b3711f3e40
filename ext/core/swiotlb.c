/* SPDX-License-Identifier: MIT */
#include "swiotlb.h"

#include <errno.h>

static inline uint32_t slots_of(uint64_t bytes) { return (uint32_t)((bytes + TLB_SIZE - 1) >> TLB_SHIFT); }
static inline uint32_t in_segment(uint32_t i) { return i & (TLB_SEGMENT - 1); }
static inline uint64_t slot_addr(uint64_t start, uint32_t i) { return start + ((uint64_t)i << TLB_SHIFT); }

static const struct swiotlb_ops pool_ops;

int swiotlb_init(struct swiotlb *p, uint64_t start, char *host, uint32_t slots, uint32_t areas, bool force)
{
    memset(p, 0, sizeof(*p));
    p->start = start;
    p->host = host;
    p->slots = slots;
    p->areas = areas;
    p->area_slots = slots / areas;
    p->force = force;
    p->ops = &pool_ops;
    p->slot = core_alloc(&p->fail, slots * sizeof(*p->slot));
    p->area = core_alloc(&p->fail, areas * sizeof(*p->area));
    p->busy = core_alloc(&p->fail, slots / 8);
    if (p->slot && p->area && p->busy)
        return 0;
    swiotlb_destroy(p);
    return -ENOMEM;
}

void swiotlb_destroy(struct swiotlb *p)
{
    free(p->slot);
    free(p->area);
    free(p->busy);
    p->slot = NULL;
    p->area = NULL;
    p->busy = NULL;
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
static inline bool run_free(const struct swiotlb *p, uint32_t i, uint32_t n)
{
    uint32_t k;
    if (in_segment(i) + n > TLB_SEGMENT)
        return false;
    for (; n; i += k, n -= k)
        if (p->busy[i >> 6] & run_bits(i, n, &k))
            return false;
    return true;
}

static inline void run_flip(struct swiotlb *p, uint32_t i, uint32_t n)
{
    uint32_t k;
    for (; n; i += k, n -= k)
        p->busy[i >> 6] ^= run_bits(i, n, &k);
}

/* A run of n slots in one area, or -1. */
static int64_t search_area(struct swiotlb *p, uint32_t which, const struct swiotlb_want *w, uint64_t orig, uint64_t size)
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

static void give_slots(struct swiotlb *p, uint32_t first, uint32_t n)
{
    struct tlb_area *a = &p->area[first / p->area_slots];
    lock_acquire(&a->lock);
    run_flip(p, first, n);
    a->used -= n;
    lock_release(&a->lock);
}

/* ---- copying ------------------------------------------------------------------------------------------------------ */

static void copy(struct swiotlb *p, uint64_t orig, uint64_t addr, uint64_t size, bool to_pool)
{
    if (p->mem) {
        phys_mem_read_lock(p->mem);
        size = phys_mem_copy(p->mem, orig, p->host + (addr - p->start), size, !to_pool);
        phys_mem_read_unlock(p->mem);
    }
    __atomic_fetch_add(to_pool ? &p->bytes_in : &p->bytes_out, size, __ATOMIC_RELAXED);
}

static void pool_sync(struct swiotlb *p, uint64_t addr, uint64_t size, bool to_pool)
{
    const struct tlb_slot *s = &p->slot[p->slot[(addr - p->start) >> TLB_SHIFT].owner];
    uint64_t at = addr - s->addr, left = at < s->size ? s->size - at : 0;
    size = size < left ? size : left; /* Linux warns once and clips */
    if (size)
        copy(p, s->orig + at, addr, size, to_pool);
}

/* ---- map, unmap --------------------------------------------------------------------------------------------------- */

static int pool_map(struct swiotlb *p, const struct swiotlb_want *w, uint64_t orig, uint64_t size, uint64_t *out)
{
    uint64_t offset = align_offset(w, orig), need = (size + offset + w->alloc_align_mask) & ~w->alloc_align_mask;
    uint32_t start = (thread_number() - 1) & (p->areas - 1), pad, n = slots_of(need), data;
    int64_t first = -1;
    if (need > TLB_MAX_MAPPING || fail_now(&p->fail))
        return -ENOMEM;
    for (uint32_t i = 0; i < p->areas && first < 0; i++)
        first = search_area(p, (start + i) & (p->areas - 1), w, orig, need);
    if (first < 0)
        return -ENOMEM;
    pad = (uint32_t)(offset >> TLB_SHIFT);
    data = (uint32_t)first + pad;
    for (uint32_t i = (uint32_t)first; i < (uint32_t)first + n; i++)
        p->slot[i].owner = data;
    struct tlb_slot *s = &p->slot[data];
    s->orig = orig;
    s->addr = slot_addr(p->start, data) + (offset & (TLB_SIZE - 1));
    s->size = size;
    s->first = (uint32_t)first;
    s->slots = n;
    __atomic_fetch_add(&p->maps, 1, __ATOMIC_RELAXED);
    copy(p, orig, s->addr, size, true); /* for every direction: what the device leaves alone must come back unchanged */
    *out = s->addr;
    return 0;
}

static void pool_unmap(struct swiotlb *p, uint64_t addr, bool copy_back)
{
    const struct tlb_slot *s = &p->slot[p->slot[(addr - p->start) >> TLB_SHIFT].owner];
    if (copy_back)
        copy(p, s->orig, s->addr, s->size, false);
    __atomic_fetch_add(&p->unmaps, 1, __ATOMIC_RELAXED);
    give_slots(p, s->first, s->slots);
}

static const struct swiotlb_ops pool_ops = { pool_map, pool_unmap, pool_sync };

uint64_t swiotlb_used(struct swiotlb *p)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < p->areas; i++) {
        lock_acquire(&p->area[i].lock);
        n += p->area[i].used;
        lock_release(&p->area[i].lock);
    }
    return n;
}
