/* SPDX-License-Identifier: MIT */
#include "util.h"

__thread unsigned thread_number __attribute__((tls_model("initial-exec")));
static unsigned threads_seen;

unsigned thread_number_assign(void)
{
    thread_number = __atomic_add_fetch(&threads_seen, 1, __ATOMIC_RELAXED);
    return thread_number - 1;
}
