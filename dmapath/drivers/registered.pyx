# cython: language_level=3, cdivision=True
"""A back end that registers with the simulated HCA what it maps, as ``dmapath.verbs.Verbs`` does with a real one.

Beneath lies the HCA's own Device with whatever back end that has. A DMA address here is an address under a key; the HCA's
translation table leads to the DMA addresses beneath. So scattered pages lie side by side under one key on every machine.
"""
cimport cython
from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from libc.errno cimport EADDRINUSE, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, ENXIO, ERANGE, EXDEV
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dmapath._core cimport lock, lock_acquire, lock_release
from dmapath._rnic cimport RNIC_CREATE_MKEY, RNIC_DESTROY_MKEY, rnic_command
from dmapath.abi cimport (
    DMA_ATTR_SKIP_CPU_SYNC, DMA_NONE, DMA_TO_DEVICE, DMAPATH_ABI, DMAPATH_OPS_CAPSULE, dma_addr, dma_addr_t,
    dma_data_direction, dma_device, dma_iova_state, dma_keys, dma_ops, dma_p2p_peer, phys_addr_t, phys_vec,
)
from dmapath.device cimport CoherentBuffer
from dmapath.drivers.rnic cimport Context, Pd, rnic_port, run_command

from dmapath.addr import as_length
from dmapath.errors import DmaValueError, StateError, at_end
from dmapath.mr import LOCAL_WRITE, check_access

cdef enum:
    PAGE = 4096
    SHIFT = 40              # a DMA address has the number of its slot, plus one, in these bits and up
    FREE = 0, USED = 1, IDLE = 2

MODES = ("per-range", "linear")

# memory mapped beneath, at a byte offset from the slot's first page
cdef struct link:
    dma_addr_t addr
    uint64_t at, size

cdef struct slot:
    uint32_t state, key, nlinks
    uint64_t addr, size
    uint64_t *table         # the HCA's translation table, in DMA memory
    uint64_t table_addr
    link *links
    dma_data_direction dir
    unsigned long attrs
    uint64_t phys, used     # of an idle one: what it maps, and when it was last used

cdef struct state:
    dma_device *below
    rnic_port *port
    uint32_t pd, access, nslots, pages, next
    bint linear, closed
    uint64_t cache, idle_bytes, clock
    slot *slots
    lock lock
    uint64_t registrations, deregistrations, hits, maps, unmaps, links, unlinks, syncs, allocs, frees


cdef inline state *state_of(dma_device *dev) noexcept nogil:
    return <state *>dev.priv


cdef inline slot *slot_at(state *s, uint64_t addr) noexcept nogil:
    cdef uint64_t i = (addr >> SHIFT) - 1
    if i >= s.nslots or s.slots[i].state != USED:
        return NULL
    return &s.slots[i]


cdef int register(state *s, slot *t) noexcept nogil:
    cdef rnic_command c
    cdef int rc
    memset(&c, 0, sizeof(c))
    c.op, c.mkey.iova, c.mkey.length, c.mkey.mtt = RNIC_CREATE_MKEY, t.addr, t.size, t.table_addr
    c.mkey.pd, c.mkey.pages = s.pd, s.pages
    c.mkey.access = s.access if t.dir != DMA_TO_DEVICE else s.access & ~<uint32_t>11  # what the device only reads
    rc = run_command(s.port, &c)
    if rc == 0:
        t.key = c.result
        s.registrations += 1
    return rc


cdef void deregister(state *s, slot *t) noexcept nogil:
    cdef rnic_command c
    if t.key:
        memset(&c, 0, sizeof(c))
        c.op, c.id = RNIC_DESTROY_MKEY, t.key
        run_command(s.port, &c)
        t.key = 0
        s.deregistrations += 1


# undo the links within [at, end) of a slot; how many
cdef uint32_t unlink(state *s, slot *t, uint64_t at, uint64_t end, dma_data_direction dir,
                     unsigned long attrs) noexcept nogil:
    cdef uint32_t i, kept = 0
    for i in range(t.nlinks):
        if t.links[i].at < at or t.links[i].at >= end:
            t.links[kept] = t.links[i]
            kept += 1
        else:
            s.below.ops.unmap_phys(s.below, t.links[i].addr, t.links[i].size, dir, attrs)
    i = t.nlinks - kept
    t.nlinks = kept
    return i


# map a range beneath, and lead the table's pages from byte `at` on to it
cdef int link_range(state *s, slot *t, phys_addr_t phys, uint64_t at, uint64_t size, dma_data_direction dir,
                    unsigned long attrs) noexcept nogil:
    cdef uint64_t page = at // PAGE, end = (at + size + PAGE - 1) // PAGE, most = <uint64_t>s.pages * PAGE, base
    cdef dma_addr_t addr
    cdef uint32_t i
    cdef int rc
    if size > most or at > most - size:
        return -ERANGE
    for i in range(t.nlinks):
        if t.links[i].at // PAGE < end and page < (t.links[i].at + t.links[i].size + PAGE - 1) // PAGE:
            return -EADDRINUSE
    rc = s.below.ops.map_phys(s.below, phys, size, dir, attrs, &addr)
    if rc:
        return rc
    if addr.v % PAGE != at % PAGE:
        s.below.ops.unmap_phys(s.below, addr, size, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
        return -EXDEV  # it does not keep its place in the page, so it cannot lie beside other memory
    t.links[t.nlinks].addr, t.links[t.nlinks].at, t.links[t.nlinks].size = addr, at, size
    t.nlinks += 1
    t.dir = dir
    base = addr.v - addr.v % PAGE
    while page < end:
        t.table[page] = base
        base += PAGE
        page += 1
    return 0


cdef void empty(state *s, slot *t, unsigned long attrs) noexcept nogil:
    deregister(s, t)
    unlink(s, t, 0, UINT64_MAX, t.dir, attrs)
    t.state = FREE


# what the cache keeps of a slot goes
cdef void forget(state *s, slot *t) noexcept nogil:
    s.idle_bytes -= t.size
    empty(s, t, t.attrs | DMA_ATTR_SKIP_CPU_SYNC)


# the slot that lies idle longest, emptied; NULL: none does
cdef slot *forget_oldest(state *s) noexcept nogil:
    cdef slot *oldest = NULL
    cdef uint32_t i
    for i in range(s.nslots):
        if s.slots[i].state == IDLE and (oldest == NULL or s.slots[i].used < oldest.used):
            oldest = &s.slots[i]
    if oldest != NULL:
        forget(s, oldest)
    return oldest


# a slot of nobody's: free, or the one that lies idle longest. Under the lock
cdef slot *take(state *s) noexcept nogil:
    cdef slot *t = NULL
    cdef uint32_t i
    for i in range(s.nslots):
        if s.slots[(s.next + i) % s.nslots].state == FREE:
            t = &s.slots[(s.next + i) % s.nslots]
            s.next = (s.next + i + 1) % s.nslots
            break
    if t == NULL:
        t = forget_oldest(s)
    if t != NULL:
        t.state, t.nlinks, t.key = USED, 0, 0
    return t


cdef inline uint64_t address(state *s, slot *t, uint64_t low) noexcept nogil:
    return (<uint64_t>(t - s.slots) + 1) << SHIFT | low % PAGE


# ---- the table of ops: each call under the lock, which also guards the slots


cdef slot *find_idle(state *s, uint64_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef uint32_t i
    cdef slot *t
    for i in range(s.nslots):
        t = &s.slots[i]
        if t.state == IDLE and t.phys == phys and t.size == size and t.dir == dir and t.attrs == attrs:
            return t
    return NULL


cdef int map_range(state *s, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                   dma_addr_t *out) noexcept nogil:
    cdef slot *t = find_idle(s, phys.v, size, dir, attrs) if s.cache else NULL
    cdef int rc
    if t != NULL:
        t.state = USED
        s.idle_bytes -= t.size
        s.hits += 1
        if not attrs & DMA_ATTR_SKIP_CPU_SYNC:
            s.below.ops.sync_for_device(s.below, t.links[0].addr, size, dir)
        out[0] = dma_addr(t.addr)
        return 0
    if s.closed:
        return -ENODEV
    t = take(s)
    if t == NULL:
        return -ENOMEM
    t.phys, t.attrs, t.size = phys.v, attrs, size
    rc = link_range(s, t, phys, phys.v % PAGE, size, dir, attrs)
    if rc == 0:
        t.addr = address(s, t, phys.v)
        rc = register(s, t)
    if rc:
        empty(s, t, attrs | DMA_ATTR_SKIP_CPU_SYNC)
        return rc
    out[0] = dma_addr(t.addr)
    return 0


cdef int reg_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                      dma_addr_t *out) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef int rc
    out[0] = dma_addr(UINT64_MAX)
    if dir == DMA_NONE or size == 0:
        return -EINVAL
    lock_acquire(&s.lock)
    rc = map_range(s, phys, size, dir, attrs, out)
    s.maps += rc == 0
    lock_release(&s.lock)
    return rc


cdef int unmap_range(state *s, uint64_t addr, uint64_t size, unsigned long attrs) noexcept nogil:
    cdef slot *t = slot_at(s, addr)
    if t == NULL or t.addr != addr or t.size != size:
        return -ENOENT
    s.unmaps += 1
    if not s.cache or t.size > s.cache:
        empty(s, t, attrs)
        return 0
    if not attrs & DMA_ATTR_SKIP_CPU_SYNC:
        s.below.ops.sync_for_cpu(s.below, t.links[0].addr, size, t.dir)
    s.clock += 1
    t.state, t.used = IDLE, s.clock
    s.idle_bytes += t.size
    while s.idle_bytes > s.cache:
        forget_oldest(s)
    return 0


cdef int reg_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                        unsigned long attrs) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef int rc
    lock_acquire(&s.lock)
    rc = unmap_range(s, addr.v, size, attrs)
    lock_release(&s.lock)
    return rc


cdef int reg_try_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t = NULL
    memset(st, 0, sizeof(dma_iova_state))
    if not s.linear or s.closed or size == 0 or size > <uint64_t>s.pages * PAGE - phys.v % PAGE:
        return 0
    lock_acquire(&s.lock)
    t = take(s)
    if t != NULL:
        t.addr, t.size, t.phys = address(s, t, phys.v), size, UINT64_MAX
        st.addr, st.size = dma_addr(t.addr), size
        s.allocs += 1
    lock_release(&s.lock)
    return t != NULL


cdef int reg_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                  dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef uint64_t at = st.addr.v % PAGE + offset
    cdef int rc
    if phys.v % PAGE and offset:
        return -EIO
    if (at ^ phys.v) % PAGE:
        return -ENXIO
    lock_acquire(&s.lock)
    rc = link_range(s, slot_at(s, st.addr.v), phys, at, size, dir, attrs)
    s.links += rc == 0
    lock_release(&s.lock)
    return rc


# each range at the next page, with its own place in it; exactly its bytes are mapped beneath
cdef int reg_link_gapped(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                         dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t
    cdef uint64_t page = offset
    cdef uint32_t i
    cdef int rc = 0
    lock_acquire(&s.lock)
    t = slot_at(s, st.addr.v)
    for i in range(n):
        rc = link_range(s, t, v[i].paddr, page + v[i].paddr.v % PAGE, v[i].len, dir, attrs)
        if rc:
            unlink(s, t, offset, page, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
            break
        page += (v[i].paddr.v % PAGE + v[i].len + PAGE - 1) // PAGE * PAGE
    s.links += n if rc == 0 else 0
    lock_release(&s.lock)
    return rc


# one key over all that was reserved
cdef int reg_sync(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t
    cdef int rc = 0
    lock_acquire(&s.lock)
    t = slot_at(s, st.addr.v)
    if t.key == 0:
        rc = register(s, t)
    s.syncs += rc == 0
    lock_release(&s.lock)
    return rc


cdef int reg_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                    unsigned long attrs) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t
    cdef uint64_t low = st.addr.v % PAGE
    cdef uint32_t n
    lock_acquire(&s.lock)
    t = slot_at(s, st.addr.v)
    deregister(s, t)  # before the memory goes
    n = unlink(s, t, offset if offset == 0 else low + offset, low + offset + size, dir, attrs)
    s.unlinks += 1
    lock_release(&s.lock)
    return 0 if n else -ENOENT


cdef int reg_free(dma_device *dev, dma_iova_state *st) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t
    lock_acquire(&s.lock)
    t = slot_at(s, st.addr.v)
    if t != NULL:
        empty(s, t, DMA_ATTR_SKIP_CPU_SYNC)
        s.frees += 1
    lock_release(&s.lock)
    return 0 if t != NULL else -ENOENT


cdef int sync_part(dma_device *dev, uint64_t addr, uint64_t size, dma_data_direction dir, bint cpu) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t = slot_at(s, addr)
    cdef uint64_t at, end, first, last
    cdef uint32_t i
    if t == NULL:
        return -ENOENT
    at = t.addr % PAGE + addr - t.addr
    end = at + size
    for i in range(t.nlinks):
        first = at if at > t.links[i].at else t.links[i].at
        last = t.links[i].at + t.links[i].size
        last = last if last < end else end
        if first < last:
            (s.below.ops.sync_for_cpu if cpu else s.below.ops.sync_for_device)(
                s.below, dma_addr(t.links[i].addr.v + first - t.links[i].at), last - first, dir)
    return 0


cdef int reg_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept nogil:
    return sync_part(dev, addr.v, size, dir, True)


cdef int reg_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept nogil:
    return sync_part(dev, addr.v, size, dir, False)


cdef uint64_t reg_merge_boundary(dma_device *dev) noexcept nogil:
    return PAGE - 1


cdef int reg_is_bounced(dma_device *dev, dma_addr_t addr) noexcept nogil:
    cdef state *s = state_of(dev)
    cdef slot *t = slot_at(s, addr.v)
    return t != NULL and t.nlinks and s.below.ops.is_bounced(s.below, t.links[0].addr)


cdef int reg_keys_of(dma_device *dev, dma_addr_t addr, uint64_t size, dma_keys *out) noexcept nogil:
    cdef slot *t
    out.lkey = out.rkey = 0
    if dma_p2p_peer(dev, addr) != NULL:
        return 0  # a peer below the same switch: its bus address needs no key
    t = slot_at(state_of(dev), addr.v)
    if t == NULL or t.key == 0 or addr.v < t.addr or addr.v - t.addr >= t.size or size > t.size - (addr.v - t.addr):
        return -ENOENT
    out.lkey = out.rkey = t.key
    return 0


cdef dma_ops table
memset(&table, 0, sizeof(table))
table.abi, table.size, table.name = DMAPATH_ABI, sizeof(dma_ops), b"registered"
table.map_phys, table.unmap_phys = reg_map_phys, reg_unmap_phys
table.iova_try_alloc, table.iova_link, table.iova_link_gapped = reg_try_alloc, reg_link, reg_link_gapped
table.iova_sync, table.iova_unlink, table.iova_free = reg_sync, reg_unlink, reg_free
table.sync_for_cpu, table.sync_for_device = reg_sync_for_cpu, reg_sync_for_device
table.merge_boundary, table.is_bounced, table.keys_of = reg_merge_boundary, reg_is_bounced, reg_keys_of


@cython.no_gc_clear
cdef class Registered:
    """``Device(backend=Registered(pd), memory=memory)``: segments carry keys of the simulated HCA.

    Parameters
    ----------
    pd : drivers.rnic.Pd
        Whose keys; its context's Device maps what is beneath.
    mode : "linear" or "per-range"
        One key for each request where its ranges fit one translation table; or one for each range.
    cache : int
        Bytes of ranges that stay registered after their unmap ("per-range" only); 0: none.
    access : int
        Rights of the keys (LOCAL_WRITE | REMOTE_READ ...).
    slots : int
        Registrations that may live at once.
    max_pages : int
        Pages of a registration.

    With a back end in Python beneath, one thread at a time may use it: its lock is held while that one runs.
    """

    cdef state s
    cdef Pd pd
    cdef readonly str mode
    cdef readonly object dma_ops
    cdef CoherentBuffer tables
    cdef object config

    def __cinit__(self, Pd pd not None, *, mode="linear", cache=0, int access=LOCAL_WRITE, uint32_t slots=64,
                  uint32_t max_pages=512):
        cdef Context context = pd.context
        cdef uint32_t i
        context.must_live()
        if mode not in MODES:
            raise DmaValueError("linear or per-range", argument="mode", value=mode)
        if cache and mode == "linear":
            raise DmaValueError("0: windows are made anew; per-range keeps what it registered", argument="cache",
                                value=cache)
        if not 1 <= slots <= 4096 or not 1 <= max_pages <= 4096:
            raise DmaValueError("1 to 4096", argument="slots", value=(slots, max_pages))
        self.pd, self.mode, self.config = pd, mode, dict(mode=mode, cache=cache, access=access, slots=slots,
                                                         max_pages=max_pages)
        self.s.cache, self.s.linear = as_length(cache, "cache", least=0), mode == "linear"
        self.s.below, self.s.port = &context.device.c, &context.port
        self.s.pd, self.s.access = pd.number, check_access(access)
        self.s.nslots, self.s.pages = slots, max_pages
        self.tables = context.device.alloc_coherent(8 * slots * max_pages)
        self.s.slots = <slot *>calloc(slots, sizeof(slot))
        if self.s.slots == NULL:
            raise MemoryError("no memory for the slots")
        for i in range(slots):
            self.s.slots[i].table = <uint64_t *>self.tables.host + <uint64_t>i * max_pages
            self.s.slots[i].table_addr = self.tables.addr_.v + 8 * <uint64_t>i * max_pages
            self.s.slots[i].links = <link *>calloc(max_pages, sizeof(link))
            if self.s.slots[i].links == NULL:
                raise MemoryError("no memory for the links")
        context.children += 1
        self.dma_ops = PyCapsule_New(&table, DMAPATH_OPS_CAPSULE, NULL)
        PyCapsule_SetContext(self.dma_ops, &self.s)

    cdef int must_live(self) except -1:
        if self.tables is None:
            raise StateError("it was closed", argument="self", value=self)
        return 0

    def counters(self):
        """By the names in COUNTERS, and registrations, deregistrations, registered_live (idle ones too) and cache_hits."""
        cdef uint32_t i
        live = sum(self.s.slots[i].key != 0 for i in range(self.s.nslots))
        used = [i for i in range(self.s.nslots) if self.s.slots[i].state == USED and self.s.slots[i].phys == UINT64_MAX]
        return dict(maps=self.s.maps, unmaps=self.s.unmaps, links=self.s.links, unlinks=self.s.unlinks, syncs=self.s.syncs,
                    iova_allocs=self.s.allocs, iova_frees=self.s.frees, iova_live=len(used),
                    iova_live_bytes=sum(self.s.slots[i].size for i in used),
                    mapped_bytes=sum(self.s.slots[i].size for i in range(self.s.nslots) if self.s.slots[i].state == USED),
                    registrations=self.s.registrations, deregistrations=self.s.deregistrations, registered_live=live,
                    cache_hits=self.s.hits)

    def flush(self):
        """Forget what the cache holds."""
        cdef uint32_t i
        self.must_live()
        for i in range(self.s.nslots):
            if self.s.slots[i].state == IDLE:
                forget(&self.s, &self.s.slots[i])

    def close(self):
        """Deregister what the cache holds and give the tables back. StateError while anything is mapped."""
        cdef uint32_t i
        if self.tables is None:
            return
        if any(self.s.slots[i].state == USED for i in range(self.s.nslots)):
            raise StateError("something is still mapped", argument="self", value=self)
        self.flush()
        self.s.closed = True
        self.tables.free()
        self.tables = None
        self.pd.context.children -= 1

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.s.nslots):
            if self.s.slots != NULL:
                free(self.s.slots[i].links)
        free(self.s.slots)
