# cython: language_level=3
"""A Xen guest: its physical frames are backed by machine frames, and those are what devices are told
(drivers/xen/swiotlb-xen.c, arch/x86/xen/p2m.c)."""
import random

cimport cython
from libc.errno cimport EEXIST, EINVAL
from libc.stdint cimport UINT64_MAX, uint64_t

from dmapath._core cimport (
    phys_mem_host, xen_clear, xen_destroy, xen_init, xen_machine, xen_mergeable, xen_phys, xen_set,
)
from dmapath.abi cimport dma_device
from dmapath.memory cimport PhysMemory
from dmapath.swiotlb cimport Swiotlb

from dmapath.addr import PhysAddr, as_length, as_phys
from dmapath.errors import DmaValueError, StateError, error_for

PAGE = 4096
SEGMENT = 256 << 10


@cython.no_gc_clear
cdef class XenDomain:
    """A PV guest with devices of its own. ``Device(xen=domain)`` maps by machine frames and bounces where that cannot work.

    Parameters
    ----------
    memory : PhysMemory
        The guest's physical memory; every page of its arena gets a machine frame.
    pool : Swiotlb or None
        The guest's bounce pool: made contiguous in machine memory per 256 KiB, below 4 GiB (xen_swiotlb_fixup).
    layout : "scattered" or "contiguous"
        Machine frames of the arena: no two follow each other, or in order.
    base : int
        Lowest machine address of the arena.
    seed : int
        Of the order.
    arm : bool
        ARM's rule: other domains' pages bounce for devices that are not coherent.
    """

    def __cinit__(self, PhysMemory memory not None, *, Swiotlb pool=None, layout="scattered", base=1 << 40, seed=0,
                  arm=False):
        if layout not in ("scattered", "contiguous"):
            raise DmaValueError("scattered or contiguous", argument="layout", value=layout)
        if as_phys(base, "base") & (PAGE - 1) or not base:
            raise DmaValueError("a multiple of 4096, not 0", argument="base", value=base)
        if xen_init(&self.c, arm):
            raise MemoryError("no memory for the frame tables")
        self.ready = True
        self.memory, self.layout, self.foreign_ = memory, layout, {}
        self.next_machine_ = base
        self.low_ = 0x10000000  # below the pool's
        self.populate(memory.vecs(0, len(memory)), seed=seed)
        if pool is not None:
            for i in range(pool.slots * 2048 // PAGE):
                self._set(pool.base + i * PAGE, 0x10000000 + i * PAGE, False)

    def __dealloc__(self):
        if self.ready:
            xen_destroy(&self.c)

    def __repr__(self):
        return f"XenDomain({self.memory!r}, layout={self.layout!r})"

    cdef attach(self, dma_device *dev):
        dev.limits.mergeable = xen_mergeable
        dev.limits.machine = &self.c

    cdef _set(self, uint64_t phys, uint64_t machine, bint foreign):
        rc = xen_set(&self.c, phys, machine, foreign)
        if rc:
            raise error_for(-rc, "the frame is backed already" if rc == -EEXIST else "no memory, or beyond 52 bits",
                            "phys", phys)

    def populate(self, vecs, *, seed=0):
        """Back page-aligned physical runs ``[(phys, bytes), ...]`` (of a HostBuffer, say) with machine frames."""
        pages = [int(at) + i for at, n in vecs for i in range(0, n, PAGE)]
        step = 2 if self.layout == "scattered" else 1
        order = list(range(len(pages)))
        if step == 2:
            random.Random(seed).shuffle(order)
        first = self.next_machine_
        self.next_machine_ += (step * len(pages) + 1) * PAGE
        for page, i in zip(pages, order):
            if page & (PAGE - 1):
                raise DmaValueError("whole pages", argument="vecs", value=page)
            self._set(page, first + step * i * PAGE, False)

    def back_in_order(self, phys, size, limit):
        """Back physical pages with machine frames that follow each other, ending at ``limit`` at most (xen_swiotlb_alloc_
        coherent exchanges frames for such a run)."""
        top = self.low_ if limit < 1 << 40 else self.next_machine_
        if limit < 1 << 40:
            self.low_ -= size
            top = self.low_
        else:
            self.next_machine_ += size + PAGE
        for i in range(0, size, PAGE):
            self._set(phys + i, top + i, False)

    # take the backing of pages away that are gone
    cdef void forget(self, uint64_t phys, uint64_t size) noexcept nogil:
        cdef uint64_t i
        for i in range(size // 4096):
            xen_clear(&self.c, phys + i * 4096)

    def machine(self, phys):
        """The machine address behind a physical one, or None (phys_to_mach)."""
        at = xen_machine(&self.c, as_phys(phys))
        return None if at == UINT64_MAX else at

    def phys(self, machine):
        """The physical address behind a machine one, or None where the frame is none of this guest's."""
        at = xen_phys(&self.c, as_length(machine, "machine", least=0))
        return None if at == UINT64_MAX else PhysAddr(at)

    def is_foreign(self, phys):
        """Whether another domain's page lies at a physical address (page_is_foreign)."""
        return int(as_phys(phys)) & ~(PAGE - 1) in self.foreign_

    def balloon_out(self, phys):
        """Give a page back to the hypervisor: nothing is behind it any more (its frame becomes INVALID)."""
        at = self._page(phys)
        if xen_machine(&self.c, at) == UINT64_MAX:
            raise StateError("ballooned out already", argument="phys", value=phys)
        xen_clear(&self.c, at)
        self.memory.remove_frames([at])

    def map_foreign(self, phys, XenDomain other not None, other_phys):
        """Map another domain's page at a ballooned-out physical address, as a grant would (gnttab_map_refs).

        The page's p2m entry is the other's machine frame with the foreign mark; any frame number can come of it.
        """
        at, theirs = self._page(phys), other._page(other_phys)
        cdef uint64_t machine = xen_machine(&other.c, theirs)
        if xen_machine(&self.c, at) != UINT64_MAX:
            raise StateError("a page of this guest's is there: balloon it out first", argument="phys", value=phys)
        cdef void *host = phys_mem_host(other.memory.mem, theirs)
        if machine == UINT64_MAX or host == NULL:
            raise DmaValueError("a page of the other domain's", argument="other_phys", value=other_phys)
        self._set(at, machine, True)
        if self.memory.add_frame(at, host):
            xen_clear(&self.c, at)
            raise MemoryError("no memory for a physical memory map")
        self.foreign_[at] = other
        self.memory.borrowed[at] = other.memory

    def unmap_foreign(self, phys):
        """Undo map_foreign; the page is ballooned out again. EINVAL where no foreign page is (clear_foreign_p2m_mapping)."""
        at = self._page(phys)
        if at not in self.foreign_:
            raise DmaValueError("a page of another domain (clear_foreign_p2m_mapping)", errno=EINVAL, argument="phys",
                                value=phys)
        xen_clear(&self.c, at)
        self.memory.remove_frames([at])
        del self.foreign_[at], self.memory.borrowed[at]

    def _page(self, phys):
        at = as_phys(phys)
        if at & (PAGE - 1):
            raise DmaValueError("a multiple of 4096", argument="phys", value=phys)
        return at
