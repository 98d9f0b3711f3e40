# cython: language_level=3
"""Single pages by index into a long-lived range: the page-aligned interface of RDMA's on-demand paging (mm/hmm.c,
drivers/infiniband/core/umem_odp.c). IOVA for the whole region is reserved once; pages are linked when the device faults on
them and unlinked when the CPU's mapping changes.
"""
import threading

cimport cython
from libc.errno cimport EINVAL, ENOMEM, EOPNOTSUPP, EREMOTEIO
from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_ATTR_REQUIRE_COHERENT, DMA_BIDIRECTIONAL, DMA_DEV_COHERENT, DMA_P2P_BUS_ADDR,
    DMA_P2P_NOT_SUPPORTED, dma_addr, dma_addr_t, dma_device, dma_has_bounced, dma_iova_free, dma_iova_link,
    dma_iova_state, dma_iova_sync, dma_iova_try_alloc, dma_iova_unlink, dma_map_phys, dma_p2p_bus, dma_p2p_find,
    dma_p2p_range, dma_unmap_phys, phys_addr, phys_addr_t,
)
from dmapath.device cimport Device
from dmapath.memory cimport PhysMemory

from dmapath.addr import DmaAddr, as_integer, as_length, as_phys
from dmapath.errors import DmaValueError, NotSupportedError, StateError, at_end, error_for

#: Flags of a page, with Linux's bits (enum hmm_pfn_flags).
VALID, WRITE, DMA_MAPPED, P2PDMA, P2PDMA_BUS = 1 << 63, 1 << 62, 1 << 60, 1 << 59, 1 << 58

cdef uint64_t PFN_VALID = 1ULL << 63
cdef uint64_t PFN_WRITE = 1ULL << 62
cdef uint64_t PFN_MAPPED = 1ULL << 60
cdef uint64_t PFN_P2P = 1ULL << 59
cdef uint64_t PFN_BUS = 1ULL << 58
cdef uint64_t PFN_FRAME = (1ULL << 52) - 1


# a coherent device that never bounced: nothing it maps ever needs a sync
cdef int hmm_dma_map_alloc(dma_device *dev, hmm_dma_map *map, uint64_t nr, uint64_t entry_size) noexcept nogil:
    memset(map, 0, sizeof(hmm_dma_map))
    if not dev.flags & DMA_DEV_COHERENT or dma_has_bounced(dev):
        return -EOPNOTSUPP
    if nr == 0 or entry_size == 0 or entry_size & (entry_size - 1) or nr >> 40 or entry_size >> 22:
        return -EINVAL
    map.nr = nr
    map.entry_size = entry_size
    map.pfn_list = <uint64_t *>calloc(nr, sizeof(uint64_t))
    if map.pfn_list == NULL:
        return -ENOMEM
    if dma_iova_try_alloc(dev, &map.state, phys_addr(0), nr * entry_size):
        return 0
    if dev.ops.need_unmap(dev):
        map.dma_list = <dma_addr_t *>calloc(nr, sizeof(dma_addr_t))
        if map.dma_list == NULL:
            free(map.pfn_list)
            map.pfn_list = NULL
            return -ENOMEM
    return 0


cdef inline void forget(hmm_dma_map *map, uint64_t i) noexcept nogil:
    map.pfn_list[i] &= ~(PFN_MAPPED | PFN_P2P | PFN_BUS)


cdef int hmm_dma_map_pfn(dma_device *dev, hmm_dma_map *map, uint64_t i, phys_addr_t phys, bint write,
                         dma_addr_t *out) noexcept nogil:
    cdef const dma_p2p_range *peer = dma_p2p_find(dev, phys)
    cdef uint64_t offset = i * map.entry_size, flags = PFN_VALID | (PFN_WRITE if write else 0)
    cdef unsigned long attrs = DMA_ATTR_REQUIRE_COHERENT
    cdef int rc
    out.v = UINT64_MAX
    if i >= map.nr or phys.v & (map.entry_size - 1):
        return -EINVAL
    if map.pfn_list[i] & PFN_MAPPED and not map.pfn_list[i] & PFN_BUS:
        map.pfn_list[i] |= flags  # more rights for a page that is there
        out[0] = address_of(map, i)
        return 0
    if peer != NULL and peer.type == DMA_P2P_NOT_SUPPORTED:
        return -EREMOTEIO
    if peer != NULL and peer.type == DMA_P2P_BUS_ADDR:
        map.pfn_list[i] = phys.v >> 12 | flags | PFN_MAPPED | PFN_BUS
        out[0] = dma_p2p_bus(peer, phys)
        return 0
    if peer != NULL:
        attrs |= DMA_ATTR_MMIO
    if map.state.size:
        rc = dma_iova_link(dev, &map.state, phys, offset, map.entry_size, DMA_BIDIRECTIONAL, attrs)
        if rc == 0:
            rc = dma_iova_sync(dev, &map.state, offset, map.entry_size)
            if rc:
                dma_iova_unlink(dev, &map.state, offset, map.entry_size, DMA_BIDIRECTIONAL, attrs)
        out[0] = dma_addr(map.state.addr.v + offset)
    else:
        rc = dma_map_phys(dev, phys, map.entry_size, DMA_BIDIRECTIONAL, attrs, out)
        if rc == 0 and map.dma_list != NULL:
            map.dma_list[i] = out[0]
    if rc:
        out.v = UINT64_MAX
        return rc
    map.pfn_list[i] = phys.v >> 12 | flags | PFN_MAPPED | (PFN_P2P if peer != NULL else 0)
    return 0


# of a page that is mapped and no peer's
cdef inline dma_addr_t address_of(const hmm_dma_map *map, uint64_t i) noexcept nogil:
    if map.state.size:
        return dma_addr(map.state.addr.v + i * map.entry_size)
    if map.dma_list != NULL:
        return map.dma_list[i]
    return dma_addr((map.pfn_list[i] & PFN_FRAME) << 12)


cdef bint hmm_dma_unmap_pfn(dma_device *dev, hmm_dma_map *map, uint64_t i) noexcept nogil:
    cdef unsigned long attrs = DMA_ATTR_REQUIRE_COHERENT
    if i >= map.nr or not map.pfn_list[i] & PFN_VALID or not map.pfn_list[i] & PFN_MAPPED:
        return False
    if map.pfn_list[i] & PFN_P2P:
        attrs |= DMA_ATTR_MMIO
    if not map.pfn_list[i] & PFN_BUS:
        if map.state.size:
            dma_iova_unlink(dev, &map.state, i * map.entry_size, map.entry_size, DMA_BIDIRECTIONAL, attrs)
        elif map.dma_list != NULL:
            dma_unmap_phys(dev, map.dma_list[i], map.entry_size, DMA_BIDIRECTIONAL, attrs)
    forget(map, i)
    return True


cdef void hmm_dma_map_free(dma_device *dev, hmm_dma_map *map) noexcept nogil:
    if map.state.size:
        dma_iova_free(dev, &map.state)
    free(map.pfn_list)
    free(map.dma_list)
    memset(map, 0, sizeof(hmm_dma_map))


@cython.no_gc_clear  # __dealloc__ unmaps through the device
cdef class HmmMap:
    """A range of IOVA into which pages are linked one by one, by index (struct hmm_dma_map).

    Parameters
    ----------
    device : Device
        Coherent, and one that never bounced: EOPNOTSUPP otherwise, since such mappings are never synced.
    nr : int
        Pages.
    entry_size : int
        Bytes of a page: a power of two, 4096 by default.
    """

    cdef hmm_dma_map map
    cdef readonly Device device
    cdef bint live

    def __cinit__(self, Device device not None, nr, *, entry_size=4096):
        cdef uint64_t n = as_length(nr, "nr"), size = as_length(entry_size, "entry_size")
        cdef int rc
        if device.memory is not None and device.backend.name == "direct":
            top = max(int(p) + k - 1 for p, k in device.memory.vecs(0, len(device.memory)))
            if min(device.dma_mask, device.bus_dma_limit or device.dma_mask) < top:
                raise NotSupportedError("the device cannot reach all memory, so pages might have to bounce "
                                        "(hmm_dma_map_alloc, dma_addressing_limited)", argument="device", value=device)
        with nogil:
            rc = hmm_dma_map_alloc(&device.c, &self.map, n, size)
        if rc:
            raise error_for(-rc, "a coherent device that never bounced is wanted (hmm_dma_map_alloc)" if rc == -EOPNOTSUPP
                            else "a power of two of bytes for each page" if rc == -EINVAL else "no memory for the pages",
                            "device" if rc == -EOPNOTSUPP else "entry_size" if rc == -EINVAL else "nr", device)
        self.device, self.live = device, True

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("freed already", argument="self", value=self)
        return 0

    def _check(self, i):
        self.must_live()
        return as_integer(i, "i", least=0, last=self.map.nr - 1)

    def map_pfn(self, i, phys, *, write=True):
        """Link page ``i`` to a physical page and sync it; its DmaAddr (hmm_dma_map_pfn).

        A page that is there keeps its link and only gains rights. A peer's page gives its bus address.
        """
        cdef uint64_t index = self._check(i), p = as_phys(phys)
        cdef bint w = write
        cdef dma_addr_t out
        cdef int rc
        with nogil:
            rc = hmm_dma_map_pfn(&self.device.c, &self.map, index, phys_addr(p), w, &out)
        if rc:
            raise error_for(-rc, "the page cannot be mapped (hmm_dma_map_pfn)" if rc != -EINVAL else
                            f"a multiple of {self.map.entry_size}", "phys", p)
        return DmaAddr(out.v)

    def unmap_pfn(self, i):
        """Unlink page ``i``; False where it is not mapped (hmm_dma_unmap_pfn)."""
        cdef uint64_t index = self._check(i)
        with nogil:
            done = hmm_dma_unmap_pfn(&self.device.c, &self.map, index)
        return done

    def flags(self, i):
        """Flags of page ``i``: VALID, WRITE, DMA_MAPPED, P2PDMA, P2PDMA_BUS."""
        return self.map.pfn_list[<uint64_t>self._check(i)] & ~((1 << 52) - 1)

    @property
    def has_iova(self):
        """Whether one IOVA range holds all pages."""
        self.must_live()
        return self.map.state.size != 0

    @property
    def state_bytes(self):
        """Bytes of DMA addresses kept for unmap: 16 with an IOVA range, 8 a page without, none where nothing is unmapped."""
        self.must_live()
        return sizeof(dma_iova_state) if self.map.state.size else 8 * self.map.nr if self.map.dma_list != NULL else 0

    def __len__(self):
        self.must_live()
        return self.map.nr

    def free(self):
        """Unmap what is mapped and give the range back (hmm_dma_map_free)."""
        self.must_live()
        self.let_go()

    cdef void let_go(self) noexcept:
        cdef uint64_t i
        self.live = False
        with nogil:
            for i in range(self.map.nr):
                hmm_dma_unmap_pfn(&self.device.c, &self.map, i)
            hmm_dma_map_free(&self.device.c, &self.map)

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        if self.live:
            at_end(error, self.free)

    def __del__(self):
        if self.live and self.device.unmap_early():
            self.let_go()

    def __dealloc__(self):
        if self.live:
            self.let_go()


class OdpRegion:
    """A memory region whose pages the device reaches on demand (ib_umem_odp): ``fault`` maps pages, and when the memory
    moves them (``PhysMemory.migrate``) they are unmapped before they go.

    Parameters
    ----------
    device : Device
    memory : PhysMemory
        Its arena holds the region.
    offset, length : int
        Bytes; rounded out to pages.
    """

    def __init__(self, device, PhysMemory memory not None, offset, length):
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        if offset + length > len(memory):
            raise DmaValueError(f"offset + length within {len(memory)} bytes", argument="length", value=length)
        self.memory = memory
        self.first = offset // 4096 * 4096
        self.pages = HmmMap(device, -(-(offset + length) // 4096) - self.first // 4096)
        self.invalidations = 0
        self.closed = self._moving = False
        self._lock = threading.Lock()
        memory.notifiers.add(self)

    def _must_live(self):
        if self.closed:
            raise StateError("it was closed", argument="self", value=self)

    def fault(self, offset, length=1, *, write=True):
        """Map the pages of arena bytes [offset, offset + length): list of DmaAddr, one a page
        (ib_umem_odp_map_dma_and_lock). EFAULT outside the region."""
        self._must_live()
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        first, last = (offset - self.first) // 4096, (offset + length - 1 - self.first) // 4096
        if first < 0 or last >= len(self.pages):
            raise error_for(14, "outside the region (ib_umem_odp_map_dma_and_lock)", "offset", offset)
        with self._lock:
            return [self.pages.map_pfn(i, self.memory.phys(self.first + i * 4096), write=write)
                    for i in range(first, last + 1)]

    def invalidate_start(self, memory, offset, length):
        """Called by the memory before pages move: what the device has of them is unmapped, and faults wait until
        ``invalidate_end``. Of a region that was closed meanwhile nothing is mapped."""
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        self._lock.acquire()
        self._moving = True
        if not self.closed:
            first = max(0, (offset - self.first) // 4096)
            last = min(len(self.pages), (offset + length - self.first + 4095) // 4096)
            for i in range(first, last):
                self.invalidations += self.pages.unmap_pfn(i)

    def invalidate_end(self):
        """Called when they have moved: faults see where they are now. StateError without a start."""
        if not self._moving:
            raise StateError("invalidate_start comes before", argument="self", value=self)
        self._moving = False
        self._lock.release()

    def is_mapped(self, offset):
        """Whether the page of an arena byte is mapped now."""
        self._must_live()
        page = (as_length(offset, "offset", least=0) - self.first) // 4096
        if not 0 <= page < len(self.pages):
            raise error_for(14, "outside the region", "offset", offset)
        return bool(self.pages.flags(page) & DMA_MAPPED)

    def close(self):
        """Unmap everything and forget the region. StateError when done already."""
        self.memory.notifiers.discard(self)
        with self._lock:
            self._must_live()
            self.closed = True
            self.pages.free()

    def __enter__(self):
        self._must_live()
        return self

    def __exit__(self, kind, error, traceback):
        if not self.closed:
            at_end(error, self.close)
