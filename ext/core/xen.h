/* SPDX-License-Identifier: MIT */
/* A Xen guest's view of frames (drivers/xen/swiotlb-xen.c, p2m): which machine frame backs each of its own, and which of its
 * frames, if any, each machine frame backs. Both are radix trees whose leaves are page addresses; p2m marks them in bit 0. */
#ifndef DMAPATH_XEN_H
#define DMAPATH_XEN_H

#include "mem.h"

#define XEN_FOREIGN MEM_UNCACHED /* the frame belongs to another domain */

struct xen_domain {
    struct phys_mem p2m, m2p;
    bool arm; /* no cache maintenance by hypercall: other domains' pages bounce for devices that are not coherent */
};

static inline uint64_t xen_leaf(uintptr_t leaf, uint64_t addr)
{ return leaf ? ((uint64_t)leaf & ~4095ull) | (addr & 4095) : UINT64_MAX; }

/* Machine address behind a guest's physical one; all ones: none (ballooned out). */
static inline uint64_t xen_machine(const struct xen_domain *x, uint64_t phys)
{ return xen_leaf(phys_mem_entry(&x->p2m, phys), phys); }
/* And back; all ones: the frame is none of this guest's. */
static inline uint64_t xen_phys(const struct xen_domain *x, uint64_t machine)
{ return xen_leaf(phys_mem_entry(&x->m2p, machine), machine); }

/* Does the range need a bounce buffer for what lies behind it: machine frames that do not follow each other
 * (range_straddles_page_boundary), or the architecture (xen_arch_need_swiotlb)? */
static inline bool xen_straddles(const struct xen_domain *x, uint64_t phys, uint64_t size, bool noncoherent)
{
    uint64_t first = xen_machine(x, phys & ~4095ull), pages = ((phys & 4095) + size + 4095) >> 12;
    for (uint64_t i = 0; i < pages; i++) {
        uint64_t page = (phys & ~4095ull) + (i << 12);
        if (xen_machine(x, page) != first + (i << 12))
            return true;
        if (x->arm && noncoherent && phys_mem_entry(&x->p2m, page) & XEN_FOREIGN)
            return true;
    }
    return false;
}

/* xen_biovec_phys_mergeable: struct dma_limits.mergeable */
static inline int xen_mergeable(const void *machine, phys_addr_t last, phys_addr_t next)
{
    const struct xen_domain *x = machine;
    return xen_machine(x, last.v) + 1 == xen_machine(x, next.v);
}

static inline int xen_init(struct xen_domain *x, bool arm)
{
    int rc = phys_mem_init(&x->p2m);
    x->arm = arm;
    return rc ? rc : phys_mem_init(&x->m2p);
}
static inline void xen_destroy(struct xen_domain *x)
{
    phys_mem_destroy(&x->p2m);
    phys_mem_destroy(&x->m2p);
}
static inline int xen_set(struct xen_domain *x, uint64_t phys, uint64_t machine, bool foreign)
{
    int rc = phys_mem_add(&x->p2m, phys, (void *)(uintptr_t)machine, foreign);
    if (!rc && (rc = phys_mem_add(&x->m2p, machine, (void *)(uintptr_t)phys, false)))
        phys_mem_remove(&x->p2m, &phys, 1);
    return rc;
}
static inline void xen_clear(struct xen_domain *x, uint64_t phys)
{
    uint64_t machine = xen_machine(x, phys);
    phys_mem_remove(&x->m2p, &machine, 1);
    phys_mem_remove(&x->p2m, &phys, 1);
}
#endif
