# cython: language_level=3
"""An outsider's driver: requests through the wrapper and the two steps, in C, without the GIL."""
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint64_t

from dmapath.abi cimport (
    DMA_POLICY_UNIFIED, DMA_TO_DEVICE, DMAPATH_ABI, DMAPATH_API_CAPSULE, DMAPATH_DEVICE_CAPSULE, dma_addr,
    dma_addr_t, dma_cursor, dma_device, dma_iova_destroy, dma_iova_link, dma_iova_state, dma_iova_sync, dma_iova_try_alloc,
    dma_keys, dma_keys_of, dma_limits, dma_map_iter, dma_map_state, dma_request, dma_seg, dmapath_api, phys_addr, phys_vec,
)
from dmapath.hmm cimport hmm_dma_map, hmm_dma_map_alloc, hmm_dma_map_free, hmm_dma_map_pfn, hmm_dma_unmap_pfn

from dmapath import wrapper

cdef dmapath_api *api = <dmapath_api *>PyCapsule_GetPointer(wrapper.api, DMAPATH_API_CAPSULE)
assert api.abi == DMAPATH_ABI


# a front end of our own: n ranges of `len` bytes, every second page from phys 1 MiB on
cdef struct stripes:
    uint64_t n, len, offset


cdef unsigned fill(const dma_request *rq, dma_cursor *c, const dma_limits *lim, phys_vec *out,
                   unsigned cap) noexcept nogil:
    cdef const stripes *s = <const stripes *>rq.priv
    cdef unsigned got = 0
    while got < cap and c.item < s.n:
        out[got].paddr = phys_addr(0x100000 + c.item * 0x2000 + s.offset)
        out[got].len = s.len
        c.item += 1
        got += 1
    return got


def keys(device, uint64_t addr, uint64_t size):
    """What hardware with keys is told beside an address: (lkey, rkey)."""
    cdef dma_device *dev = <dma_device *>PyCapsule_GetPointer(device, DMAPATH_DEVICE_CAPSULE)
    cdef dma_keys found
    cdef int rc = dma_keys_of(dev, dma_addr(addr), size, &found)
    assert rc == 0, rc
    return found.lkey, found.rkey


def pages_by_index(device, list pages):
    """An RDMA-style driver: one range for the region, pages linked as the device asks for them. Their addresses, and how
    many could be unmapped."""
    cdef dma_device *dev = <dma_device *>PyCapsule_GetPointer(device, DMAPATH_DEVICE_CAPSULE)
    cdef hmm_dma_map region
    cdef dma_addr_t addr
    cdef uint64_t i, n = len(pages), undone = 0
    cdef int rc
    if hmm_dma_map_alloc(dev, &region, n, 4096):
        raise OSError("no region")
    out = []
    for i in range(n):
        rc = hmm_dma_map_pfn(dev, &region, i, phys_addr(pages[i]), True, &addr)
        out.append(rc if rc else addr.v)
    with nogil:
        for i in range(n):
            undone += hmm_dma_unmap_pfn(dev, &region, i)
        hmm_dma_map_free(dev, &region)
    return out, undone


def map_stripes(capsule, n, length, offset):
    """Segments [(addr, bytes)] and the layout number of n stripes."""
    cdef dma_device *dev = <dma_device *>PyCapsule_GetPointer(capsule, DMAPATH_DEVICE_CAPSULE)
    cdef stripes s
    cdef dma_request rq
    cdef dma_map_state st
    cdef dma_map_iter it
    cdef dma_seg segs[256]
    cdef int rc, got = 0
    s.n, s.len, s.offset = n, length, offset
    rq.fill, rq.priv, rq.total, rq.max_vecs = fill, &s, s.n * s.len, s.n
    rq.gap_mask = rq.flags = rq.attrs = 0
    rq.dir = DMA_TO_DEVICE
    with nogil:
        rc = api.map_start(dev, &rq, DMA_POLICY_UNIFIED, &st, &it)
        while rc == 0 and got < 256 and api.map_next(dev, &st, &it, &segs[got]) > 0:
            got += 1
    layout = st.layout
    if rc:
        raise OSError(-rc, "map_start")
    with nogil:
        rc = api.unmap(dev, &st)
    if rc:
        raise OSError(-rc, "unmap")
    return [(segs[i].addr.v, segs[i].len) for i in range(got)], layout


def two_steps(capsule, phys, size):
    """The IOVA that one range got."""
    cdef dma_device *dev = <dma_device *>PyCapsule_GetPointer(capsule, DMAPATH_DEVICE_CAPSULE)
    cdef dma_iova_state st
    cdef uint64_t p = phys, n = size
    cdef int rc
    with nogil:
        rc = dma_iova_try_alloc(dev, &st, phys_addr(p), n)
        if rc:
            rc = dma_iova_link(dev, &st, phys_addr(p), 0, n, DMA_TO_DEVICE, 0)
            if rc == 0:
                rc = dma_iova_sync(dev, &st, 0, n)
            dma_iova_destroy(dev, &st, n if rc == 0 else 0, DMA_TO_DEVICE, 0)
    if rc:
        raise OSError(-rc, "two steps")
    return st.addr.v
