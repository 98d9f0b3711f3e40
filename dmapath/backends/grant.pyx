# cython: language_level=3
"""Xen grant DMA: a device in another domain sees only pages that were granted to it; its addresses are grant references
(drivers/xen/grant-dma-ops.c)."""
cimport cython
from libc.errno cimport EINVAL, EIO, ENODEV, ENOMEM, EOPNOTSUPP
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from dmapath._core cimport (
    add_atomic, lock, lock_acquire, lock_release, phys_mem_copy, phys_mem_read_lock, phys_mem_read_unlock,
)
from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_FAULT_BUS, DMA_FAULT_NOT_PRESENT, DMA_FAULT_WRITE, DMA_NONE, DMA_TO_DEVICE, DMAPATH_ABI,
    dma_addr, dma_addr_t, dma_bus_ops, dma_data_direction, dma_device, dma_fault, dma_fault_at, dma_ops,
    dma_ops_init, dma_range_wraps, dma_seg, phys_addr_t, phys_vec,
)
from dmapath.backends.base cimport Backend

from dmapath.addr import as_dma, as_length
from dmapath.backends.base import COUNTERS
from dmapath.errors import DmaValueError, StateError

cdef uint64_t GRANT = 1ULL << 63  # XEN_GRANT_DMA_ADDR_OFF


cdef struct grant_entry:
    uint64_t phys       # page
    bint given, readonly
    uint32_t held       # times that the other domain has it mapped

cdef struct grant_table:
    lock guard
    grant_entry *e
    uint32_t size, used
    bint broken
    uint64_t maps, unmaps, sg_maps, sg_unmaps, faults


cdef inline grant_table *table_of(dma_device *dev) noexcept nogil:
    return <grant_table *>dev.priv


# pages that a range touches; more than the table has, however many more
cdef inline uint64_t pages_of(grant_table *t, uint64_t off, uint64_t size) noexcept nogil:
    return t.size if size > <uint64_t>t.size << 12 else (off + size + 4095) >> 12


# gnttab_alloc_grant_reference_seq: the first of n free references in a row, or 0
cdef uint32_t find_run(grant_table *t, uint32_t n) noexcept nogil:
    cdef uint32_t ref, run = 0
    for ref in range(1, t.size):
        run = 0 if t.e[ref].given else run + 1
        if run == n:
            return ref - n + 1
    return 0


# xen_grant_dma_map_page
cdef int map_run(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                 dma_addr_t *out) noexcept nogil:
    cdef grant_table *t = table_of(dev)
    cdef uint64_t off = phys.v & 4095, pages = pages_of(t, off, size)
    cdef uint32_t ref, i
    out.v = UINT64_MAX
    if dir == DMA_NONE or size == 0:
        return -EINVAL
    if attrs & DMA_ATTR_MMIO:
        return -EOPNOTSUPP
    if t.broken:
        return -ENODEV
    lock_acquire(&t.guard)
    ref = find_run(t, <uint32_t>pages) if pages < t.size and not dma_range_wraps(phys.v, size) else 0
    for i in range(<uint32_t>pages if ref else 0):
        t.e[ref + i].phys = phys.v - off + (<uint64_t>i << 12)
        t.e[ref + i].given, t.e[ref + i].readonly = True, dir == DMA_TO_DEVICE
    t.used += <uint32_t>pages if ref else 0
    lock_release(&t.guard)
    if ref == 0:
        return -ENOMEM
    out[0] = dma_addr(GRANT | <uint64_t>ref << 12 | off)
    return 0


# xen_grant_dma_unmap_page: a grant that the other side still has mapped cannot be taken back; the device is done for
cdef void unmap_run(dma_device *dev, dma_addr_t addr, uint64_t size) noexcept nogil:
    cdef grant_table *t = table_of(dev)
    cdef uint64_t pages = pages_of(t, addr.v & 4095, size), ref = (addr.v & ~GRANT) >> 12, i
    if t.broken:
        return
    lock_acquire(&t.guard)
    for i in range(pages):
        if ref + i >= t.size or not t.e[ref + i].given or t.e[ref + i].held:
            t.broken = True
            break
        t.e[ref + i].given = False
        t.used -= 1
    lock_release(&t.guard)


cdef int grant_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                        dma_addr_t *out) noexcept nogil:
    cdef int rc = map_run(dev, phys, size, dir, attrs, out)
    if rc == 0:
        add_atomic(&table_of(dev).maps, 1)
    return rc


cdef int grant_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                          unsigned long attrs) noexcept nogil:
    unmap_run(dev, addr, size)
    add_atomic(&table_of(dev).unmaps, 1)
    return -ENODEV if table_of(dev).broken else 0


cdef int grant_map_sg(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                      dma_seg *out) noexcept nogil:
    cdef uint32_t i, j
    for i in range(n):
        if map_run(dev, v[i].paddr, v[i].len, dir, attrs, &out[i].addr):
            for j in range(i):
                unmap_run(dev, out[j].addr, out[j].len)
            return -EIO
        out[i].len = v[i].len
    add_atomic(&table_of(dev).sg_maps, 1)
    return <int>n


cdef int grant_unmap_sg(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                        unsigned long attrs) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        unmap_run(dev, s[i].addr, s[i].len)
    add_atomic(&table_of(dev).sg_unmaps, 1)
    return -ENODEV if table_of(dev).broken else 0


cdef uint32_t granted(grant_table *t, uint64_t at, int write, uint64_t *phys) noexcept nogil:
    cdef uint64_t ref = (at & ~GRANT) >> 12
    cdef uint32_t reason = 0
    lock_acquire(&t.guard)
    if not at & GRANT or ref >= t.size or not t.e[ref].given:
        reason = DMA_FAULT_NOT_PRESENT
    elif write and t.e[ref].readonly:
        reason = DMA_FAULT_WRITE
    else:
        phys[0] = t.e[ref].phys + (at & 4095)
    lock_release(&t.guard)
    return reason


cdef int grant_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write,
                      dma_fault *fault) noexcept nogil:
    cdef grant_table *t = table_of(dev)
    cdef uint64_t done = 0, part, at, phys = 0
    cdef uint32_t reason = 0
    phys_mem_read_lock(dev.mem)
    while done < n and not reason:
        at = addr.v + done
        part = 4096 - (at & 4095)
        part = part if part < n - done else n - done
        reason = granted(t, at, write, &phys)
        if not reason:
            done += phys_mem_copy(dev.mem, phys, <char *>buf + done, part, write != 0)
            if addr.v + done != at + part:
                reason = DMA_FAULT_BUS
    phys_mem_read_unlock(dev.mem)
    if not reason:
        return 0
    add_atomic(&t.faults, 1)
    return dma_fault_at(fault, addr.v, done, reason, write)


cdef dma_bus_ops grant_bus
grant_bus.access = grant_access


@cython.no_gc_clear
cdef class GrantTable:
    """Grant references that a guest can give out to one device's backend in another domain.

    Parameters
    ----------
    entries : int
        Pages that can be granted at a time.
    """

    cdef grant_table t

    def __cinit__(self, entries=4096):
        entries = as_length(entries, "entries", last=1 << 24)
        self.t.size = entries + 1  # reference 0 is never given
        self.t.e = <grant_entry *>calloc(self.t.size, sizeof(grant_entry))
        if self.t.e == NULL:
            raise MemoryError("no memory for the grants")

    def __dealloc__(self):
        free(self.t.e)

    def __repr__(self):
        return f"GrantTable({self.t.size - 1})"

    def fresh(self):
        """An empty table of the same size."""
        return GrantTable(self.t.size - 1)

    @property
    def used(self):
        """Pages granted now."""
        return self.t.used

    @property
    def broken(self):
        """Whether an unmap met a grant that the other domain still had mapped: the device maps nothing any more."""
        return self.t.broken

    def hold(self, addr):
        """The other domain maps the page of a DMA address (and may keep it longer than it should)."""
        self._change(addr, 1)

    def release(self, addr):
        """The other domain unmaps it."""
        self._change(addr, -1)

    def _change(self, addr, by):
        cdef uint64_t at = as_dma(addr), ref = (at & ~GRANT) >> 12
        if not at & GRANT or ref >= self.t.size or not self.t.e[ref].given:
            raise DmaValueError("a granted page's address", argument="addr", value=at)
        if by < 0 and not self.t.e[ref].held:
            raise StateError("the other domain does not have it mapped", argument="addr", value=at)
        self.t.e[ref].held += by


@cython.no_gc_clear  # mappings are given back through it
cdef class GrantBackend(Backend):
    """Xen grant DMA: DMA address = bit 63 | grant reference << 12 | offset. No bounce, no sync, no merging."""

    cdef GrantTable table
    name = "grant"

    def __cinit__(self, GrantTable table not None):
        cdef dma_ops mine
        mine = dma_ops(abi=DMAPATH_ABI, size=sizeof(dma_ops), name=b"grant", map_phys=grant_map_phys,
                       unmap_phys=grant_unmap_phys, iova_try_alloc=NULL, iova_link=NULL, iova_link_vec=NULL,
                       iova_link_gapped=NULL, iova_sync=NULL, iova_unlink=NULL, iova_free=NULL, map_sg=grant_map_sg,
                       unmap_sg=grant_unmap_sg, sync_for_cpu=NULL, sync_for_device=NULL, merge_boundary=NULL,
                       need_unmap=NULL, is_bounced=NULL, keys_of=NULL)
        dma_ops_init(&self.ops, &mine)
        self.table, self.native = table, True

    cdef int attach(self, dma_device *dev) except -1:
        if dev.dma_mask != UINT64_MAX:
            raise DmaValueError("64 bits: grant addresses begin at bit 63 (xen_grant_dma_supported)", argument="dma_mask",
                                value=dev.dma_mask)
        dev.ops = &self.ops
        dev.priv = &self.table.t
        dev.bus = &grant_bus
        return 0

    def counters(self):
        """Exact counts; what a grant has no notion of is 0."""
        out = dict.fromkeys(COUNTERS, 0)
        out.update(maps=self.table.t.maps, unmaps=self.table.t.unmaps, sg_maps=self.table.t.sg_maps,
                   sg_unmaps=self.table.t.sg_unmaps, faults=self.table.t.faults,
                   mapped_bytes=self.table.t.used * 4096)
        return out
