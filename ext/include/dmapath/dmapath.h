/* SPDX-License-Identifier: MIT
 *
 * dmapath.h: the ABI.  Types, the ops table a backend fills in, the inline calls a driver makes, and the table through
 * which the wrapper itself (requests in, segments out) is reached.  Include it, link nothing.
 *
 * Rules that hold for every function here:
 *   - callable without the Python GIL, from any thread; calls on ONE dma_iova_state or dma_map_state are serialised by
 *     its owner, everything else may run at the same time;
 *   - returns >= 0 or -errno; a call that fails leaves nothing mapped;
 *   - sizes and offsets are bytes.
 */
#ifndef DMAPATH_H
#define DMAPATH_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DMAPATH_ABI 1u

/* Three kinds of address. Each is a type of its own, so the compiler refuses one for another, and any for a length. */
typedef struct { uint64_t v; } phys_addr_t; /* what the memory controller sees */
typedef struct { uint64_t v; } dma_addr_t;  /* what a device is told */
typedef struct { uint64_t v; } iova_t;      /* what an IOMMU's allocator and page table are keyed by */

static inline phys_addr_t phys_addr(uint64_t v) { phys_addr_t a = { v }; return a; }
static inline dma_addr_t dma_addr(uint64_t v) { dma_addr_t a = { v }; return a; }
static inline iova_t iova_addr(uint64_t v) { iova_t a = { v }; return a; }

/* A range is its first byte and its size: one that ends at 2^64 has no end that 64 bits hold. Does it pass that? */
static inline bool dma_range_wraps(uint64_t first, uint64_t size) { return size && first + (size - 1) < first; }

#define DMA_MAPPING_ERROR_V UINT64_MAX /* the value of a dma_addr_t that stands for "not mapped" */

enum dma_data_direction { DMA_BIDIRECTIONAL = 0, DMA_TO_DEVICE = 1, DMA_FROM_DEVICE = 2, DMA_NONE = 3 };

/* Attribute bits, with Linux's numbers. */
#define DMA_ATTR_WEAK_ORDERING    (1ul << 1)
#define DMA_ATTR_WRITE_COMBINE    (1ul << 2)
#define DMA_ATTR_SKIP_CPU_SYNC    (1ul << 5)
#define DMA_ATTR_NO_WARN          (1ul << 8)
#define DMA_ATTR_PRIVILEGED       (1ul << 9)
#define DMA_ATTR_MMIO             (1ul << 10)
#define DMA_ATTR_REQUIRE_COHERENT (1ul << 12)

struct phys_vec { phys_addr_t paddr; uint64_t len; };
struct dma_seg { dma_addr_t addr; uint64_t len; };
/* What some hardware wants to be told beside an address: the key of the registration it lies in, for the device's own work
 * requests and for a remote side's. 0 where addresses suffice. */
struct dma_keys { uint32_t lkey, rkey; };

/* The two-step API's state: owned by the caller, 16 bytes, no allocation behind it. */
struct dma_iova_state { dma_addr_t addr; uint64_t __size; };
#define DMA_IOVA_USE_SWIOTLB (1ull << 63)

static inline uint64_t dma_iova_size(const struct dma_iova_state *s) { return s->__size & ~DMA_IOVA_USE_SWIOTLB; }
static inline bool dma_use_iova(const struct dma_iova_state *s) { return s->__size != 0; }

/* The hardware's limits, stated once by the driver. Masks are inclusive, as in Linux's queue_limits. */
struct dma_limits {
    uint32_t max_segments;
    uint32_t dma_alignment;     /* mask of address and length bits that must be 0 */
    uint64_t max_segment_size;  /* bytes; never 0 */
    uint64_t seg_boundary_mask;
    uint64_t virt_boundary;     /* mask; 0: the device takes gaps (SGL), 0xfff: it does not (PRP) */
    /* May memory at `next` join a run whose last byte is `last`, which it touches? NULL: always. Front ends ask before they
     * merge (biovec_phys_mergeable): under Xen neighbours in the guest's memory need not be neighbours on the bus. */
    int (*mergeable)(const void *machine, phys_addr_t last, phys_addr_t next);
    const void *machine;
};

/* Bytes at `addr` that one segment may hold: all `len` (not 0) of them, or as many as end where the device takes a cut, which
 * keeps dma_alignment and virt_boundary. 0: there is no such place. The one home of this rule: front ends cut vectors by it, the
 * wrapper cuts segments by it. */
static inline uint64_t dma_segment_room(const struct dma_limits *l, uint64_t addr, uint64_t len)
{
    uint64_t last = l->seg_boundary_mask - (addr & l->seg_boundary_mask), keep = l->dma_alignment | l->virt_boundary, end;
    if (last > l->max_segment_size - 1)
        last = l->max_segment_size - 1;
    if (len - 1 <= last)
        return len;
    end = (addr + last + 1) & ~keep; /* no overflow: addr + len is further */
    return end > addr ? end - addr : 0;
}

enum {
    DMA_DEV_COHERENT = 1u << 0,
    DMA_DEV_UNTRUSTED = 1u << 1,
    DMA_DEV_QUIRKS = 1u << 2, /* also reproduce what looks like a defect in Linux (KERNEL marks) */
};

/* How a device reaches a peer's memory (enum pci_p2pdma_map_type), worked out once for each of the machine's BARs. */
enum dma_p2p_type { DMA_P2P_NONE = 1, DMA_P2P_NOT_SUPPORTED = 2, DMA_P2P_BUS_ADDR = 3, DMA_P2P_THRU_HOST_BRIDGE = 4 };
struct dma_p2p_range { phys_addr_t start; uint64_t size, bus_offset; uint32_t type, reserved; };
struct dma_p2p { uint32_t nr, reserved; struct dma_p2p_range ranges[]; }; /* by start, disjoint */

struct dma_range_map { phys_addr_t cpu_start; dma_addr_t dma_start; uint64_t size; };
struct dma_ops;
struct dma_bus_ops;
struct phys_mem;
struct swiotlb;

struct dma_device {
    const struct dma_ops *ops;
    void *priv;                     /* the backend's own */
    const struct dma_bus_ops *bus;  /* the device's side; NULL: no simulated device can reach memory */
    struct phys_mem *mem;           /* what physical addresses stand for; NULL: addresses only */
    uint64_t dma_mask, bus_dma_limit;
    uint64_t min_align_mask;
    uint32_t flags;
    uint32_t pci_32bit_workaround;  /* 1: try below 4 GiB first; cleared for good at the first failure */
    struct dma_limits limits;       /* of the block or RDMA front end */
    uint64_t sg_max_segment_size;   /* dma_get_max_seg_size(): 64 KiB unless the driver says otherwise */
    const struct dma_range_map *ranges; /* bus offsets of the direct path, nr_ranges of them; none: identity */
    uint32_t nr_ranges;
    uint32_t bounced;               /* atomic; 1: it has bounced once, so its addresses must be kept and synced from now on */
    struct swiotlb *swiotlb;        /* where it bounces; NULL: nowhere */
    const struct dma_p2p *p2p;      /* the machine's peer-to-peer memory as this device reaches it; NULL: there is none */
    void *tap;                      /* who watches the calls (dmapath.tap); NULL: nobody */
    struct dma_limits uncut;        /* limits without max_segment_size and seg_boundary_mask: for vectors that are cut later */
    uint64_t reach;                 /* greatest address that the device and its bus can name */
    uint32_t sg_max_segments;       /* of a region (DMA_RQ_SG); UINT32_MAX unless the driver says otherwise */
};

static inline bool dma_has_bounced(const struct dma_device *d) { return __atomic_load_n(&d->bounced, __ATOMIC_RELAXED) != 0; }

/* The peer-to-peer range that holds an address, or the first behind it (*inside tells); NULL: none. */
static inline const struct dma_p2p_range *dma_p2p_at(const struct dma_p2p *t, phys_addr_t p, int *inside)
{
    uint32_t lo = 0, hi = t->nr;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (t->ranges[mid].start.v + (t->ranges[mid].size - 1) < p.v)
            lo = mid + 1;
        else
            hi = mid;
    }
    *inside = lo < t->nr && t->ranges[lo].start.v <= p.v;
    return lo < t->nr ? &t->ranges[lo] : NULL;
}
static inline const struct dma_p2p_range *dma_p2p_find(const struct dma_device *d, phys_addr_t p)
{
    int inside = 0;
    const struct dma_p2p_range *r = d->p2p ? dma_p2p_at(d->p2p, p, &inside) : NULL;
    return inside ? r : NULL;
}
/* What a look-up's answer says of an address: its kind (NULL: memory of the host's), and where it is on the bus. */
static inline uint32_t dma_p2p_kind(const struct dma_p2p_range *r) { return r ? r->type : (uint32_t)DMA_P2P_NONE; }
static inline dma_addr_t dma_p2p_bus(const struct dma_p2p_range *r, phys_addr_t p) { return dma_addr(p.v + r->bus_offset); }
/* The peer that a bus address goes to without the host: a range of type BUS_ADDR, or NULL. No IOVA is ever such an address,
 * since an IOMMU's domains reserve the host bridge's windows. */
static inline const struct dma_p2p_range *dma_p2p_peer(const struct dma_device *d, dma_addr_t a)
{
    for (uint32_t i = 0; d->p2p && i < d->p2p->nr; i++) {
        const struct dma_p2p_range *r = &d->p2p->ranges[i];
        if (r->type == DMA_P2P_BUS_ADDR && a.v - r->bus_offset - r->start.v < r->size)
            return r;
    }
    return NULL;
}

/* What a backend fills in. Required: abi, size, name, map_phys, unmap_phys. The rest may be NULL: dma_ops_init() puts
 * a generic form there, so that a hot path never tests. New members are only ever appended. */
struct dma_ops {
    uint32_t abi, size; /* DMAPATH_ABI and sizeof(struct dma_ops) as the backend was compiled */
    const char *name;

    int (*map_phys)(struct dma_device *, phys_addr_t, uint64_t size, enum dma_data_direction, unsigned long attrs,
                    dma_addr_t *out);
    int (*unmap_phys)(struct dma_device *, dma_addr_t, uint64_t size, enum dma_data_direction, unsigned long attrs);

    /* 1: a range of IOVA is reserved and the state filled; 0: use map_phys (state zeroed) */
    int (*iova_try_alloc)(struct dma_device *, struct dma_iova_state *, phys_addr_t, uint64_t size);
    /* -EXDEV from this or its two kin: the memory cannot lie beside other memory here; the wrapper then maps range by range */
    int (*iova_link)(struct dma_device *, struct dma_iova_state *, phys_addr_t, uint64_t offset, uint64_t size,
                     enum dma_data_direction, unsigned long attrs);
    /* n links side by side from byte `offset` on, in one walk; all or nothing */
    int (*iova_link_vec)(struct dma_device *, struct dma_iova_state *, const struct phys_vec *, uint32_t n,
                         uint64_t offset, enum dma_data_direction, unsigned long attrs);
    /* n links, each at the next free granule with its own in-page offset; `offset` is granule aligned; all or nothing */
    int (*iova_link_gapped)(struct dma_device *, struct dma_iova_state *, const struct phys_vec *, uint32_t n,
                            uint64_t offset, enum dma_data_direction, unsigned long attrs);
    int (*iova_sync)(struct dma_device *, struct dma_iova_state *, uint64_t offset, uint64_t size);
    /* attrs as at link; a range of links that differ in MMIO alone may be undone at once without it */
    int (*iova_unlink)(struct dma_device *, struct dma_iova_state *, uint64_t offset, uint64_t size,
                       enum dma_data_direction, unsigned long attrs);
    int (*iova_free)(struct dma_device *, struct dma_iova_state *);

    /* all or nothing; returns segments written, at most n */
    int (*map_sg)(struct dma_device *, const struct phys_vec *, uint32_t n, enum dma_data_direction,
                  unsigned long attrs, struct dma_seg *out);
    int (*unmap_sg)(struct dma_device *, const struct dma_seg *, uint32_t nents, enum dma_data_direction,
                    unsigned long attrs);
    int (*sync_for_cpu)(struct dma_device *, dma_addr_t, uint64_t size, enum dma_data_direction);
    int (*sync_for_device)(struct dma_device *, dma_addr_t, uint64_t size, enum dma_data_direction);
    uint64_t (*merge_boundary)(struct dma_device *); /* granule - 1, or 0 where ranges never join */
    int (*need_unmap)(struct dma_device *);          /* 0: the caller may forget its addresses */
    int (*is_bounced)(struct dma_device *, dma_addr_t); /* 1: the address is that of a bounce buffer */
    /* keys of [addr, addr + size) of a live mapping; -ENOENT: it is none, or not within one registration */
    int (*keys_of)(struct dma_device *, dma_addr_t, uint64_t size, struct dma_keys *);
};

/* Why a device's access failed. */
enum dma_fault_reason { DMA_FAULT_NONE, DMA_FAULT_NOT_PRESENT, DMA_FAULT_READ, DMA_FAULT_WRITE, DMA_FAULT_BUS };
struct dma_fault { dma_addr_t addr; uint64_t done; uint32_t reason; uint32_t write; };

/* The device's side: simulated devices see only this, drivers see only dma_ops. */
struct dma_bus_ops {
    /* move len bytes; write: device -> memory. On -EFAULT, *fault says where, why and how many bytes had moved. */
    int (*access)(struct dma_device *, dma_addr_t, uint64_t len, void *buf, int write, struct dma_fault *fault);
};

/* Say where and why an access failed, `done` bytes into it; -EFAULT. */
static inline int dma_fault_at(struct dma_fault *f, uint64_t addr, uint64_t done, uint32_t reason, int write)
{
    f->addr = dma_addr(addr + done);
    f->done = done;
    f->reason = reason;
    f->write = (uint32_t)write;
    return -EFAULT;
}

/* A device's registers as its driver reaches them, in the capsule "dmapath.mmio.v1". A simulated device has no thread of its
 * own: it works while somebody waits for it, and relax() is how to wait. */
struct dma_mmio {
    void *priv;
    uint64_t (*read)(void *priv, uint64_t offset, unsigned width);
    void (*write)(void *priv, uint64_t offset, unsigned width, uint64_t value);
    int (*relax)(void *priv); /* returns pieces of work that were done; 0: nothing was to do */
};
static inline uint64_t dma_readl(const struct dma_mmio *m, uint64_t offset) { return m->read(m->priv, offset, 4); }
static inline uint64_t dma_readq(const struct dma_mmio *m, uint64_t offset) { return m->read(m->priv, offset, 8); }
static inline void dma_writel(const struct dma_mmio *m, uint64_t offset, uint32_t v) { m->write(m->priv, offset, 4, v); }
static inline void dma_writeq(const struct dma_mmio *m, uint64_t offset, uint64_t v) { m->write(m->priv, offset, 8, v); }

/* ---- the calls of a driver -------------------------------------------------------------------------------------- */

static inline int dma_map_phys(struct dma_device *d, phys_addr_t p, uint64_t size, enum dma_data_direction dir,
                               unsigned long attrs, dma_addr_t *out)
{ return d->ops->map_phys(d, p, size, dir, attrs, out); }
static inline int dma_unmap_phys(struct dma_device *d, dma_addr_t a, uint64_t size, enum dma_data_direction dir,
                                 unsigned long attrs)
{ return d->ops->unmap_phys(d, a, size, dir, attrs); }
static inline int dma_iova_try_alloc(struct dma_device *d, struct dma_iova_state *s, phys_addr_t p, uint64_t size)
{ return d->ops->iova_try_alloc(d, s, p, size); }
static inline int dma_iova_link(struct dma_device *d, struct dma_iova_state *s, phys_addr_t p, uint64_t offset,
                                uint64_t size, enum dma_data_direction dir, unsigned long attrs)
{ return d->ops->iova_link(d, s, p, offset, size, dir, attrs); }
static inline int dma_iova_sync(struct dma_device *d, struct dma_iova_state *s, uint64_t offset, uint64_t size)
{ return d->ops->iova_sync(d, s, offset, size); }
static inline int dma_iova_unlink(struct dma_device *d, struct dma_iova_state *s, uint64_t offset, uint64_t size,
                                  enum dma_data_direction dir, unsigned long attrs)
{ return d->ops->iova_unlink(d, s, offset, size, dir, attrs); }
static inline int dma_iova_free(struct dma_device *d, struct dma_iova_state *s)
{ return d->ops->iova_free(d, s); }
/* unlink what was linked (bytes from offset 0), then free the whole allocation */
static inline int dma_iova_destroy(struct dma_device *d, struct dma_iova_state *s, uint64_t mapped,
                                   enum dma_data_direction dir, unsigned long attrs)
{
    int rc = mapped ? d->ops->iova_unlink(d, s, 0, mapped, dir, attrs) : 0;
    int rc2 = d->ops->iova_free(d, s);
    return rc ? rc : rc2;
}
static inline uint64_t dma_get_merge_boundary(struct dma_device *d) { return d->ops->merge_boundary(d); }
static inline int dma_keys_of(struct dma_device *d, dma_addr_t a, uint64_t size, struct dma_keys *out)
{ return d->ops->keys_of(d, a, size, out); }

/* ---- generic forms, for members that a backend leaves NULL ------------------------------------------------------- */

static inline int dma_generic_no_iova(struct dma_device *d, struct dma_iova_state *s, phys_addr_t p, uint64_t size)
{ (void)d; (void)p; (void)size; memset(s, 0, sizeof(*s)); return 0; }
static inline int dma_generic_no_link(struct dma_device *d, struct dma_iova_state *s, phys_addr_t p, uint64_t o,
                                      uint64_t size, enum dma_data_direction dir, unsigned long attrs)
{ (void)d; (void)s; (void)p; (void)o; (void)size; (void)dir; (void)attrs; return -EOPNOTSUPP; }
static inline int dma_generic_link_vec(struct dma_device *d, struct dma_iova_state *s, const struct phys_vec *v,
                                       uint32_t n, uint64_t offset, enum dma_data_direction dir, unsigned long attrs)
{
    uint64_t done = 0;
    for (uint32_t i = 0; i < n; i++) {
        int rc = d->ops->iova_link(d, s, v[i].paddr, offset + done, v[i].len, dir, attrs);
        if (rc) {
            if (done)
                d->ops->iova_unlink(d, s, offset, done, dir, attrs);
            return rc;
        }
        done += v[i].len;
    }
    return 0;
}
/* Whole granules around each range are ranges that any two-step backend can link side by side. */
static inline int dma_generic_link_gapped(struct dma_device *d, struct dma_iova_state *s, const struct phys_vec *v,
                                          uint32_t n, uint64_t offset, enum dma_data_direction dir,
                                          unsigned long attrs)
{
    uint64_t gm = d->ops->merge_boundary(d), done = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t off = v[i].paddr.v & gm, size = (off + v[i].len + gm) & ~gm;
        int rc = d->ops->iova_link(d, s, phys_addr(v[i].paddr.v - off), offset + done, size, dir, attrs);
        if (rc) {
            if (done)
                d->ops->iova_unlink(d, s, offset, done, dir, attrs);
            return rc;
        }
        done += size;
    }
    return 0;
}
static inline int dma_generic_no_sync(struct dma_device *d, struct dma_iova_state *s, uint64_t o, uint64_t size)
{ (void)s; (void)o; (void)size; return d->ops->iova_link == dma_generic_no_link ? -EOPNOTSUPP : 0; }
static inline int dma_generic_no_unlink(struct dma_device *d, struct dma_iova_state *s, uint64_t o, uint64_t size,
                                        enum dma_data_direction dir, unsigned long attrs)
{ (void)d; (void)s; (void)o; (void)size; (void)dir; (void)attrs; return 0; }
static inline int dma_generic_no_free(struct dma_device *d, struct dma_iova_state *s)
{ (void)d; (void)s; return 0; }
static inline int dma_generic_unmap_sg(struct dma_device *d, const struct dma_seg *s, uint32_t n,
                                       enum dma_data_direction dir, unsigned long attrs)
{
    int first = 0;
    for (uint32_t i = 0; i < n; i++) {
        int rc = d->ops->unmap_phys(d, s[i].addr, s[i].len, dir, attrs);
        first = first ? first : rc;
    }
    return first;
}
static inline int dma_generic_map_sg(struct dma_device *d, const struct phys_vec *v, uint32_t n,
                                     enum dma_data_direction dir, unsigned long attrs, struct dma_seg *out)
{
    for (uint32_t i = 0; i < n; i++) {
        int rc = d->ops->map_phys(d, v[i].paddr, v[i].len, dir, attrs, &out[i].addr);
        if (rc) {
            dma_generic_unmap_sg(d, out, i, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC);
            return rc;
        }
        out[i].len = v[i].len;
    }
    return (int)n;
}
static inline int dma_generic_no_cpu_sync(struct dma_device *d, dma_addr_t a, uint64_t n, enum dma_data_direction dir)
{ (void)d; (void)a; (void)n; (void)dir; return 0; }
static inline uint64_t dma_generic_no_boundary(struct dma_device *d) { (void)d; return 0; }
static inline int dma_generic_no_keys(struct dma_device *d, dma_addr_t a, uint64_t n, struct dma_keys *out)
{ (void)d; (void)a; (void)n; out->lkey = out->rkey = 0; return 0; }
static inline int dma_generic_not_bounced(struct dma_device *d, dma_addr_t a) { (void)d; (void)a; return 0; }
static inline int dma_generic_need_unmap(struct dma_device *d) { (void)d; return 1; }

/* Check a backend's table and complete it into *dst. -EINVAL: another ABI, or a required member is missing. */
static inline int dma_ops_init(struct dma_ops *dst, const struct dma_ops *src)
{
    if (src->abi != DMAPATH_ABI || src->size < offsetof(struct dma_ops, iova_try_alloc) || !src->map_phys ||
        !src->unmap_phys || !src->name)
        return -EINVAL;
    memset(dst, 0, sizeof(*dst));
    memcpy(dst, src, src->size < sizeof(*dst) ? src->size : sizeof(*dst));
    dst->size = sizeof(*dst);
    if (!dst->iova_try_alloc) dst->iova_try_alloc = dma_generic_no_iova;
    if (!dst->iova_link) dst->iova_link = dma_generic_no_link;
    if (!dst->iova_link_vec) dst->iova_link_vec = dma_generic_link_vec;
    if (!dst->iova_link_gapped) dst->iova_link_gapped = dma_generic_link_gapped;
    if (!dst->iova_sync) dst->iova_sync = dma_generic_no_sync;
    if (!dst->iova_unlink) dst->iova_unlink = dma_generic_no_unlink;
    if (!dst->iova_free) dst->iova_free = dma_generic_no_free;
    if (!dst->map_sg) dst->map_sg = dma_generic_map_sg;
    if (!dst->unmap_sg) dst->unmap_sg = dma_generic_unmap_sg;
    if (!dst->sync_for_cpu) dst->sync_for_cpu = dma_generic_no_cpu_sync;
    if (!dst->sync_for_device) dst->sync_for_device = dma_generic_no_cpu_sync;
    if (!dst->merge_boundary) dst->merge_boundary = dma_generic_no_boundary;
    if (!dst->need_unmap) dst->need_unmap = dma_generic_need_unmap;
    if (!dst->is_bounced) dst->is_bounced = dma_generic_not_bounced;
    if (!dst->keys_of) dst->keys_of = dma_generic_no_keys;
    return 0;
}

/* ---- requests and the wrapper ------------------------------------------------------------------------------------ */

/* Where a front end stands in its vectors; zeroed at the start, the front end's own after that. */
struct dma_cursor { uint64_t item, sub, pos; };

/* What a front end (bio, MR, yours) hands to the wrapper: a source of physical vectors and a few facts about them. */
struct dma_request {
    /* Write up to cap vectors that follow the cursor, merged and split by the front end's rules under the limits;
     * returns how many, 0 at the end. Called again from a zero cursor it gives the same vectors. */
    uint32_t (*fill)(const struct dma_request *, struct dma_cursor *, const struct dma_limits *, struct phys_vec *out,
                     uint32_t cap);
    const void *priv;
    uint64_t total;     /* bytes */
    uint64_t gap_mask;  /* bits from the lowest in-page gap upward, 0: no gap (req_phys_gap_mask) */
    uint32_t max_vecs;  /* an upper bound on the vectors that fill gives where no limit cuts one */
    uint32_t flags;     /* DMA_RQ_* */
    unsigned long attrs;
    enum dma_data_direction dir;
};
enum { DMA_RQ_SG = 1u << 0 }; /* Linux maps this kind with dma_map_sgtable (umem), not with the block iterator */

/* LINUX refuses a request that is not within the device's limits, since there the block layer has split it; LINUX_SPLIT takes the
 * caller's word for that, and hands out what Linux would. */
enum dma_policy { DMA_POLICY_UNIFIED = 0, DMA_POLICY_LINUX = 1, DMA_POLICY_LINUX_SPLIT = 2 };
enum dma_layout { DMA_LAYOUT_NONE, DMA_LAYOUT_DIRECT, DMA_LAYOUT_LINEAR, DMA_LAYOUT_GAPPED, DMA_LAYOUT_PER_RANGE,
                  DMA_LAYOUT_BOUNCED };

/* Kept from start to unmap. */
struct dma_map_state {
    struct dma_iova_state iova;  /* linear, gapped: all that unmap needs */
    uint64_t mapped;             /* bytes linked from the start of the state */
    struct dma_seg *saved;       /* per range: what unmap needs; NULL otherwise */
    uint32_t nr_saved;
    uint8_t layout, dir, sg, unused;
    unsigned long attrs;
    uint64_t rules;              /* bit set of the rules that decided (dmapath.rules) */
};

/* Needed only while segments are read; lives on the driver's stack. */
#define DMA_MAP_CHUNK 64u
struct dma_map_iter {
    const struct dma_request *rq;
    int (*next)(struct dma_device *, struct dma_map_state *, struct dma_map_iter *, struct dma_seg *); /* this layout's */
    struct dma_cursor cursor;
    const struct dma_limits *lim; /* by which the front end cuts its vectors */
    uint64_t addr, left;         /* what is mapped and not handed out yet */
    uint64_t base;               /* one range: where in it the next vector lies */
    uint64_t end, keep;          /* each segment checked: the last one's end, bits that must be 0 */
    uint64_t granule_mask;
    uint32_t have, at, whole;    /* vectors in the window, next of them; whole: the window holds them all */
    uint32_t p2p;                /* bit set of enum dma_p2p_type that the request touches; 0: plain memory alone */
    uint32_t flags, given;       /* how segments leave; how many have, where each is checked */
    uint64_t pos, delta;         /* range by range: bytes of a vector that are mapped; DMA minus physical address, so far */
    uint32_t room;               /* range by range: addresses that dma_map_state.saved holds */
    uint32_t shown;              /* segments that observers were shown */
    struct phys_vec rest;        /* p2p: of a vector that is cut where memory changes hands */
    struct phys_vec window[DMA_MAP_CHUNK];
};

/* The wrapper, reached through the capsule "dmapath.wrapper.api" (dmapath.pxd has the import in one call). */
struct dmapath_api {
    uint32_t abi, size;
    /* Map a whole request. 0, or -errno with nothing mapped. */
    int (*map_start)(struct dma_device *, const struct dma_request *, enum dma_policy, struct dma_map_state *,
                     struct dma_map_iter *);
    /* 1 and the next segment, 0 after the last, or -errno: unmap() then. Each segment is within the device's limits. */
    int (*map_next)(struct dma_device *, struct dma_map_state *, struct dma_map_iter *, struct dma_seg *);
    int (*unmap)(struct dma_device *, struct dma_map_state *);
};
/* Memory as a back end's bus reaches it, in the capsule "dmapath.memory.api": by physical address, with or without the CPU's
 * caches as the device has it. 0, or -EFAULT and *fault where there is no memory. */
struct dmapath_memory_api {
    uint32_t abi, size;
    int (*access)(struct dma_device *, phys_addr_t, uint64_t len, void *buf, int write, struct dma_fault *fault);
};
#define DMAPATH_MEMORY_CAPSULE "dmapath.memory.api"
#define DMAPATH_API_CAPSULE "dmapath.wrapper.api"
#define DMAPATH_DEVICE_CAPSULE "dmapath.device"
#define DMAPATH_OPS_CAPSULE "dmapath.ops.v1"
#define DMAPATH_MMIO_CAPSULE "dmapath.mmio.v1" /* a struct dma_mmio *: a device's registers */
#define DMAPATH_BUS_CAPSULE "dmapath.bus.v1" /* a struct dma_bus_ops *, beside a back end's own table */

#ifdef __cplusplus
}
#endif
#endif
