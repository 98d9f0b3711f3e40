/* SPDX-License-Identifier: MIT */
/* What physical addresses stand for: page frames of 4 KiB, each at some place in this process.
 *
 * A frame's bytes in this process are what the CPU sees, through its caches. Coherent devices see the same. A device that is
 * not coherent sees RAM: for each page that it or a cache operation touched, a second copy, which differs from the CPU's in
 * lines that are dirty (the CPU wrote, nothing was written back) or stale (the device wrote, nothing was invalidated). */
#ifndef DMAPATH_MEM_H
#define DMAPATH_MEM_H

#include "dmapath/dmapath.h"
#include "util.h"

#include <pthread.h>
#include <string.h>

#define MEM_PHYS_BITS 52
#define MEM_LEAF_MASK ((4096ull << 10) - 1)
#define CACHE_LINE 64u
#define MEM_UNCACHED 1ull /* in a frame's place: the CPU reads and writes RAM itself (a BAR, coherent memory) */

/* Accesses hold the lock for reading, so that no memory leaves under a device; each removal starts a new epoch, which
 * voids host addresses that an IOTLB has remembered. */
struct phys_mem {
    void *root;
    uint64_t frames, epoch;
    pthread_rwlock_t lock;
    void *ram;              /* radix of struct ram_page */
    struct lock ram_lock;
};

/* RAM behind a page, and its last state on which CPU and RAM agreed. */
struct ram_page { unsigned char ram[4096], agreed[4096]; };

int phys_mem_init(struct phys_mem *);

/* Give frame `phys` (4 KiB aligned) the 4 KiB at host (page aligned). -EEXIST: it has a place already; -ERANGE; -ENOMEM. */
int phys_mem_add(struct phys_mem *, uint64_t phys, void *host, bool uncached);
void phys_mem_remove(struct phys_mem *, const uint64_t *phys, uint64_t n);
void phys_mem_destroy(struct phys_mem *);

/* The table of the 4 MiB around an address, or NULL. */
static inline void *const *phys_mem_leaf(const struct phys_mem *m, uint64_t phys)
{
    if (phys >> MEM_PHYS_BITS)
        return NULL;
    void *const *t = m->root;
    for (int shift = MEM_PHYS_BITS - 10; t && shift > 12; shift -= 10)
        t = t[(phys >> shift) & 1023];
    return t;
}
static inline uintptr_t phys_mem_entry(const struct phys_mem *m, uint64_t phys)
{
    void *const *leaf = phys_mem_leaf(m, phys);
    return leaf ? (uintptr_t)leaf[(phys >> 12) & 1023] : 0;
}
/* Host address of a byte, or NULL where there is no memory; under the read lock. */
static inline void *phys_mem_host(const struct phys_mem *m, uint64_t phys)
{
    uintptr_t e = phys_mem_entry(m, phys) & ~(uintptr_t)MEM_UNCACHED;
    return e ? (char *)e + (phys & 4095) : NULL;
}

/* Bytes from phys on, at most len, that lie side by side in this process too, and where; 0: there is no memory. Under the
 * read lock. */
static inline uint64_t phys_mem_run(const struct phys_mem *m, uint64_t phys, uint64_t len, char **host)
{
    uint64_t n = 4096 - (phys & 4095);
    *host = (char *)phys_mem_host(m, phys);
    if (!*host)
        return 0;
    while (n < len) {
        void *const *leaf = phys_mem_leaf(m, phys + n);
        if (!leaf)
            break;
        uint64_t i = ((phys + n) >> 12) & 1023;
        for (; i < 1024 && n < len; i++, n += 4096)
            if (((uintptr_t)leaf[i] & ~(uintptr_t)MEM_UNCACHED) != (uintptr_t)*host + n)
                return n;
    }
    return n < len ? n : len;
}

/* Copy between a buffer and physical memory as the CPU or a coherent device does, under the read lock; returns bytes
 * moved, fewer where memory ends. */
static inline uint64_t phys_mem_copy(const struct phys_mem *m, uint64_t phys, void *buf, uint64_t len, bool to_mem)
{
    uint64_t done = 0;
    while (done < len) {
        char *host, *mine = (char *)buf + done;
        uint64_t n = phys_mem_run(m, phys + done, len - done, &host);
        if (!n)
            break;
        if (to_mem)
            memcpy(host, mine, n);
        else
            memcpy(mine, host, n);
        done += n;
    }
    return done;
}
/* The same for a device whose accesses pass the caches by. */
uint64_t phys_mem_copy_ram(struct phys_mem *, uint64_t phys, void *buf, uint64_t len, bool to_mem);
/* As the device asks for it. */
static inline uint64_t phys_mem_dma(struct phys_mem *m, const struct dma_device *dev, uint64_t phys, void *buf, uint64_t len,
                                    bool to_mem)
{
    return dev->flags & DMA_DEV_COHERENT ? phys_mem_copy(m, phys, buf, len, to_mem)
                                         : phys_mem_copy_ram(m, phys, buf, len, to_mem);
}
/* Cache maintenance by line (dcache_clean_poc, dcache_inval_poc): write dirty lines of the range back to RAM; or let the
 * CPU see RAM, where a line that the range covers only in part is written back first. m may be NULL. */
void phys_mem_clean(struct phys_mem *m, uint64_t phys, uint64_t len);
void phys_mem_inval(struct phys_mem *m, uint64_t phys, uint64_t len);
/* What caches may do at any time: every dirty line goes to RAM, every other is dropped. */
void phys_mem_evict(struct phys_mem *m);

static inline void phys_mem_read_lock(struct phys_mem *m) { pthread_rwlock_rdlock(&m->lock); }
static inline void phys_mem_read_unlock(struct phys_mem *m) { pthread_rwlock_unlock(&m->lock); }

/* ---- peers: which part of an access leaves the fabric for the host ------------------------------------------------- */

/* Bytes from addr on that go one way. *phys: where in a peer's memory they land, or 0 when they go up to the host. */
static inline uint64_t p2p_route(const struct dma_device *dev, uint64_t addr, uint64_t len, uint64_t *phys)
{
    *phys = 0;
    const struct dma_p2p_range *r = dma_p2p_peer(dev, dma_addr(addr));
    if (r) {
        *phys = addr - r->bus_offset;
        uint64_t left = r->start.v + r->size - *phys;
        return len < left ? len : left;
    }
    for (uint32_t i = 0; i < dev->p2p->nr; i++) {
        uint64_t to = dev->p2p->ranges[i].start.v + dev->p2p->ranges[i].bus_offset - addr;
        if (dev->p2p->ranges[i].type == DMA_P2P_BUS_ADDR && to < len)
            len = to;
    }
    return len;
}
/* The host bridge drops what it must not forward to a peer. */
static inline bool p2p_dropped(const struct dma_device *dev, uint64_t phys)
{
    const struct dma_p2p_range *r = dma_p2p_find(dev, phys_addr(phys));
    return r && r->type == DMA_P2P_NOT_SUPPORTED;
}
#endif
