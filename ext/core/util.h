/* SPDX-License-Identifier: MIT */
/* Small tools of the core: a spinlock, relaxed loads and stores, counters, an allocation that can be made to fail. */
#ifndef DMAPATH_UTIL_H
#define DMAPATH_UTIL_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

struct lock { uint32_t held; };

static inline void lock_acquire(struct lock *l)
{
    unsigned spins = 0;
    while (unlikely(__atomic_exchange_n(&l->held, 1, __ATOMIC_ACQUIRE))) {
        /* the holder may have lost its core: after a short spin, give ours away */
        while (load_relaxed(&l->held))
            if (++spins % 64 == 0)
                sched_yield();
    }
}
static inline void lock_release(struct lock *l) { store_release(&l->held, 0); }

/* The nth allocation from now fails (1 = the next); 0: none does. */
struct fail_point { int64_t nth; };

static inline bool fail_now(struct fail_point *f)
{
    if (likely(!load_relaxed(&f->nth)))
        return false;
    return __atomic_sub_fetch(&f->nth, 1, __ATOMIC_RELAXED) == 0;
}
static inline void *core_alloc(struct fail_point *f, size_t size)
{
    return fail_now(f) ? NULL : calloc(1, size);
}

/* A number of this thread, dense from 0 in order of first use: the simulated CPU is this number modulo the CPUs. */
extern __thread unsigned thread_number __attribute__((tls_model("initial-exec")));
unsigned thread_number_assign(void);
static inline unsigned thread_index(void)
{
    unsigned n = thread_number; /* 0: not yet given; stored plus one */
    return likely(n) ? n - 1 : thread_number_assign();
}

/* Exact counts without a locked instruction: each of the first CELLS-1 threads has a cell of its own, later threads
 * share the last one and pay for an atomic add. */
enum { CELLS = 64 };
enum counter {
    C_IOVA_ALLOCS, C_IOVA_FREES, C_IOVA_ALLOC_BYTES, C_IOVA_FREE_BYTES,
    C_LINKS, C_SYNCS, C_UNLINKS, C_MAPS, C_UNMAPS, C_SG_MAPS, C_SG_UNMAPS,
    C_PTE_SET, C_PTE_CLEAR = C_PTE_SET + 3, /* by level: 4K, 2M, 1G */
    C_INVAL_RANGE = C_PTE_CLEAR + 3, C_INVAL_FULL, C_SYNC_FLUSH,
    C_CACHE_CLEAN, C_CACHE_INVAL, C_BARRIERS,
    C_FAULTS, C_COUNT
};
struct counters { struct { uint64_t v[C_COUNT]; uint64_t pad[7 - (C_COUNT - 1) % 8]; } cell[CELLS]; };

static inline void count(struct counters *c, enum counter what, uint64_t n)
{
    unsigned t = thread_index();
    if (likely(t < CELLS - 1)) {
        uint64_t *p = &c->cell[t].v[what];
        store_relaxed(p, load_relaxed(p) + n);
    } else {
        __atomic_fetch_add(&c->cell[CELLS - 1].v[what], n, __ATOMIC_RELAXED);
    }
}
static inline uint64_t counter_read(const struct counters *c, unsigned what)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < CELLS; i++)
        sum += load_relaxed(&c->cell[i].v[what]);
    return sum;
}

static inline unsigned order_base_2(uint64_t n) { return n <= 1 ? 0 : 64 - (unsigned)__builtin_clzll(n - 1); }
#endif
