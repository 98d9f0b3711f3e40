/* SPDX-License-Identifier: MIT */
/* What physical addresses stand for: page frames of 4 KiB, each at some place in this process. */
#ifndef DMAPATH_MEM_H
#define DMAPATH_MEM_H

#include "util.h"

#include <pthread.h>
#include <string.h>

#define MEM_PHYS_BITS 52

/* Accesses hold the lock for reading, so that no memory leaves under a device; each removal starts a new epoch, which
 * voids host addresses that an IOTLB has remembered. */
struct phys_mem { void *root; uint64_t frames, epoch; pthread_rwlock_t lock; };

int phys_mem_init(struct phys_mem *);

/* Give frame `phys` (4 KiB aligned) the 4 KiB at host. -EEXIST: it has a place already; -ERANGE; -ENOMEM. */
int phys_mem_add(struct phys_mem *, uint64_t phys, void *host);
void phys_mem_remove(struct phys_mem *, const uint64_t *phys, uint64_t n);
void phys_mem_destroy(struct phys_mem *);

/* Host address of a byte, or NULL where there is no memory; under the read lock. */
static inline void *phys_mem_host(const struct phys_mem *m, uint64_t phys)
{
    if (phys >> MEM_PHYS_BITS)
        return NULL;
    void *const *t = m->root;
    for (int shift = MEM_PHYS_BITS - 10; t && shift >= 12; shift -= 10)
        t = t[(phys >> shift) & 1023];
    return t ? (char *)t + (phys & 4095) : NULL;
}

/* Copy between a buffer and physical memory, under the read lock; returns bytes moved, fewer where memory ends. */
static inline uint64_t phys_mem_copy(const struct phys_mem *m, uint64_t phys, void *buf, uint64_t len, bool to_mem)
{
    uint64_t done = 0;
    while (done < len) {
        uint64_t n = 4096 - ((phys + done) & 4095);
        char *host = (char *)phys_mem_host(m, phys + done), *mine = (char *)buf + done;
        if (!host)
            break;
        n = n < len - done ? n : len - done;
        if (to_mem)
            memcpy(host, mine, n);
        else
            memcpy(mine, host, n);
        done += n;
    }
    return done;
}
static inline void phys_mem_read_lock(struct phys_mem *m) { pthread_rwlock_rdlock(&m->lock); }
static inline void phys_mem_read_unlock(struct phys_mem *m) { pthread_rwlock_unlock(&m->lock); }
#endif
