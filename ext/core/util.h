/* SPDX-License-Identifier: MIT */
/* Small tools of the core: a spinlock, relaxed loads and stores, counters, an allocation that can be made to fail. */
#ifndef DMAPATH_UTIL_H
#define DMAPATH_UTIL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define RARE __attribute__((cold, noinline)) /* keeps a rare path's registers out of the common one */
#define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

static inline void add_atomic(uint64_t *what, uint64_t n) { __atomic_fetch_add(what, n, __ATOMIC_RELAXED); }

struct lock { uint32_t held; };

RARE void lock_wait(struct lock *);
static inline void lock_acquire(struct lock *l)
{
    if (unlikely(__atomic_exchange_n(&l->held, 1, __ATOMIC_ACQUIRE)))
        lock_wait(l);
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

/* Threads are numbered from 1 in order of first use; thread n runs on simulated CPU n - 1 modulo the CPUs. */
extern __thread unsigned thread_number_tls __attribute__((tls_model("initial-exec")));
RARE unsigned thread_number_assign(void);
static inline unsigned thread_number(void)
{
    unsigned n = thread_number_tls; /* 0: not given yet */
    return likely(n) ? n : thread_number_assign();
}

/* Exact counts without a locked instruction: threads 1 to CELLS - 1 have a cell each; later ones share cell 0 and pay
 * for an atomic add. */
enum { CELLS = 64 };
enum counter {
    C_IOVA_ALLOCS, C_IOVA_FREES, C_IOVA_ALLOC_BYTES, C_IOVA_FREE_BYTES,
    C_LINKS, C_SYNCS, C_UNLINKS, C_MAPS, C_UNMAPS, C_SG_MAPS, C_SG_UNMAPS,
    C_PTE_SET, C_PTE_CLEAR = C_PTE_SET + 3, /* by level: 4K, 2M, 1G */
    C_INVAL_RANGE = C_PTE_CLEAR + 3, C_INVAL_FULL, C_SYNC_FLUSH,
    C_CACHE_CLEAN, C_CACHE_INVAL, C_BARRIERS,
    C_FAULTS, C_BOUNCES, C_UNBOUNCES, C_BOUNCED_BYTES, C_COUNT
};
struct counters { struct { uint64_t v[32]; } cell[CELLS]; };
_Static_assert(C_COUNT <= 32, "a cell holds every counter");

/* Where this thread counts; `own`: nobody else writes there. */
struct tally { uint64_t *v; bool own; };
static inline struct tally tally_of(struct counters *c)
{
    unsigned n = thread_number();
    return likely(n < CELLS) ? (struct tally){ c->cell[n].v, true } : (struct tally){ c->cell[0].v, false };
}
RARE void tally_shared(struct tally, unsigned what, uint64_t n);
static inline void tally(struct tally t, unsigned what, uint64_t n)
{
    if (likely(t.own))
        store_relaxed(&t.v[what], load_relaxed(&t.v[what]) + n);
    else
        tally_shared(t, what, n);
}
static inline void count(struct counters *c, unsigned what, uint64_t n) { tally(tally_of(c), what, n); }
static inline uint64_t counter_read(const struct counters *c, unsigned what)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < CELLS; i++)
        sum += load_relaxed(&c->cell[i].v[what]);
    return sum;
}

/* Bytes from `first` on that lie below 2^64, at most `size`. */
static inline uint64_t below_top(uint64_t first, uint64_t size) { return first && size > -first ? -first : size; }

static inline unsigned order_base_2(uint64_t n) { return n <= 1 ? 0 : 64 - (unsigned)__builtin_clzll(n - 1); }
#endif
