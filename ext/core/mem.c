/* SPDX-License-Identifier: MIT */
#include "mem.h"

#include <errno.h>
#include <string.h>

enum { FANOUT = 1024, TOP_SHIFT = MEM_PHYS_BITS - 10 }; /* four levels of 10 bits over 12 */

static void **slot_of(void **slot, uint64_t phys, bool make)
{
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

int phys_mem_add(struct phys_mem *m, uint64_t phys, void *host, bool uncached)
{
    if (phys >> MEM_PHYS_BITS || phys & 4095 || (uintptr_t)host & 4095)
        return -ERANGE;
    pthread_rwlock_wrlock(&m->lock);
    void **slot = slot_of(&m->root, phys, true);
    int rc = !slot ? -ENOMEM : *slot ? -EEXIST : 0;
    if (!rc) {
        *slot = (char *)host + (uncached ? MEM_UNCACHED : 0);
        m->frames++;
    }
    pthread_rwlock_unlock(&m->lock);
    return rc;
}

void phys_mem_remove(struct phys_mem *m, const uint64_t *phys, uint64_t n)
{
    pthread_rwlock_wrlock(&m->lock);
    for (uint64_t i = 0; i < n; i++) {
        void **slot = slot_of(&m->root, phys[i], false);
        if (slot && *slot) {
            *slot = NULL;
            m->frames--;
        }
        slot = slot_of(&m->ram, phys[i], false);
        if (slot) {
            free(*slot);
            *slot = NULL;
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

static void table_destroy(void **t, int shift, bool leaves)
{
    for (int i = 0; i < FANOUT; i++) {
        if (t[i] && shift > 12)
            table_destroy(t[i], shift - 10, leaves);
        else if (leaves)
            free(t[i]);
    }
    free(t);
}

void phys_mem_destroy(struct phys_mem *m)
{
    if (m->root)
        table_destroy(m->root, TOP_SHIFT, false);
    if (m->ram)
        table_destroy(m->ram, TOP_SHIFT, true);
    m->root = m->ram = NULL;
    m->frames = 0;
    pthread_rwlock_destroy(&m->lock);
}

/* ---- RAM behind the caches ---------------------------------------------------------------------------------------- */

/* A cached page's CPU bytes and its RAM, or false: no memory, or RAM is what the CPU sees. RAM that nobody has written back
 * to is zero: everything the CPU wrote before is dirty. */
static bool ram_of(struct phys_mem *m, uint64_t phys, unsigned char **cpu, struct ram_page **out)
{
    uintptr_t e = phys_mem_entry(m, phys);
    if (!e || e & MEM_UNCACHED)
        return false;
    void **slot = slot_of(&m->ram, phys, true);
    if (!slot)
        return false;
    if (!*slot)
        *slot = calloc(1, sizeof(struct ram_page));
    *cpu = (unsigned char *)e;
    *out = *slot;
    return *slot != NULL;
}

uint64_t phys_mem_copy_ram(struct phys_mem *m, uint64_t phys, void *buf, uint64_t len, bool to_mem)
{
    uint64_t done = 0;
    while (done < len) {
        uint64_t at = phys + done, n = 4096 - (at & 4095);
        unsigned char *cpu, *mine = (unsigned char *)buf + done;
        struct ram_page *p;
        n = n < len - done ? n : len - done;
        lock_acquire(&m->ram_lock);
        bool cached = ram_of(m, at, &cpu, &p);
        if (cached && to_mem)
            memcpy(p->ram + (at & 4095), mine, n);
        else if (cached)
            memcpy(mine, p->ram + (at & 4095), n);
        lock_release(&m->ram_lock);
        if (!cached && phys_mem_copy(m, at, mine, n, to_mem) < n)
            break;
        done += n;
    }
    return done;
}

static void line_clean(unsigned char *cpu, struct ram_page *p, unsigned at)
{
    if (memcmp(cpu + at, p->agreed + at, CACHE_LINE)) {
        memcpy(p->ram + at, cpu + at, CACHE_LINE); /* over whatever a device wrote to the line */
        memcpy(p->agreed + at, cpu + at, CACHE_LINE);
    }
}

static void line_drop(unsigned char *cpu, struct ram_page *p, unsigned at)
{
    memcpy(cpu + at, p->ram + at, CACHE_LINE);
    memcpy(p->agreed + at, p->ram + at, CACHE_LINE);
}

/* Bytes from a page's address to where the next frame could be, by the table that has none for this one. */
static uint64_t gap_after(const struct phys_mem *m, uint64_t phys)
{
    void *const *t = m->root;
    int shift = TOP_SHIFT;
    for (; t && shift > 12; shift -= 10)
        t = t[(phys >> shift) & (FANOUT - 1)];
    uint64_t span = t ? 4096 : 1ull << (shift + 10);
    return span - (phys & (span - 1));
}

static void lines(struct phys_mem *m, uint64_t phys, uint64_t len, bool drop)
{
    if (!m || !len || phys >> MEM_PHYS_BITS)
        return;
    uint64_t last = phys + (below_top(phys, len) - 1), end = 1ull << MEM_PHYS_BITS;
    end = last < end ? last + 1 : end;
    phys_mem_read_lock(m);
    lock_acquire(&m->ram_lock);
    for (uint64_t at = phys & ~(uint64_t)(CACHE_LINE - 1), n; at < end; at += n) {
        unsigned char *cpu;
        struct ram_page *p;
        n = CACHE_LINE;
        if (!ram_of(m, at, &cpu, &p)) {
            n = gap_after(m, at);
            continue;
        }
        if (!drop || at < phys || at + CACHE_LINE > end)
            line_clean(cpu, p, at & 4095);
        if (drop)
            line_drop(cpu, p, at & 4095);
    }
    lock_release(&m->ram_lock);
    phys_mem_read_unlock(m);
}

void phys_mem_clean(struct phys_mem *m, uint64_t phys, uint64_t len) { lines(m, phys, len, false); }
void phys_mem_inval(struct phys_mem *m, uint64_t phys, uint64_t len) { lines(m, phys, len, true); }

static void evict_under(struct phys_mem *m, void **t, int shift, uint64_t phys)
{
    for (uint64_t i = 0; t && i < FANOUT; i++) {
        uint64_t here = phys | i << shift;
        if (t[i] && shift > 12)
            evict_under(m, t[i], shift - 10, here);
        else if (t[i])
            for (unsigned at = 0; at < 4096; at += CACHE_LINE) {
                unsigned char *cpu = (unsigned char *)phys_mem_entry(m, here);
                if (cpu) {
                    line_clean(cpu, t[i], at);
                    line_drop(cpu, t[i], at);
                }
            }
    }
}

void phys_mem_evict(struct phys_mem *m)
{
    phys_mem_read_lock(m);
    lock_acquire(&m->ram_lock);
    evict_under(m, m->ram, TOP_SHIFT, 0);
    lock_release(&m->ram_lock);
    phys_mem_read_unlock(m);
}
