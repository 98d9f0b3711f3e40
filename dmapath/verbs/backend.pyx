# cython: language_level=3
"""Real registrations behind the ops of a driver: a DMA address is what an RDMA device calls an IOVA, with keys.

========== ====================================================================================================
direct     the arena is one region for good; mapping is arithmetic (as with the kernel's local_dma_lkey)
per-range  each range is registered where it is
linear     try_alloc takes a range of DMA addresses, link notes which page goes where, sync makes them one registration:
           in place where they lie side by side already, else in a window of virtual memory that shows the pages of the memfd
           side by side. One key for scattered pages, and no help of the device
========== ====================================================================================================

A DMA address names its slot in bits 40 and up, so that finding a registration is indexing, and keeps the low 30 bits of the
first byte's own address, so that a device may use large pages where they are.
"""
import errno as _errno
import sys
import threading

cimport cython
from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from libc.errno cimport (
    EADDRINUSE, EBUSY, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP, ERANGE, EXDEV, errno,
)
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

from dmapath._core cimport (
    add_atomic as add, lock_acquire, lock_release, phys_mem_host, phys_mem_read_lock, phys_mem_read_unlock, phys_mem_run,
)
from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_BIDIRECTIONAL, DMA_FAULT_BUS, DMA_FROM_DEVICE, DMA_NONE, DMA_TO_DEVICE, DMAPATH_ABI,
    DMAPATH_BUS_CAPSULE, DMAPATH_OPS_CAPSULE, dma_addr, dma_addr_t, dma_bus_ops, dma_data_direction, dma_device, dma_fault,
    dma_fault_at, dma_iova_state, dma_keys, dma_ops, phys_addr_t,
)
from dmapath.memory cimport PhysMemory
from dmapath.verbs.ibv cimport ibv_dereg_mr, ibv_reg_mr_iova2
from dmapath.verbs.resources cimport Pd, fork_count

from dmapath.addr import as_length
from dmapath.backends.base import COUNTERS
from dmapath.errors import CompletionError, DmaValueError, NotSupportedError, StateError, at_end
from dmapath.mr import LOCAL_WRITE, ON_DEMAND, check_access
from dmapath.verbs.bridge import pyverbs_mr
from dmapath.verbs.probe import require
from dmapath.verbs.queue import loopback
from dmapath.verbs.resources import Mr, pin_text

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    void *MAP_FAILED
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED

cdef enum:
    DIRECT, PER_RANGE, LINEAR
    UNUSED = 0, RANGE = 1, WINDOW = 2
    CHUNK = 1024             # slots allocated together, so that they never move
    CHUNKS = 4096
    BUCKETS = 1024
    LW = 1, RW = 2, RR = 4, RA = 8
cdef uint64_t FRAME = 4096  # of physical memory
cdef uint64_t LOW = (1 << 30) - 1
cdef int SLOT_SHIFT = 40

MODES = {"direct": DIRECT, "per-range": PER_RANGE, "linear": LINEAR}


cdef inline verbs_priv *priv(dma_device *dev) noexcept nogil:
    return <verbs_priv *>dev.priv


# ---- slots ----------------------------------------------------------------------------------------------------------

cdef inline slot *slot_at(verbs_priv *p, uint32_t number) noexcept nogil:
    return &p.chunks[number // CHUNK][number % CHUNK]


# the slot that an address names, if one is in use there
cdef inline slot *slot_of(verbs_priv *p, uint64_t addr) noexcept nogil:
    cdef uint64_t number = (addr >> SLOT_SHIFT) - 1
    cdef slot *s
    if number >= p.nr_slots:
        return NULL
    s = slot_at(p, <uint32_t>number)
    if s.kind == UNUSED or s.users == 0 or addr - s.base >= s.bytes:
        return NULL
    return s


# more slots, under the lock
cdef bint more_slots(verbs_priv *p) noexcept nogil:
    cdef slot *s
    cdef uint32_t i
    if p.nr_slots == CHUNK * CHUNKS:
        return False
    s = <slot *>calloc(CHUNK, sizeof(slot))
    if s == NULL:
        return False
    p.chunks[p.nr_slots // CHUNK] = s
    for i in range(CHUNK, 0, -1):
        s[i - 1].number = p.nr_slots + i - 1
        s[i - 1].next_free = p.first_free
        p.first_free = p.nr_slots + i  # plus 1: 0 ends the list
    p.nr_slots += CHUNK
    return True


# under the lock
cdef inline slot *take_slot(verbs_priv *p, int kind, char *like, uint64_t nbytes) noexcept nogil:
    cdef slot *s
    if p.first_free == 0 and not more_slots(p):
        return NULL
    s = slot_at(p, p.first_free - 1)
    p.first_free = s.next_free
    s.kind, s.bytes, s.users = kind, nbytes, 1
    s.base = ((<uint64_t>s.number + 1) << SLOT_SHIFT) + (<uint64_t>like & LOW)
    s.host = like if kind == RANGE else NULL
    return s


# it is all zeros again but for its number, where it lay, and its place in the list
cdef inline void drop_slot(verbs_priv *p, slot *s) noexcept nogil:
    s.kind = UNUSED
    s.users = s.indexed = s.doomed = s.window = 0
    s.access = s.first = s.run = 0
    s.linked = s.held = s.there = NULL
    s.next_free = p.first_free
    p.first_free = s.number + 1


# ---- registering ----------------------------------------------------------------------------------------------------

cdef inline unsigned int rights(verbs_priv *p, dma_data_direction dir) noexcept nogil:
    if not p.by_direction:
        return p.access
    if dir == DMA_TO_DEVICE:
        return RR
    if dir == DMA_FROM_DEVICE:
        return LW | RW
    return LW | RW | RR | p.atomic


cdef inline bint fail_now(verbs_priv *p) noexcept nogil:
    if p.fail_nth:
        p.fail_nth -= 1
        return p.fail_nth == 0
    return False


# register [start, end) of a slot, which lies at host
cdef inline int enter(verbs_priv *p, slot *s, char *host, uint64_t start, uint64_t end) noexcept nogil:
    cdef reg *r
    cdef int code
    if p.forks[0] != p.born or (p.theirs != NULL and p.theirs[0] != <uintptr_t>p.pd):
        return -ENODEV
    if fail_now(p):
        return -ENOMEM
    r = &s.own if s.own.mr == NULL else <reg *>calloc(1, sizeof(reg))
    if r == NULL:
        return -ENOMEM
    r.mr = ibv_reg_mr_iova2(p.pd, host, end - start, start, s.access)
    if r.mr == NULL:
        code = errno
        p.refused = end - start
        if r != &s.own:
            free(r)
        return -code if code else -EIO
    r.start, r.end, r.next = start, end, s.regs
    s.regs = r
    add(&p.n.registrations, 1)
    add(&p.n.registered_bytes, end - start)
    return 0


# undo one registration
cdef inline int undo(verbs_priv *p, slot *s, reg **at) noexcept nogil:
    cdef reg *r = at[0]
    cdef int rc = ibv_dereg_mr(r.mr) if p.forks[0] == p.born else 0
    if rc:
        return -rc
    add(&p.n.deregistrations, 1)
    add(&p.n.deregistered_bytes, r.end - r.start)
    at[0] = r.next
    if r == &s.own:
        r.mr = NULL
    else:
        free(r)
    return 0


# undo the registrations of a slot that touch [start, end): all, or those before the first that is refused
cdef int leave(verbs_priv *p, slot *s, uint64_t start, uint64_t end) noexcept nogil:
    cdef reg **at = &s.regs
    cdef int rc
    while at[0] != NULL:
        if at[0].start >= end or at[0].end <= start:
            at = &at[0].next
            continue
        rc = undo(p, s, at)
        if rc:
            return rc
    return 0


cdef reg *reg_over(slot *s, uint64_t start, uint64_t end) noexcept nogil:
    cdef reg *r = s.regs
    while r != NULL and not (r.start <= start and end <= r.end):
        r = r.next
    return r


# everything of a slot that nobody uses: its registrations, its window, itself
cdef inline int dissolve(verbs_priv *p, slot *s) noexcept nogil:
    cdef int rc
    while s.regs != NULL:
        rc = undo(p, s, &s.regs)
        if rc:
            return rc
    if s.kind == WINDOW:
        if s.host != NULL:
            munmap(s.host, s.bytes)
        free(s.linked)
        free(s.there)
        add(&p.n.window_frees, 1)
    lock_acquire(&p.lk)
    drop_slot(p, s)
    lock_release(&p.lk)
    return 0


# ---- idle registrations, least recently used first to go -------------------------------------------------------------

cdef inline uint32_t bucket_of(uint32_t page, uint64_t nbytes) noexcept nogil:
    return (page * 2654435761u ^ <uint32_t>(nbytes >> 12) * 40503u) % BUCKETS


cdef void idle_in(verbs_priv *p, slot *s) noexcept nogil:
    cdef slot **bucket
    s.users = 0
    s.older, s.newer = p.newest, NULL
    if p.newest != NULL:
        p.newest.newer = s
    else:
        p.oldest = s
    p.newest = s
    p.idle_bytes += s.bytes
    if s.kind == WINDOW:
        bucket = &p.buckets[bucket_of(s.held[0], s.bytes)]
        s.chain = bucket[0]
        bucket[0] = s


cdef void idle_out(verbs_priv *p, slot *s) noexcept nogil:
    cdef slot **at
    if s.newer != NULL:
        s.newer.older = s.older
    else:
        p.newest = s.older
    if s.older != NULL:
        s.older.newer = s.newer
    else:
        p.oldest = s.newer
    p.idle_bytes -= s.bytes
    if s.kind == WINDOW:
        at = &p.buckets[bucket_of(s.held[0], s.bytes)]
        while at[0] != s:
            at = &at[0].chain
        at[0] = s.chain


# the first cached range that ends above an address
cdef uint32_t index_at(verbs_priv *p, const char *host) noexcept nogil:
    cdef uint32_t low = 0, high = p.nr_index, middle
    while low < high:
        middle = (low + high) // 2
        if p.index[middle].host + p.index[middle].bytes > host:
            high = middle
        else:
            low = middle + 1
    return low


cdef void index_drop(verbs_priv *p, slot *s) noexcept nogil:
    cdef uint32_t i
    if not s.indexed:
        return
    i = index_at(p, s.host)
    s.indexed = 0
    p.nr_index -= 1
    memmove(&p.index[i], &p.index[i + 1], (p.nr_index - i) * sizeof(slot *))


cdef int index_add(verbs_priv *p, slot *s) noexcept nogil:
    cdef uint32_t i
    cdef slot **larger
    if p.nr_index == p.room_index:
        larger = <slot **>realloc(p.index, (2 * p.room_index + 64) * sizeof(slot *))
        if larger == NULL:
            return -ENOMEM
        p.index, p.room_index = larger, 2 * p.room_index + 64
    i = index_at(p, s.host)
    memmove(&p.index[i + 1], &p.index[i], (p.nr_index - i) * sizeof(slot *))
    p.index[i] = s
    p.nr_index += 1
    s.indexed = 1
    return 0


# idle ones beyond the budget, from the oldest on, one at a time; NULL: within it
cdef slot *evict_one(verbs_priv *p, uint64_t budget) noexcept nogil:
    cdef slot *s
    lock_acquire(&p.lk)
    s = p.oldest if p.idle_bytes > budget else NULL
    if s != NULL:
        idle_out(p, s)
        index_drop(p, s)
    lock_release(&p.lk)
    return s


cdef void evict(verbs_priv *p, uint64_t budget) noexcept nogil:
    cdef slot *s
    while True:
        s = evict_one(p, budget)
        if s == NULL:
            return
        add(&p.n.evictions, 1)
        dissolve(p, s)  # nobody has its keys any more; what fails here fails at the device's end


# the user is done with a slot: keep it, or undo it
cdef inline int release(verbs_priv *p, slot *s) noexcept nogil:
    cdef int rc
    if not p.budget:
        s.users = 0  # nobody else's: from here on its address names nothing
        rc = dissolve(p, s)
        if rc:
            s.users = 1  # a memory window is bound to it: it stays mapped
        return rc
    lock_acquire(&p.lk)
    s.users -= 1
    if s.users:
        lock_release(&p.lk)
        return 0
    if not s.doomed and (s.indexed or (s.held != NULL and s.regs != NULL and s.held[0])):
        idle_in(p, s)
        lock_release(&p.lk)
        evict(p, p.budget)
        return 0
    index_drop(p, s)
    lock_release(&p.lk)
    rc = dissolve(p, s)
    if rc:
        s.users = 1
    return rc


# ---- where memory is ------------------------------------------------------------------------------------------------

# host address of a physical range, or NULL where there is no memory. *same: up to where it lies side by side here too
cdef inline char *host_of(verbs_priv *p, uint64_t phys, uint64_t size, uint64_t *same) noexcept nogil:
    cdef uint64_t flat = p.flat[0], at = phys - flat
    if flat and at < p.arena_bytes and size <= p.arena_bytes - at:
        same[0] = size
        return p.arena + at
    return host_of_any(p, phys, size, same)


cdef char *host_of_any(verbs_priv *p, uint64_t phys, uint64_t size, uint64_t *same) noexcept nogil:
    cdef char *host
    phys_mem_read_lock(p.mem)
    same[0] = phys_mem_run(p.mem, phys, size, &host)
    phys_mem_read_unlock(p.mem)
    return host


cdef inline bint in_arena(verbs_priv *p, const char *host, uint64_t size) noexcept nogil:
    return host >= p.arena and host + size <= p.arena + p.arena_bytes


# ---- ranges ---------------------------------------------------------------------------------------------------------

cdef inline int new_range(verbs_priv *p, char *host, uint64_t size, unsigned int access, bint cached,
                          slot **out) noexcept nogil:
    cdef uint64_t pad = <uint64_t>host & (p.page - 1), nbytes = (pad + size + p.page - 1) & ~(p.page - 1)
    cdef slot *s
    cdef int rc
    lock_acquire(&p.lk)
    s = take_slot(p, RANGE, host - pad, nbytes)
    lock_release(&p.lk)
    if s == NULL:
        return -ENOMEM
    s.access = access
    # what is cached is whole pages, so that it serves their neighbours too; else the device may reach no byte more
    if cached:
        rc = enter(p, s, s.host, s.base, s.base + nbytes)
    else:
        rc = enter(p, s, host, s.base + pad, s.base + pad + size)
    if rc:
        lock_acquire(&p.lk)
        drop_slot(p, s)
        lock_release(&p.lk)
        return rc
    out[0] = s
    return 0


# a cached range that covers the bytes with these rights, or NULL. What it must become else: low, high, access
cdef slot *find_cached(verbs_priv *p, char **low, char **high, unsigned int *access) noexcept nogil:
    cdef uint32_t i = index_at(p, low[0])
    cdef slot *s
    while i < p.nr_index and p.index[i].host < high[0]:
        s = p.index[i]
        if s.host <= low[0] and high[0] <= s.host + s.bytes and s.access & access[0] == access[0]:
            return s
        low[0] = s.host if s.host < low[0] else low[0]
        high[0] = s.host + s.bytes if s.host + s.bytes > high[0] else high[0]
        access[0] |= s.access
        i += 1
    return NULL


# take the cached ranges of [low, high) out of the index, for a wider one to take their place; idle ones are listed to be
# undone
cdef slot *supersede(verbs_priv *p, const char *low, const char *high) noexcept nogil:
    cdef uint32_t i = index_at(p, low)
    cdef slot *s
    cdef slot *gone = NULL
    while i < p.nr_index and p.index[i].host < high:
        s = p.index[i]
        index_drop(p, s)
        if s.users == 0:
            idle_out(p, s)
            s.chain = gone
            gone = s
    return gone


cdef void dissolve_all(verbs_priv *p, slot *s) noexcept nogil:
    cdef slot *after
    while s != NULL:
        after = s.chain
        dissolve(p, s)
        s = after


cdef int cached_range(verbs_priv *p, char *host, uint64_t size, unsigned int access, slot **out) noexcept nogil:
    cdef char *low = <char *>(<uint64_t>host & ~(p.page - 1))
    cdef char *high = <char *>((<uint64_t>host + size + p.page - 1) & ~(p.page - 1))
    cdef unsigned int wanted = access
    cdef slot *s
    cdef slot *gone
    cdef int rc
    lock_acquire(&p.lk)
    s = find_cached(p, &low, &high, &wanted)
    if s != NULL:
        if s.users == 0:
            idle_out(p, s)
        s.users += 1
        lock_release(&p.lk)
        add(&p.n.hits, 1)
        out[0] = s
        return 0
    lock_release(&p.lk)
    add(&p.n.misses, 1)
    rc = new_range(p, low, high - low, wanted, True, &s)
    if rc == -ENOMEM:
        evict(p, 0)  # idle registrations are the first to give way
        rc = new_range(p, low, high - low, wanted, True, &s)
    if rc:
        return rc
    lock_acquire(&p.lk)
    gone = supersede(p, low, high)
    index_add(p, s)  # without room there it is not found again, and so undone at its unmap
    lock_release(&p.lk)
    dissolve_all(p, gone)
    out[0] = s
    return 0


# ---- windows --------------------------------------------------------------------------------------------------------

# an idle window of these bytes that begins with this page; it may turn out to hold other pages, and is made anew then
cdef slot *idle_window(verbs_priv *p, uint32_t page, uint64_t nbytes) noexcept nogil:
    cdef slot *s
    lock_acquire(&p.lk)
    s = p.buckets[bucket_of(page, nbytes)]
    while s != NULL and not (s.bytes == nbytes and s.held[0] == page):
        s = s.chain
    if s != NULL:
        idle_out(p, s)
        s.users, s.window = 1, 0
    lock_release(&p.lk)
    return s


cdef slot *new_window(verbs_priv *p, char *like, uint64_t nbytes) noexcept nogil:
    cdef slot *s
    if fail_now(p):
        return NULL
    lock_acquire(&p.lk)
    s = take_slot(p, WINDOW, <char *>(<uint64_t>like & ~(p.page - 1)), nbytes)
    lock_release(&p.lk)
    if s != NULL:
        add(&p.n.windows, 1)
        add(&p.n.window_bytes, nbytes)
    return s


# keep each page of a window from now on
cdef int keep_pages(verbs_priv *p, slot *s) noexcept nogil:
    cdef uint64_t n = (s.bytes >> p.shift), i
    if s.linked != NULL:
        return 0
    s.linked = <uint32_t *>calloc(2 * n, sizeof(uint32_t))
    if s.linked == NULL:
        return -ENOMEM
    s.held = s.linked + n
    for i in range(s.run):
        s.linked[i] = s.first + <uint32_t>i
    return 0


# note [at, at + size) of a window as long as its pages follow each other: True: done
cdef bint link_run(verbs_priv *p, slot *s, uint64_t phys, uint64_t at, uint64_t size) noexcept nogil:
    cdef uint64_t same = 0, i = (at >> p.shift)
    cdef uint32_t page
    cdef char *host
    if p.budget or s.linked != NULL or i != s.run:
        return False
    host = host_of(p, phys, size, &same)
    if host == NULL or same < size or not in_arena(p, host, size):
        return False
    page = <uint32_t>(((host - p.arena) >> p.shift)) + 1 - <uint32_t>i
    if i and page != s.first:
        return False
    s.first, s.run = page, <uint32_t>(((at + size - 1) >> p.shift)) + 1
    return True


cdef int link_pages(verbs_priv *p, slot *s, uint64_t phys, uint64_t at, uint64_t size) noexcept nogil:
    cdef uint64_t i = (at >> p.shift), first = i, last = ((at + size - 1) >> p.shift)
    cdef char *host
    cdef int rc
    if link_run(p, s, phys, at, size):
        return 0
    rc = keep_pages(p, s)
    if rc:
        return rc
    phys_mem_read_lock(p.mem)
    while i <= last:
        host = <char *>phys_mem_host(p.mem, phys)
        if host == NULL:
            rc = -EFAULT
        elif not in_arena(p, host, 1):
            rc = -EXDEV
        elif s.linked[i]:
            rc = -EADDRINUSE
        if rc:
            break
        s.linked[i] = <uint32_t>(((host - p.arena) >> p.shift)) + 1
        phys = (phys & ~(p.page - 1)) + p.page
        i += 1
    phys_mem_read_unlock(p.mem)
    if rc:
        memset(&s.linked[first], 0, (i - first) * sizeof(uint32_t))
    return rc


# whether pages follow each other in the arena as they do in the window
cdef bint in_order(const slot *s, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t i
    if s.linked == NULL:
        return last < s.run
    for i in range(first + 1, last + 1):
        if s.linked[i] != s.linked[i - 1] + 1:
            return False
    return s.linked[first] != 0


# virtual memory that shows nothing yet, on a page of the memfd's size
cdef char *reserve(verbs_priv *p, uint64_t nbytes) noexcept nogil:
    cdef uint64_t extra = p.page - FRAME, over
    cdef void *at = mmap(NULL, nbytes + extra, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef char *start
    if at == MAP_FAILED:
        return NULL
    add(&p.n.mmaps, 1)
    start = <char *>((<uint64_t>at + extra) & ~(p.page - 1))
    over = start - <char *>at
    if over:
        munmap(at, over)
    if extra - over:
        munmap(start + nbytes, extra - over)
    return start


# show the pages that are linked side by side: one mmap for those that follow each other in the arena
cdef int place_pages(verbs_priv *p, slot *s, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t i = first, n
    if s.linked == NULL:
        return -EFAULT  # not all of it was linked
    if s.there == NULL:
        s.there = <uint32_t *>calloc((s.bytes >> p.shift), sizeof(uint32_t))
        if s.there == NULL:
            return -ENOMEM
    if s.host == NULL:
        s.host = reserve(p, s.bytes)
        if s.host == NULL:
            return -ENOMEM
    while i <= last:
        if s.linked[i] == 0:
            return -EFAULT
        if s.there[i] == s.linked[i]:
            i += 1
            continue
        n = 1
        while i + n <= last and s.linked[i + n] == s.linked[i] + n and s.there[i + n] != s.linked[i + n]:
            n += 1
        if mmap(s.host + i * p.page, n * p.page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, p.fd,
                <long>((s.linked[i] - 1) * p.page)) == MAP_FAILED:
            p.refused = 0
            return -ENOMEM
        add(&p.n.mmaps, 1)
        memcpy(&s.there[i], &s.linked[i], n * sizeof(uint32_t))
        i += n
    return 0


# whether what was registered last is what is linked now
cdef bint unchanged(slot *s, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t i
    if s.linked == NULL:
        return last < s.run
    for i in range(first, last + 1):
        if s.linked[i] == 0 or s.held[i] != s.linked[i]:
            return False
    return True


cdef bint window_holds(verbs_priv *p, slot *s, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t i
    for i in range((s.bytes >> p.shift) if s.held != NULL else 0):
        if first <= s.held[i] <= last:
            return True
    return False


# make [start, end) of a window one registration, unless it is in one already
cdef int register_window(verbs_priv *p, slot *s, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t first = ((start - s.base) >> p.shift), last = ((end - 1 - s.base) >> p.shift)
    cdef char *host
    cdef int rc
    if reg_over(s, start, end) != NULL and unchanged(s, first, last):
        if p.budget:
            add(&p.n.hits, 1)
        return 0
    if p.budget:  # what was cached on these pages; else what an earlier sync of these bytes made
        add(&p.n.misses, 1)
        rc = leave(p, s, s.base + first * p.page, s.base + (last + 1) * p.page)
    else:
        rc = leave(p, s, start, end)
    if rc:
        return rc
    if in_order(s, first, last):
        host = p.arena + ((s.first + first if s.linked == NULL else s.linked[first]) - 1) * p.page
    else:
        rc = place_pages(p, s, first, last)
        if rc:
            return rc
        host = s.host + first * p.page
    host += start & (p.page - 1)
    rc = enter(p, s, host, start, end)
    if rc == -ENOMEM and p.budget:
        evict(p, 0)  # idle registrations are the first to give way
        rc = enter(p, s, host, start, end)
    if rc == 0 and s.linked != NULL:
        memcpy(&s.held[first], &s.linked[first], (last - first + 1) * sizeof(uint32_t))
    return rc


# ---- the ops --------------------------------------------------------------------------------------------------------

cdef int verbs_try_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef uint64_t pad = phys.v & (p.page - 1), nbytes = (pad + size + p.page - 1) & ~(p.page - 1), same = 0
    cdef uint32_t page = 0
    cdef char *host
    cdef slot *s = NULL
    st.addr.v = st.size = 0
    if p.mode != LINEAR or size == 0 or size > p.max_mr or size >> (SLOT_SHIFT - 1):
        return 0
    host = host_of(p, phys.v, 1, &same)
    if p.budget and host != NULL and in_arena(p, host, 1):
        page = <uint32_t>(((host - p.arena) >> p.shift)) + 1
        s = idle_window(p, page, nbytes)
    if s == NULL:
        s = new_window(p, host, nbytes)
    if s == NULL:
        return 0
    st.addr.v, st.size = s.base + pad, size
    return 1


cdef int verbs_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                    dma_data_direction dir, unsigned long attrs) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef slot *s = slot_of(p, st.addr.v)
    cdef uint64_t at
    cdef unsigned int access = rights(p, dir)
    cdef int rc
    if s == NULL or s.kind != WINDOW or s.window:
        return -EINVAL
    if size == 0 or dir == DMA_NONE:
        return -EINVAL
    if attrs & DMA_ATTR_MMIO:
        return -EOPNOTSUPP
    if offset > st.size or size > st.size - offset:
        return -ERANGE
    at = st.addr.v - s.base + offset
    if offset and phys.v & (p.page - 1):
        return -EIO
    if (at ^ phys.v) & (p.page - 1):
        return -EINVAL
    rc = link_pages(p, s, phys.v, at, size)
    if rc:
        return rc
    if s.access | access != s.access and s.regs != NULL:
        rc = leave(p, s, 0, UINT64_MAX)  # a cached registration with other rights
    s.access |= access
    add(&p.n.links, 1)
    return rc


cdef int verbs_sync(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef slot *s = slot_of(p, st.addr.v)
    cdef int rc
    if s == NULL or s.kind != WINDOW:
        return -EINVAL
    if size == 0 or offset > st.size or size > st.size - offset:
        return -ERANGE
    rc = register_window(p, s, st.addr.v + offset, st.addr.v + offset + size)
    if rc == 0:
        add(&p.n.syncs, 1)
    return rc


cdef int verbs_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                      unsigned long attrs) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef slot *s = slot_of(p, st.addr.v)
    cdef uint64_t i, first, last, low, high
    cdef bint whole
    cdef reg *r
    cdef int rc = 0
    if s == NULL or s.kind != WINDOW:
        return -EINVAL
    if size == 0 or offset > st.size or size > st.size - offset:
        return -ERANGE
    first = ((st.addr.v - s.base + offset) >> p.shift)
    last = ((st.addr.v - s.base + offset + size - 1) >> p.shift)
    whole = s.linked == NULL and first == 0 and last + 1 == s.run
    if s.linked == NULL and last >= s.run:
        return -ENOENT
    if not whole:
        rc = keep_pages(p, s)
        if rc:
            return rc
        for i in range(first, last + 1):
            if s.linked[i] == 0:
                return -ENOENT
    low, high = s.base + first * p.page, s.base + (last + 1) * p.page
    r = s.regs
    while r != NULL:  # keys are whole or gone: a registration that reaches beyond cannot lose a part
        if r.start < high and r.end > low and (r.start < low or r.end > high):
            return -EBUSY
        r = r.next
    if not p.budget:
        rc = leave(p, s, low, high)
    if rc:
        return rc
    if whole:
        s.run = 0
    else:
        memset(&s.linked[first], 0, (last - first + 1) * sizeof(uint32_t))
    add(&p.n.unlinks, 1)
    return 0


cdef int verbs_free(dma_device *dev, dma_iova_state *st) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef slot *s = slot_of(p, st.addr.v)
    cdef int rc
    if s == NULL or s.kind != WINDOW:
        return -EINVAL
    s.run = 0
    if s.linked != NULL:
        memset(s.linked, 0, (s.bytes >> p.shift) * sizeof(uint32_t))
    rc = release(p, s)
    if rc == 0:
        st.addr.v = st.size = 0
    return rc


# memory that is one run of physical addresses but not of this process's: a window of its own
cdef int window_for(verbs_priv *p, uint64_t phys, uint64_t size, unsigned int access, slot **out) noexcept nogil:
    cdef uint64_t pad = phys & (p.page - 1)
    cdef slot *s = NULL
    cdef int rc
    if not size >> (SLOT_SHIFT - 1):
        s = new_window(p, NULL, (pad + size + p.page - 1) & ~(p.page - 1))
    if s == NULL:
        return -ENOMEM
    s.window, s.access = 1, access
    rc = link_pages(p, s, phys, pad, size)
    if rc == 0:
        rc = register_window(p, s, s.base + pad, s.base + pad + size)
    if rc:
        s.users = 0
        dissolve(p, s)
        return -EFAULT if rc == -EXDEV else rc
    out[0] = s
    return 0


cdef int verbs_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                        dma_addr_t *out) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef uint64_t same = 0
    cdef unsigned int access = rights(p, dir)
    cdef char *host
    cdef slot *s = NULL
    cdef int rc = 0
    out.v = UINT64_MAX
    if dir == DMA_NONE or size == 0:
        return -EINVAL
    if attrs & DMA_ATTR_MMIO:
        return -EOPNOTSUPP
    host = host_of(p, phys.v, size, &same)
    if host == NULL:
        return -EFAULT
    if p.mode == DIRECT:
        if same < size or not in_arena(p, host, size):
            return -EFAULT
        s = slot_at(p, 0)
    elif same < size:
        rc = window_for(p, phys.v, size, access, &s)
    elif p.budget and in_arena(p, host, size):
        rc = cached_range(p, host, size, access, &s)
    else:
        # a buffer that its owner may unmap or remap at any time: a registration that outlives the mapping could not be
        # trusted
        if p.budget:
            add(&p.n.uncacheable, 1)
        rc = new_range(p, host, size, access, False, &s)
    if rc:
        return rc
    out.v = s.base + (phys.v & (p.page - 1)) if s.window else s.base + <uint64_t>(host - s.host)
    add(&p.n.maps, 1)
    return 0


cdef int verbs_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                          unsigned long attrs) noexcept nogil:
    cdef verbs_priv *p = priv(dev)
    cdef slot *s = slot_of(p, addr.v)
    cdef int rc = 0
    if s == NULL or (s.kind == WINDOW and not s.window) or size > s.bytes - (addr.v - s.base):
        return -ENOENT
    if p.mode != DIRECT:
        rc = release(p, s)
    if rc == 0:
        add(&p.n.unmaps, 1)
    return rc


cdef uint64_t verbs_merge_boundary(dma_device *dev) noexcept nogil:
    return 0 if priv(dev).mode == DIRECT else priv(dev).page - 1


cdef int verbs_need_unmap(dma_device *dev) noexcept nogil:
    return priv(dev).mode != DIRECT


cdef int verbs_keys_of(dma_device *dev, dma_addr_t addr, uint64_t size, dma_keys *out) noexcept nogil:
    cdef slot *s = slot_of(priv(dev), addr.v)
    cdef reg *r = NULL
    if s != NULL and size <= s.bytes - (addr.v - s.base):
        r = reg_over(s, addr.v, addr.v + size)
    if r == NULL:
        return -ENOENT
    out.lkey, out.rkey = r.mr.lkey, r.mr.rkey
    return 0


cdef int verbs_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write,
                      dma_fault *fault) noexcept with gil:
    cdef uint64_t done = 0
    try:
        return (<Verbs>priv(dev).owner).move(dev, addr.v, n, <char *>buf, write, &done)
    except CompletionError:
        return dma_fault_at(fault, addr.v, done, DMA_FAULT_BUS, write)
    except Exception as e:
        sys.excepthook(type(e), e, e.__traceback__)  # not the access was refused: something is wrong
        return dma_fault_at(fault, addr.v, done, DMA_FAULT_BUS, write)


cdef dma_bus_ops verbs_bus
verbs_bus.access = verbs_access


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Verbs:
    """The back end of one Device on real RDMA: ``Device(backend=Verbs(pd, memory), memory=memory)``.

    Segments carry ``lkey`` and ``rkey``; addresses are the registrations' own. In every mode but ``direct`` the rights
    follow the direction (to_device: a remote side may read; from_device: the device and a remote side may write).

    Parameters
    ----------
    pd : Pd
        Where registrations are made; the user's own pyverbs PD through ``Pd(pd)``.
    memory : PhysMemory
        The machine. Linear windows are made of its arena's pages; buffers in place are mapped range by range.
    mode : "linear", "per-range" or "direct"
    cache : int
        Bytes of registrations to keep after their unmap (0: none), least recently used first to go. A remote side may still
        reach what is kept, as with a lazy IOMMU. Only the arena is cached, whose pages go nowhere without
        ``PhysMemory.discard`` telling; a buffer that its owner may remap is registered for each mapping (counted as
        ``uncacheable``).
    access : int or None
        Rights of every registration (enum ibv_access_flags); None: by direction. ON_DEMAND wants a device whose self-test
        passes.

    Raises NotSupportedError where the device's self-test fails (``dmapath.verbs.probe``).
    """

    def __cinit__(self, Pd pd not None, PhysMemory memory not None, *, mode="linear", cache=0, access=None):
        cdef slot *s
        cdef int rc
        if mode not in MODES:
            raise DmaValueError("linear, per-range or direct", argument="mode", value=mode)
        if access is not None:
            check_access(access & ~ON_DEMAND)
            if access & ON_DEMAND:
                require(pd, "odp")
        require(pd, "mr")
        self.pd, self.memory, self.mode = pd, memory, mode
        self.engine, self.engine_lock = None, threading.Lock()
        p = &self.p
        p.pd, p.mem, p.owner = pd.ptr(), memory.mem, <void *>self
        p.theirs = pd.watch()
        p.forks = fork_count()
        p.born = p.forks[0]
        p.flat = &memory.flat
        p.arena, p.arena_bytes, p.fd, p.page = memory.arena, memory.size, memory.fd, memory.backing_page
        p.shift = memory.backing_page.bit_length() - 1
        p.mode, p.by_direction, p.access = MODES[mode], access is None, access or 0
        p.atomic = RA if pd.context.attr["atomic"] else 0
        p.max_mr = pd.context.attr["max_mr_size"]
        p.budget = as_length(cache, "cache", least=0)
        if p.budget and mode == "direct":
            raise DmaValueError("0 in mode direct, which registers once", argument="cache", value=cache)
        p.chunks = <slot **>calloc(CHUNKS, sizeof(slot *))
        p.buckets = <slot **>calloc(BUCKETS, sizeof(slot *))
        if p.chunks == NULL or p.buckets == NULL:
            raise MemoryError("no memory for registrations")
        if mode == "direct":
            s = take_slot(p, RANGE, p.arena, p.arena_bytes)
            if s == NULL:
                raise MemoryError("no memory for registrations")
            s.access = rights(p, DMA_BIDIRECTIONAL)
            rc = enter(p, s, s.host, s.base, s.base + s.bytes)
            if rc:
                raise NotSupportedError(self.why(-rc) or "the arena cannot be registered", errno=-rc, argument="memory",
                                        value=memory)
        memory.notifiers.add(self)
        pd.made.add(self)

    def attach(self, device):
        """Called by the Device that maps on it."""
        if device.memory is not self.memory:
            raise DmaValueError("the PhysMemory of its back end", argument="memory", value=device.memory)
        if device.dma_mask != 2**64 - 1:
            raise DmaValueError("64 bits: an RDMA device is told virtual addresses", argument="dma_mask",
                                value=device.dma_mask)
        device.narrow(min(self.p.max_mr, 2**63 - 1))

    @property
    def dma_ops(self):
        """The door for a Device: a capsule with the ops table."""
        self.ops = dma_ops(abi=DMAPATH_ABI, size=sizeof(dma_ops), name=b"verbs", map_phys=verbs_map_phys,
                           unmap_phys=verbs_unmap_phys, iova_try_alloc=verbs_try_alloc, iova_link=verbs_link,
                           iova_link_vec=NULL, iova_link_gapped=NULL, iova_sync=verbs_sync, iova_unlink=verbs_unlink,
                           iova_free=verbs_free, map_sg=NULL, unmap_sg=NULL, sync_for_cpu=NULL, sync_for_device=NULL,
                           merge_boundary=verbs_merge_boundary, need_unmap=verbs_need_unmap, is_bounced=NULL,
                           keys_of=verbs_keys_of)
        capsule = PyCapsule_New(&self.ops, DMAPATH_OPS_CAPSULE, NULL)
        PyCapsule_SetContext(capsule, &self.p)
        return capsule

    @property
    def dma_bus(self):
        """The same for simulated devices: what they read and write goes through the real one, over a queue pair to
        itself."""
        return PyCapsule_New(<void *>&verbs_bus, DMAPATH_BUS_CAPSULE, NULL)

    # n bytes between a buffer and mapped memory, as a remote side would move them; done: what was moved before a fault
    cdef int move(self, dma_device *dev, uint64_t addr, uint64_t n, char *buf, int write, uint64_t *done) except? -1:
        cdef dma_keys keys
        cdef char[::1] stage
        cdef uint64_t part
        with self.engine_lock:
            if self.engine is None:
                self.engine = Engine(self.pd)
            stage = self.engine.buffer
            while done[0] < n:
                part = min(n - done[0], <uint64_t>stage.shape[0])
                if verbs_keys_of(dev, dma_addr(addr + done[0]), part, &keys):
                    keys.rkey = 0  # nothing is mapped there: the device itself says so
                if write:
                    memcpy(&stage[0], buf + done[0], part)
                self.engine.move("write" if write else "read", part, addr + done[0], keys.rkey)
                if not write:
                    memcpy(buf + done[0], &stage[0], part)
                done[0] += part
        return 0

    def fresh(self):
        """Another of the same kind, with nothing mapped."""
        return Verbs(self.pd, self.memory, mode=self.mode, cache=self.p.budget,
                     access=None if self.p.by_direction else self.p.access)

    def counters(self):
        """Exact counts under the names of ``dmapath.COUNTERS`` (a window is an IOVA range, a deregistration an
        invalidation), and ``registrations``, ``deregistrations``, ``registered_bytes`` and ``registered_live`` (bytes now),
        ``mmaps``; of the cache ``cache_hits``, ``cache_misses``, ``cache_evictions``, ``cache_invalidated``,
        ``uncacheable``, ``cache_bytes`` (idle now)."""
        cdef uint64_t windows = 0, window_bytes = 0, mapped = 0
        cdef uint32_t i
        cdef slot *s
        cdef reg *r
        lock_acquire(&self.p.lk)
        for i in range(1 if self.p.mode == DIRECT else 0, self.p.nr_slots):
            s = slot_at(&self.p, i)
            if s.kind == UNUSED or s.users == 0:
                continue
            if s.kind == WINDOW:
                windows += 1
                window_bytes += s.bytes
            r = s.regs
            while r != NULL:
                mapped += r.end - r.start
                r = r.next
        lock_release(&self.p.lk)
        n = self.p.n
        return {**dict.fromkeys(COUNTERS, 0), "iova_allocs": n.windows, "iova_frees": n.window_frees,
                "iova_live": windows, "iova_bytes": n.window_bytes, "iova_live_bytes": window_bytes,
                "links": n.links, "syncs": n.syncs, "unlinks": n.unlinks, "maps": n.maps, "unmaps": n.unmaps,
                "invalidations": n.deregistrations, "mapped_bytes": mapped, "registrations": n.registrations,
                "deregistrations": n.deregistrations, "registered_bytes": n.registered_bytes,
                "registered_live": n.registered_bytes - n.deregistered_bytes,
                "mmaps": n.mmaps, "cache_hits": n.hits, "cache_misses": n.misses, "cache_evictions": n.evictions,
                "cache_invalidated": n.invalidated, "uncacheable": n.uncacheable, "cache_bytes": self.p.idle_bytes}

    def why(self, code):
        """Why the last call failed with this errno."""
        if code == _errno.ENOMEM:
            if self.p.refused:
                return f"{pin_text(self.p.refused)} [ibv_reg_mr]"
            return "no memory for a window, or it would be of more pieces than vm.max_map_count allows [mmap]"
        return {
            _errno.EFAULT: "no memory is there, or in mode direct none of the arena that is registered [ibv_reg_mr]",
            _errno.EBUSY: "a registration is whole or gone: a part of it cannot be unlinked, nor can one that a memory "
                          "window is bound to [ibv_dereg_mr]",
            _errno.EOPNOTSUPP: "the device cannot register such memory: a peer's (no dma-buf), or with these rights "
                               "[ibv_reg_mr]",
            _errno.ENODEV: "the device was removed, its owner closed the protection domain, or this is a child of the "
                           "process that opened it [ibv_reg_mr]",
        }.get(code)

    def fail_nth(self, long n):
        """Make the nth registration or window from now fail (1: the next; 0: none). Returns what was left of the last
        order."""
        left, self.p.fail_nth = self.p.fail_nth, n
        return left

    def flush(self):
        """Deregister everything that is cached and not in use."""
        evict(&self.p, 0)

    def invalidate_start(self, memory, uint64_t offset, uint64_t length):
        """Called before pages of the arena go: cached registrations of them go first."""
        cdef char *low = self.p.arena + offset
        cdef slot *gone
        cdef slot *s
        cdef uint64_t first = (offset >> self.p.shift) + 1, last = ((offset + length - 1) >> self.p.shift) + 1
        cdef uint32_t i
        lock_acquire(&self.p.lk)
        gone = supersede(&self.p, low, low + length)
        s = gone
        while s != NULL:
            self.p.n.invalidated += 1
            s = s.chain
        for i in range(self.p.nr_slots):
            s = slot_at(&self.p, i)
            if s.kind == WINDOW and window_holds(&self.p, s, first, last):
                self.p.n.invalidated += 1
                if s.users:
                    s.doomed = 1  # in use: not kept after, nor believed by a sync until then
                    memset(s.held, 0, (s.bytes >> self.p.shift) * sizeof(uint32_t))
                else:
                    idle_out(&self.p, s)
                    s.chain = gone
                    gone = s
        lock_release(&self.p.lk)
        with nogil:
            dissolve_all(&self.p, gone)

    def invalidate_end(self):
        """Called after they went."""

    def covers(self, entry, write):
        """Whether an entry (address, bytes, lkey) of a work request lies in a registration, with the right to write it where
        wanted."""
        cdef uint64_t addr = entry[0], end = entry[0] + entry[1]
        cdef uint32_t key = entry[2]
        cdef slot *s = slot_of(&self.p, addr)
        cdef reg *r = s.regs if s != NULL else NULL
        while r != NULL and not (r.start <= addr and end <= r.end and r.mr.lkey == key):
            r = r.next
        return r != NULL and (not write or s.access & LW != 0)

    def pyverbs(self, segment):
        """A real pyverbs MR over the bytes of a mapped segment, with its rights. It is a registration of its own, with an
        address and keys of its own (pyverbs cannot adopt one): close it before the unmap. Needs a Pd of pyverbs' own."""
        cdef uint64_t addr = int(segment.addr)
        cdef slot *s = slot_of(&self.p, addr)
        cdef reg *r = NULL
        if s != NULL:
            r = reg_over(s, addr, addr + <uint64_t>segment.length)
        if r == NULL:
            raise StateError("a segment that is mapped here", argument="segment", value=segment)
        return pyverbs_mr(self.pd.owner, <uintptr_t>r.mr.addr + (addr - r.start), segment.length, s.access)

    def close(self):
        """Deregister everything, mapped or cached. Mappings that are still held fail at their unmap."""
        cdef uint32_t i
        cdef slot *s
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        if self.p.chunks == NULL or not self.pd.context.alive():
            return
        while self.p.oldest != NULL:
            s = evict_one(&self.p, 0)
            dissolve(&self.p, s)
        for i in range(self.p.nr_slots):
            s = slot_at(&self.p, i)
            if s.kind != UNUSED:
                index_drop(&self.p, s)
                dissolve(&self.p, s)

    def abandon(self):
        """As ``close``."""
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)

    def __dealloc__(self):
        cdef uint32_t i
        if self.p.chunks != NULL and self.pd is not None:
            self.close()
        if self.p.chunks != NULL:
            for i in range(self.p.nr_slots // CHUNK):
                free(self.p.chunks[i])
        free(self.p.chunks)
        free(self.p.buckets)
        free(self.p.index)

    def __repr__(self):
        return f"Verbs({self.pd.context!r}, mode={self.mode!r}{f', cache={self.p.budget}' if self.p.budget else ''})"


class Engine:
    """The device's side of ``DmaEngine`` on verbs: a queue pair to itself and a buffer to move bytes through."""

    def __init__(self, pd, size=1 << 18):
        self.buffer = bytearray(size)
        self.qps = loopback(pd, max_send_wr=4, max_recv_wr=1, max_sge=1)
        self.mr = Mr(pd, self.buffer, access=LOCAL_WRITE)

    def move(self, opcode, n, addr, rkey):
        """RDMA READ or WRITE of n bytes; CompletionError after putting the queue pairs right again."""
        try:
            getattr(self.qps[0], opcode)([self.mr.segment(0, n)], addr, rkey)
        except CompletionError:
            for qp in self.qps:
                qp.recover()
            raise

    def close(self):
        """Give everything back."""
        for qp in self.qps:
            qp.close()
        self.mr.dereg()
