# cython: language_level=3
"""An outsider's backend: device addresses are physical ones plus 1 TiB, and a few two-step ranges on top."""
from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from libc.errno cimport EINVAL
from libc.stdint cimport uint64_t

from dmapath.abi cimport (
    DMAPATH_ABI, DMAPATH_BUS_CAPSULE, DMAPATH_OPS_CAPSULE, DMA_FAULT_NOT_PRESENT, dma_addr, dma_addr_t, dma_bus_ops,
    dma_data_direction, dma_device, dma_fault, dma_fault_at, dma_iova_state, dma_ops, phys_addr_t,
)

cdef struct state:
    uint64_t maps, unmaps, links, unlinks, next


cdef int my_map(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                dma_addr_t *out) noexcept nogil:
    (<state *>dev.priv).maps += 1
    out[0] = dma_addr(phys.v + (1ULL << 40))
    return 0


cdef int my_unmap(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                  unsigned long attrs) noexcept nogil:
    (<state *>dev.priv).unmaps += 1
    return 0 if addr.v >> 40 else -EINVAL


cdef int my_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept nogil:
    st.addr = dma_addr((<state *>dev.priv).next + (phys.v & 0xfff))
    st.size = size
    (<state *>dev.priv).next += 1 << 30
    return 1


cdef int my_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                 dma_data_direction dir, unsigned long attrs) noexcept nogil:
    if (phys.v ^ (st.addr.v + offset)) & 0xfff:
        return -EINVAL
    (<state *>dev.priv).links += 1
    return 0


cdef int my_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                   unsigned long attrs) noexcept nogil:
    (<state *>dev.priv).unlinks += 1
    return 0


cdef uint64_t my_boundary(dma_device *dev) noexcept nogil:
    return 0xfff


cdef dma_ops one_shot
one_shot.abi, one_shot.size, one_shot.name = DMAPATH_ABI, sizeof(dma_ops), b"one-shot"
one_shot.map_phys, one_shot.unmap_phys = my_map, my_unmap

cdef dma_ops two_step
two_step = one_shot
two_step.name = b"two-step"
two_step.iova_try_alloc, two_step.iova_link, two_step.iova_unlink = my_alloc, my_link, my_unlink
two_step.merge_boundary = my_boundary

cdef dma_ops too_new
too_new = one_shot
too_new.abi = DMAPATH_ABI + 1


# simulated devices see a memory that holds its own addresses
cdef int my_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write, dma_fault *fault) noexcept nogil:
    cdef uint64_t i
    if addr.v < 1ULL << 40:
        return dma_fault_at(fault, addr.v, 0, DMA_FAULT_NOT_PRESENT, write)
    for i in range(0 if write else n):
        (<unsigned char *>buf)[i] = <unsigned char>(addr.v + i)
    return 0


cdef dma_bus_ops bus
bus.access = my_access


cdef class Backend:
    """kind: "one-shot", "two-step" or "too-new"."""

    cdef state st
    cdef readonly object dma_ops, dma_bus

    def __init__(self, kind):
        self.st.next = 1ULL << 40
        cdef dma_ops *ops = &two_step if kind == "two-step" else &too_new if kind == "too-new" else &one_shot
        self.dma_ops = PyCapsule_New(ops, DMAPATH_OPS_CAPSULE, NULL)
        PyCapsule_SetContext(self.dma_ops, &self.st)
        self.dma_bus = PyCapsule_New(&bus, DMAPATH_BUS_CAPSULE, NULL) if kind == "two-step" else None

    def counters(self):
        return dict(maps=self.st.maps, unmaps=self.st.unmaps, links=self.st.links, unlinks=self.st.unlinks)
