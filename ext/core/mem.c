/* SPDX-License-Identifier: MIT */
#include "mem.h"

#include <errno.h>
#include <string.h>

enum { FANOUT = 1024, TOP_SHIFT = MEM_PHYS_BITS - 10 }; /* four levels of 10 bits over 12 */

static void **slot_of(struct phys_mem *m, uint64_t phys, bool make)
{
    void **slot = &m->root;
    for (int shift = TOP_SHIFT; shift >= 12; shift -= 10) {
        if (!*slot) {
            void *t = make ? calloc(FANOUT, sizeof(void *)) : NULL;
            if (!t)
                return NULL;
            *slot = t;
        }
        slot = &((void **)*slot)[(phys >> shift) & (FANOUT - 1)];
    }
    return slot;
}

int phys_mem_add(struct phys_mem *m, uint64_t phys, void *host)
{
    if (phys >> MEM_PHYS_BITS || phys & 4095)
        return -ERANGE;
    pthread_rwlock_wrlock(&m->lock);
    void **slot = slot_of(m, phys, true);
    int rc = !slot ? -ENOMEM : *slot ? -EEXIST : 0;
    if (!rc) {
        *slot = host;
        m->frames++;
    }
    pthread_rwlock_unlock(&m->lock);
    return rc;
}

void phys_mem_remove(struct phys_mem *m, const uint64_t *phys, uint64_t n)
{
    pthread_rwlock_wrlock(&m->lock);
    for (uint64_t i = 0; i < n; i++) {
        void **slot = slot_of(m, phys[i], false);
        if (slot && *slot) {
            *slot = NULL;
            m->frames--;
        }
    }
    m->epoch++;
    pthread_rwlock_unlock(&m->lock);
}

int phys_mem_init(struct phys_mem *m)
{
    memset(m, 0, sizeof(*m));
    return -pthread_rwlock_init(&m->lock, NULL);
}

static void table_destroy(void **t, int shift)
{
    for (int i = 0; shift > 12 && i < FANOUT; i++)
        if (t[i])
            table_destroy(t[i], shift - 10);
    free(t);
}

void phys_mem_destroy(struct phys_mem *m)
{
    if (m->root)
        table_destroy(m->root, TOP_SHIFT);
    m->root = NULL;
    m->frames = 0;
    pthread_rwlock_destroy(&m->lock);
}
