/* SPDX-License-Identifier: MIT */
#include "domain.h"

#include <errno.h>
#include <string.h>

void log_event(struct event_log *l, uint64_t now, enum event_kind k, uint64_t a, uint64_t b, uint64_t c)
{
    lock_acquire(&l->lock);
    if (l->n == l->cap) {
        uint64_t cap = l->cap ? l->cap * 2 : 64;
        struct event *e = realloc(l->e, cap * sizeof(*e));
        if (!e) {
            lock_release(&l->lock);
            return;
        }
        l->e = e;
        l->cap = cap;
    }
    l->e[l->n++] = (struct event){ k, a, b, c, now };
    lock_release(&l->lock);
}

/* ---- units and domains -------------------------------------------------------------------------------------------- */

int iommu_unit_init(struct iommu_unit *u, uint32_t sets, uint32_t ways, bool caching_mode, struct fail_point *fail)
{
    memset(u, 0, sizeof(*u));
    u->next_did = 1;
    return iotlb_init(&u->tlb, sets, ways, caching_mode, fail);
}

void iommu_unit_destroy(struct iommu_unit *u) { iotlb_destroy(&u->tlb); }

/* The last byte of the last granule that lies below `limit` or ends there; without one, of none: 0. */
static uint64_t whole_granules(const struct iommu_domain *d, uint64_t limit)
{
    return limit < d->granule_mask ? 0 : (limit - d->granule_mask) | d->granule_mask;
}

static int domain_init(struct iommu_domain *d, const struct iommu_domain_config *c)
{
    unsigned shift = (unsigned)__builtin_ctzll(c->page_sizes);
    d->granule_shift = shift;
    d->granule_mask = (1ull << shift) - 1;
    d->lazy = c->lazy;
    d->arm = c->arm;
    d->aperture_last = whole_granules(d, c->aperture_last);
    d->counters = core_alloc(&d->fail, sizeof(*d->counters));
    if (!d->counters)
        return -ENOMEM;
    int rc = pgt_init(&d->pgt, c->page_sizes, d->aperture_last, c->arm, &d->fail);
    if (!rc) /* a granule that the aperture begins inside is not handed out */
        rc = iova_domain_init(&d->iova, shift, (c->aperture_first >> shift) + !!dom_off(d, c->aperture_first), c->ncpu,
                              &d->fail);
    if (!rc && c->lazy) {
        d->fq = core_alloc(&d->fail, c->ncpu * sizeof(*d->fq));
        rc = d->fq ? 0 : -ENOMEM;
    }
    return rc;
}

int iommu_domain_create(struct iommu_domain **out, struct iommu_unit *u, const struct iommu_domain_config *c)
{
    struct iommu_domain *d = calloc(1, sizeof(*d));
    if (!d)
        return -ENOMEM;
    int rc = domain_init(d, c);
    if (rc) {
        free(d->fq);
        iova_domain_destroy(&d->iova);
        pgt_destroy(&d->pgt);
        free(d->counters);
        free(d);
        return rc;
    }
    d->unit = u;
    d->caching_mode = u->tlb.caching_mode;
    lock_acquire(&u->lock);
    d->did = u->next_did++;
    d->next = u->domains;
    u->domains = d;
    lock_release(&u->lock);
    *out = d;
    return 0;
}

void iommu_domain_free(struct iommu_domain *d)
{
    struct iommu_unit *u = d->unit;
    lock_acquire(&u->lock);
    for (struct iommu_domain **p = &u->domains; *p; p = &(*p)->next)
        if (*p == d) {
            *p = d->next;
            break;
        }
    lock_release(&u->lock);
    iotlb_invalidate_domain(&u->tlb, d->did);
    free(d->fq);
    iova_domain_destroy(&d->iova);
    pgt_destroy(&d->pgt);
    free(d->log.e);
    free(d->counters);
    free(d);
}

/* ---- IOVA --------------------------------------------------------------------------------------------------------- */

static inline uint64_t min_nonzero(uint64_t a, uint64_t b) { return !a ? b : !b ? a : a < b ? a : b; }

void dom_attach(struct iommu_domain *d, const struct dma_device *dev)
{
    uint64_t limit = min_nonzero(dev->dma_mask, dev->bus_dma_limit);
    limit = limit < d->aperture_last ? limit : d->aperture_last;
    d->limit_pfn = whole_granules(d, limit) >> d->granule_shift;
    d->trusting = dev->flags == DMA_DEV_COHERENT;
    dom_record(d, false);
}

void dom_record(struct iommu_domain *d, bool on)
{
    lock_acquire(&d->log.lock);
    d->log.n = 0;
    store_relaxed(&d->log.on, on);
    store_relaxed(&d->plain, !on && d->trusting && d->granule_mask == 4095);
    lock_release(&d->log.lock);
}

uint64_t dom_alloc_iova(struct iommu_domain *d, struct dma_device *dev, uint64_t size)
{
    uint64_t pages = size >> d->granule_shift, low = UINT32_MAX >> d->granule_shift, pfn;
    if (likely(d->limit_pfn > low && load_relaxed(&dev->pci_32bit_workaround))) {
        pfn = iova_alloc_fast(&d->iova, pages, low, false);
        if (likely(pfn))
            goto found;
        store_relaxed(&dev->pci_32bit_workaround, 0);
    }
    pfn = iova_alloc_fast(&d->iova, pages, d->limit_pfn, true);
    if (unlikely(!pfn))
        return 0;
found:;
    struct tally t = tally_of(d->counters);
    tally(t, C_IOVA_ALLOCS, 1);
    tally(t, C_IOVA_ALLOC_BYTES, size);
    note(d, EV_ALLOC, pfn << d->granule_shift, size, 0);
    return pfn << d->granule_shift;
}

uint64_t dom_alloc_other_iova(struct iommu_domain *d, struct dma_device *dev, uint64_t size, uint64_t instead_of)
{
    uint64_t other = dom_alloc_iova(d, dev, size);
    dom_free_iova(d, instead_of, size);
    return other;
}

void dom_free_iova(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    iova_free_fast(&d->iova, iova >> d->granule_shift, size >> d->granule_shift);
    struct tally t = tally_of(d->counters);
    tally(t, C_IOVA_FREES, 1);
    tally(t, C_IOVA_FREE_BYTES, size);
    note(d, EV_FREE, iova, size, 0);
}

/* ---- map, unmap, flush -------------------------------------------------------------------------------------------- */

static inline void tally_levels(struct tally t, enum counter first, const struct pgt_delta *delta)
{
    tally(t, first, delta->set[0]);
    if (unlikely(delta->set[1] | delta->set[2])) {
        tally(t, first + 1, delta->set[1]);
        tally(t, first + 2, delta->set[2]);
    }
}

/* VT-d flushes the smallest aligned power of two of pages around a range. */
static RARE void flush_range_slow(struct iommu_domain *d, uint64_t first, uint64_t last, enum event_kind kind)
{
    uint64_t differ = (first ^ last) >> 12;
    unsigned order = differ ? 64 - (unsigned)__builtin_clzll(differ) : 0;
    uint64_t low = order >= 52 ? UINT64_MAX : (1ull << (order + 12)) - 1;
    iotlb_invalidate(&d->unit->tlb, d->did, first & ~low, last | low);
    note(d, kind, first, last, order);
}

static inline void flush_range(struct iommu_domain *d, uint64_t first, uint64_t last, enum event_kind kind)
{
    /* an empty IOTLB needs no search, but its lock: a walk that began earlier may be about to fill it */
    if (unlikely(!iotlb_empty(&d->unit->tlb) || load_relaxed(&d->log.on)))
        flush_range_slow(d, first, last, kind);
}

int dom_map(struct iommu_domain *d, struct pgt_walk *w, uint64_t iova, uint64_t phys, uint64_t size, unsigned prot)
{
    struct pgt_delta delta = { { 0, 0, 0 } };
    struct pgt_freelist freed = { NULL };
    int rc = pgt_map(&d->pgt, w, iova, phys, size, prot, &delta, &freed);
    if (unlikely(freed.head)) { /* a large leaf replaced empty tables: drop them from the walk caches first */
        iotlb_invalidate(&d->unit->tlb, d->did, iova, iova + size - 1);
        pgt_free_tables(&d->pgt, &freed);
    }
    if (unlikely(rc))
        return rc;
    tally_levels(tally_of(d->counters), C_PTE_SET, &delta);
    note(d, EV_MAP, iova, phys, size);
    return 0;
}

/* Take back what a failed vector of links has mapped: `size` bytes from the granule `start` on, rounded up. */
static void link_undo(struct iommu_domain *d, uint64_t start, uint64_t size, struct pgt_freelist *freed)
{
    struct pgt_delta undone = { { 0, 0, 0 } };
    if (!size)
        return;
    size = dom_up(d, size);
    note(d, EV_UNMAP, start, size, pgt_unmap(&d->pgt, start, size, &undone, freed));
    flush_range(d, start, start + size - 1, EV_FLUSH);
}

struct linking { struct pgt_walk w; uint64_t at, left, pages; uint32_t i; }; /* where a vector of links stands */

/* From range l.i on, whatever the ranges are like. */
static RARE int link_any(struct iommu_domain *d, uint64_t start, struct linking l, const struct phys_vec *v, uint32_t n,
                         unsigned prot, bool gapped)
{
    struct pgt_delta delta = { { l.pages, 0, 0 } };
    struct pgt_freelist freed = { NULL };
    uint64_t at = l.at, left = l.left;
    uint32_t i;
    int rc = 0;
    for (i = l.i; i < n; i++) {
        uint64_t phys = v[i].paddr.v, off = dom_off(d, phys), len = v[i].len, span = off + len;
        if (!len || len > left || (gapped && span > left)) {
            rc = !len ? -EINVAL : -ERANGE; /* Linux does not look: it would map IOVA that belongs to others */
            break;
        }
        if (!gapped && off && i) {
            rc = -EIO; /* only the first range may begin inside a granule */
            break;
        }
        rc = pgt_map(&d->pgt, &l.w, gapped ? at : at - off, phys - off, dom_up(d, span), prot, &delta, &freed);
        if (rc)
            break;
        note(d, EV_MAP, gapped ? at : at - off, phys - off, dom_up(d, span));
        at += gapped ? dom_up(d, span) : len;
        left -= gapped ? dom_up(d, span) : len;
    }
    if (rc)
        link_undo(d, start, i ? at - start : 0, &freed);
    if (freed.head) { /* large leaves replaced empty tables: drop them from the walk caches first */
        iotlb_invalidate_domain(&d->unit->tlb, d->did);
        pgt_free_tables(&d->pgt, &freed);
    }
    if (rc)
        return rc;
    struct tally t = tally_of(d->counters);
    tally_levels(t, C_PTE_SET, &delta);
    tally(t, C_LINKS, n);
    return 0;
}

/* Several 4 KiB pages in tables that exist: all, or false and none. */
static bool map_pages(struct iommu_domain *d, struct pgt_walk *w, uint64_t iova, uint64_t phys, uint64_t n, uint64_t bits)
{
    uint64_t k;
    for (k = 0; k < n; k++)
        if (unlikely(!pgt_map_page(&d->pgt, w, iova + (k << 12), phys + (k << 12), bits)))
            break;
    if (likely(k == n))
        return true;
    while (k-- > 0)
        store_relaxed(&pgt_leaf_table(&d->pgt, iova + (k << 12))->e[((iova >> 12) + k) & 511], 0);
    return false;
}

/* The common case in a loop of its own: ranges too small for large leaves, in tables that exist. */
static inline __attribute__((always_inline)) int link_pages(struct iommu_domain *d, uint64_t iova, uint64_t left,
                                                            const struct phys_vec *v, uint32_t n, unsigned prot,
                                                            bool gapped)
{
    uint64_t bits = (prot & PTE_PROT) | PTE_LEAF, gm = 4095, at = iova;
    struct pgt_walk w = { NULL, 0 };
    uint32_t i = 0;
    bool simple = d->granule_mask == gm && prot & (PROT_READ_ | PROT_WRITE_);
    for (; likely(simple) && i < n; i++) {
        uint64_t phys = v[i].paddr.v, off = phys & gm, len = v[i].len, n4k = 1;
        uint64_t page = gapped ? at : at - off;
        if (unlikely(len - 1 >= left || (!gapped && off && i)))
            break;
        if (likely(off + len - 1 <= gm)) {
            if (unlikely(!pgt_map_page(&d->pgt, &w, page, phys - off, bits)))
                break;
        } else {
            n4k = (off + len + gm) >> 12;
            if (unlikely(len >= 1u << 21 || (gapped && n4k > left >> 12) ||
                         !map_pages(d, &w, page, phys - off, n4k, bits)))
                break;
        }
        note(d, EV_MAP, page, phys - off, n4k << 12);
        at += gapped ? n4k << 12 : len;
        left -= gapped ? n4k << 12 : len;
    }
    /* the ranges so far lie side by side from the first granule on */
    uint64_t first = gapped || !n ? iova : iova - (v[0].paddr.v & gm), pages = (at - first + gm) >> 12;
    if (unlikely(i < n)) {
        uint64_t start = gapped ? iova : iova - (v[0].paddr.v & d->granule_mask);
        pages = i ? pages : 0;
        return link_any(d, start, (struct linking){ w, at, left, pages, i }, v, n, prot, gapped);
    }
    struct tally t = tally_of(d->counters);
    tally(t, C_PTE_SET, pages);
    tally(t, C_LINKS, n);
    return 0;
}

int dom_link_vec(struct iommu_domain *d, uint64_t iova, uint64_t room, const struct phys_vec *v, uint32_t n,
                 unsigned prot)
{
    return link_pages(d, iova, room, v, n, prot, false);
}

int dom_link_gapped(struct iommu_domain *d, uint64_t iova, uint64_t room, const struct phys_vec *v, uint32_t n,
                    unsigned prot)
{
    return link_pages(d, iova, room, v, n, prot, true);
}

/* Clear the entries; the tables that fell out wait in *freed for a flush. */
static RARE uint64_t unmap_entries(struct iommu_domain *d, uint64_t iova, uint64_t size, struct pgt_freelist *freed)
{
    struct pgt_delta delta = { { 0, 0, 0 } };
    uint64_t done = pgt_unmap(&d->pgt, iova, size, &delta, freed);
    tally_levels(tally_of(d->counters), C_PTE_CLEAR, &delta);
    note(d, EV_UNMAP, iova, size, done);
    return done;
}

static RARE uint64_t unmap_any(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    struct pgt_freelist freed = { NULL };
    uint64_t done = unmap_entries(d, iova, size, &freed);
    if (done) {
        flush_range(d, iova, iova + done - 1, EV_FLUSH);
        count(d->counters, C_INVAL_RANGE, 1);
        pgt_free_tables(&d->pgt, &freed);
    }
    return done;
}

uint64_t dom_unmap(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    uint64_t pages = pgt_unmap_pages(&d->pgt, iova, size);
    if (unlikely(!pages))
        return unmap_any(d, iova, size);
    note(d, EV_UNMAP, iova, size, pages << 12);
    flush_range(d, iova, iova + (pages << 12) - 1, EV_FLUSH);
    struct tally t = tally_of(d->counters);
    tally(t, C_PTE_CLEAR, pages);
    tally(t, C_INVAL_RANGE, 1);
    return pages << 12;
}

void dom_sync_flush(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    flush_range_slow(d, iova, iova + size - 1, EV_FLUSH_NP);
    count(d->counters, C_SYNC_FLUSH, 1);
}

uint64_t dom_iova_to_phys(struct iommu_domain *d, uint64_t iova)
{
    unsigned level;
    uint64_t e = pgt_lookup(&d->pgt, iova, &level);
    return e & PTE_LEAF ? (e & PTE_ADDR) + (iova & ((1ull << level_shift(level)) - 1)) : UINT64_MAX;
}

bool dom_translate(struct iommu_domain *d, uint64_t iova, struct translation *t)
{
    unsigned level;
    uint64_t e = pgt_lookup(&d->pgt, iova, &level), low = (1ull << level_shift(level)) - 1;
    t->phys = (e & PTE_ADDR) + (iova & low);
    t->left = low - (iova & low) + 1;
    t->prot = (unsigned)(e & PTE_PROT);
    return e & PTE_LEAF;
}

/* ---- flush queue -------------------------------------------------------------------------------------------------- */

static inline uint32_t fq_next(uint32_t i) { return (i + 1) % FQ_SIZE; }
static inline bool fq_full(const struct fq *q) { return fq_next(q->tail) == q->head; }

static void fq_drop(struct iommu_domain *d, struct fq *q)
{
    uint64_t finished = load_acquire(&d->flush_finish);
    while (q->head != q->tail && q->e[q->head].counter < finished) {
        struct fq_entry *e = &q->e[q->head];
        pgt_free_tables(&d->pgt, &e->freed);
        dom_free_iova(d, e->pfn << d->granule_shift, e->pages << d->granule_shift);
        q->head = fq_next(q->head);
    }
}

void dom_flush_begin(struct iommu_domain *d)
{
    __atomic_add_fetch(&d->flush_start, 1, __ATOMIC_ACQ_REL);
    iotlb_invalidate_domain(&d->unit->tlb, d->did);
    count(d->counters, C_INVAL_FULL, 1);
    note(d, EV_FLUSH_ALL, 0, UINT64_MAX, 0x34);
}

void dom_flush_end(struct iommu_domain *d) { __atomic_add_fetch(&d->flush_finish, 1, __ATOMIC_ACQ_REL); }

static RARE void fq_add(struct iommu_domain *d, uint64_t iova, uint64_t size, struct pgt_freelist freed)
{
    struct fq *q = &d->fq[(thread_number() - 1) % d->iova.ncpu];
    lock_acquire(&q->lock);
    fq_drop(d, q);
    if (fq_full(q)) {
        dom_flush_begin(d);
        dom_flush_end(d);
        fq_drop(d, q);
    }
    q->e[q->tail] = (struct fq_entry){ iova >> d->granule_shift, size >> d->granule_shift,
                                       load_acquire(&d->flush_start), freed };
    q->tail = fq_next(q->tail);
    lock_release(&q->lock);
    if (!load_relaxed(&d->fq_deadline)) {
        uint64_t unarmed = 0, at = load_relaxed(&d->unit->now_ns) + FQ_TIMEOUT_NS;
        __atomic_compare_exchange_n(&d->fq_deadline, &unarmed, at, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
}

void dom_flush_queues(struct iommu_domain *d)
{
    if (!d->fq)
        return;
    store_relaxed(&d->fq_deadline, 0);
    dom_flush_begin(d);
    dom_flush_end(d);
    for (unsigned i = 0; i < d->iova.ncpu; i++) {
        lock_acquire(&d->fq[i].lock);
        fq_drop(d, &d->fq[i]);
        lock_release(&d->fq[i].lock);
    }
}

uint64_t dom_queued(struct iommu_domain *d)
{
    uint64_t n = 0;
    for (unsigned i = 0; d->fq && i < d->iova.ncpu; i++) {
        lock_acquire(&d->fq[i].lock);
        n += (d->fq[i].tail + FQ_SIZE - d->fq[i].head) % FQ_SIZE;
        lock_release(&d->fq[i].lock);
    }
    return n;
}

uint64_t dom_unmap_free(struct iommu_domain *d, uint64_t iova, uint64_t size)
{
    if (!d->fq) {
        uint64_t done = dom_unmap(d, iova, size);
        dom_free_iova(d, iova, size);
        return done;
    }
    struct pgt_freelist freed = { NULL };
    uint64_t done = unmap_entries(d, iova, size, &freed);
    fq_add(d, iova, size, freed);
    return done;
}

void iommu_unit_advance(struct iommu_unit *u, uint64_t ns)
{
    lock_acquire(&u->lock);
    uint64_t now = u->now_ns + ns;
    store_relaxed(&u->now_ns, now);
    for (struct iommu_domain *d = u->domains; d; d = d->next) {
        uint64_t at = load_relaxed(&d->fq_deadline);
        if (at && at <= now)
            dom_flush_queues(d);
        iova_depot_trim(&d->iova, now);
    }
    lock_release(&u->lock);
}

/* ---- the device's side -------------------------------------------------------------------------------------------- */

enum { BATCH = 16 }; /* pages moved under one hold of the IOTLB's lock */

/* Move what one translation covers; returns the bytes, fewer where memory ends or the host bridge forwards nothing. */
static inline uint64_t move(struct phys_mem *m, const struct dma_device *dev, const struct xlate *x, char *mine, uint64_t n,
                            int write)
{
    if (unlikely(dev->p2p) && p2p_dropped(dev, x->phys))
        return 0;
    if (unlikely(!x->host || n > 4096 - (x->phys & 4095) || !(dev->flags & DMA_DEV_COHERENT)))
        return phys_mem_dma(m, dev, x->phys, mine, n, write);
    if (write)
        memcpy(x->host, mine, n);
    else
        memcpy(mine, x->host, n);
    return n;
}

/* Bytes are moved with the IOTLB's lock held: an invalidation that has returned has seen every access end that used what
 * it dropped, as the drain of a hardware invalidation does. */
static int translated_access(struct iommu_domain *d, struct dma_device *dev, uint64_t iova, uint64_t len, void *buf,
                             int write, struct dma_fault *f)
{
    struct phys_mem *m = dev->mem;
    struct iotlb *t = &d->unit->tlb;
    unsigned need = write ? PROT_WRITE_ : PROT_READ_;
    uint32_t reason = DMA_FAULT_NONE;
    uint64_t done = 0;
    phys_mem_read_lock(m);
    while (done < len && !reason) {
        lock_acquire(&t->lock);
        for (int i = 0; i < BATCH && done < len; i++) {
            struct xlate x;
            if (unlikely(!iotlb_translate(t, &d->pgt, d->did, iova + done, m, &x))) {
                reason = DMA_FAULT_NOT_PRESENT;
                break;
            }
            if (unlikely(!(x.prot & need))) {
                reason = write ? DMA_FAULT_WRITE : DMA_FAULT_READ;
                break;
            }
            uint64_t want = x.left < len - done ? x.left : len - done;
            uint64_t moved = move(m, dev, &x, (char *)buf + done, want, write);
            done += moved;
            if (unlikely(moved < want)) {
                reason = DMA_FAULT_BUS;
                break;
            }
        }
        lock_release(&t->lock);
    }
    phys_mem_read_unlock(m);
    if (likely(!reason))
        return 0;
    count(d->counters, C_FAULTS, 1);
    note(d, EV_FAULT, iova + done, reason, (uint64_t)write);
    return dma_fault_at(f, iova, done, reason, write);
}

/* What passes 2^64 is moved up to there. */
static RARE int access_past_top(struct iommu_domain *d, struct dma_device *dev, uint64_t iova, void *buf, int write,
                                struct dma_fault *f)
{
    uint64_t n = below_top(iova, UINT64_MAX);
    int rc = dom_bus_access(d, dev, iova, n, buf, write, f);
    if (rc)
        return rc;
    count(d->counters, C_FAULTS, 1);
    note(d, EV_FAULT, iova + n, DMA_FAULT_NOT_PRESENT, (uint64_t)write);
    return dma_fault_at(f, iova, n, DMA_FAULT_NOT_PRESENT, write);
}

int dom_bus_access(struct iommu_domain *d, struct dma_device *dev, uint64_t iova, uint64_t len, void *buf, int write,
                   struct dma_fault *f)
{
    if (unlikely(dma_range_wraps(iova, len)))
        return access_past_top(d, dev, iova, buf, write, f);
    if (likely(!dev->p2p))
        return translated_access(d, dev, iova, len, buf, write, f);
    for (uint64_t done = 0, n, phys; done < len; done += n) {
        n = p2p_route(dev, iova + done, len - done, &phys);
        char *mine = (char *)buf + done;
        if (!phys) {
            int rc = translated_access(d, dev, iova + done, n, mine, write, f);
            f->done += rc ? done : 0;
            if (rc)
                return rc;
            continue;
        }
        phys_mem_read_lock(dev->mem); /* a peer below the same switch: the IOMMU never sees it */
        uint64_t moved = phys_mem_copy(dev->mem, phys, mine, n, write);
        phys_mem_read_unlock(dev->mem);
        if (moved < n) {
            count(d->counters, C_FAULTS, 1);
            return dma_fault_at(f, iova, done + moved, DMA_FAULT_BUS, write);
        }
    }
    return 0;
}
