/* SPDX-License-Identifier: MIT */
#include "util.h"

#include <sched.h>

__thread unsigned thread_number_tls __attribute__((tls_model("initial-exec")));
static unsigned threads_seen;

unsigned thread_number_assign(void)
{
    thread_number_tls = __atomic_add_fetch(&threads_seen, 1, __ATOMIC_RELAXED);
    return thread_number_tls;
}

void lock_wait(struct lock *l)
{
    unsigned spins = 0;
    do {
        /* the holder may have lost its core: after a short spin, give ours away */
        while (load_relaxed(&l->held))
            if (++spins % 64 == 0)
                sched_yield();
    } while (__atomic_exchange_n(&l->held, 1, __ATOMIC_ACQUIRE));
}

void tally_shared(struct tally t, unsigned what, uint64_t n)
{
    __atomic_fetch_add(&t.v[what], n, __ATOMIC_RELAXED);
}
