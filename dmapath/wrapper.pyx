# cython: language_level=3
"""THE wrapper: a request goes in, segments come out of one iterator, one state goes back.

It knows ops tables and physical vectors, no memory kind and no particular backend. Two policies choose the layout:
``unified`` (linear where the ranges fit, else gapped) and ``linux`` (what block/blk-mq-dma.c and ib_umem_get of Linux 7.3
choose).
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from dmapath.abi cimport (
    DMA_DEV_COHERENT, DMA_LAYOUT_BOUNCED,
    DMA_LAYOUT_DIRECT, DMA_LAYOUT_GAPPED, DMA_LAYOUT_LINEAR, DMA_LAYOUT_NONE, DMA_LAYOUT_PER_RANGE,
    DMA_MAP_CHUNK, DMA_POLICY_LINUX, DMA_RQ_SG, DMAPATH_ABI, DMAPATH_API_CAPSULE, dma_addr,
    dma_data_direction, dma_device, dma_iova_destroy, dma_limits, dma_map_iter, dma_map_state, dma_policy,
    dma_request, dma_seg, dmapath_api, phys_addr, phys_addr_t, phys_vec,
)

# One bit for each rule that can decide; dmapath.rules has the words.
cdef enum:
    R_EMPTY = 1 << 0
    R_NO_IOVA = 1 << 1
    R_NO_GAP = 1 << 2
    R_GAP = 1 << 3
    R_IOVA_FULL = 1 << 4
    R_FITS = 1 << 5
    R_GAPPED = 1 << 6
    R_NONCOHERENT = 1 << 7
    R_UMEM_SG = 1 << 8
    R_ALIGNMENT = 1 << 9
    R_VIRT_BOUNDARY = 1 << 10
    R_MAX_SEGMENTS = 1 << 11
    R_SEGMENT_CUT = 1 << 12
    R_LINK_FAILED = 1 << 13
    R_MAP_FAILED = 1 << 14
    R_FORGET = 1 << 15
    R_BOUNCED = 1 << 16

RULE_BITS = {
    "empty": R_EMPTY, "no-iova": R_NO_IOVA, "no-gap": R_NO_GAP, "gap": R_GAP, "iova-full": R_IOVA_FULL,
    "fits": R_FITS, "gapped": R_GAPPED, "non-coherent": R_NONCOHERENT, "umem-sg": R_UMEM_SG,
    "alignment": R_ALIGNMENT, "virt-boundary": R_VIRT_BOUNDARY, "max-segments": R_MAX_SEGMENTS,
    "segment-cut": R_SEGMENT_CUT, "link-failed": R_LINK_FAILED, "map-failed": R_MAP_FAILED, "forget": R_FORGET,
    "bounced": R_BOUNCED,
}


cdef struct shape:  # what one look at all vectors tells
    uint64_t padded     # bytes, each vector rounded out to granules
    uint64_t bits       # or of all addresses and lengths
    uint64_t edges      # or of the addresses and ends where two vectors meet
    uint32_t n


# the only allocations here; fail_nth makes one of them fail
cdef long countdown = 0


cdef void *take(size_t n) noexcept nogil:
    global countdown
    if countdown:
        countdown -= 1
        if countdown == 0:
            return NULL
    return malloc(n)


def fail_nth(long n):
    """Make the wrapper's nth allocation from now fail (1: the next; 0: none). Returns what was left of the last order."""
    global countdown
    left, countdown = countdown, n
    return left


# ---- reading vectors ----------------------------------------------------------------------------------------------

cdef inline void window_rewind(dma_map_iter *it) noexcept nogil:
    it.cursor.item = it.cursor.sub = it.cursor.pos = 0
    it.at = 0


cdef inline uint32_t window_load(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    it.have = it.rq.fill(it.rq, &it.cursor, lim, it.window, DMA_MAP_CHUNK)
    it.at = 0
    return it.have


# back to the first vector; when the window holds them all there is nothing to read again
cdef inline void window_restart(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    window_rewind(it)
    if not it.whole:
        window_load(it, lim)


# look at every vector once, and leave the window at the first
cdef void measure(dma_map_iter *it, const dma_limits *lim, uint64_t gm, shape *s) noexcept nogil:
    cdef uint64_t at = it.window[0].paddr.v, size = it.window[0].len, end = at + size
    cdef uint64_t bits = at | size, edges = 0, padded = ((end + gm) & ~gm) - (at & ~gm)
    cdef uint32_t i, n = it.have, first = 1
    s.n = 0
    while True:
        for i in range(first, n):
            at = it.window[i].paddr.v
            size = it.window[i].len
            bits |= at | size
            edges |= at | end
            end = at + size
            padded += ((end + gm) & ~gm) - (at & ~gm)
        first = 0
        s.n += n
        if n < DMA_MAP_CHUNK:
            break
        window_load(it, lim)
        if it.have == 0:
            it.have = n  # exactly full: the window still holds the last of them
            break
        n = it.have
    s.bits, s.edges, s.padded = bits, edges, padded
    it.whole = s.n == it.have
    window_restart(it, lim)


# how many vectors there are under these limits; the window ends up at the first
cdef uint32_t count_vecs(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    cdef uint32_t n = 0
    window_rewind(it)
    while window_load(it, lim):
        n += it.have
    it.whole = 0
    window_restart(it, lim)
    return n


# ---- start --------------------------------------------------------------------------------------------------------

cdef inline void give_up(dma_map_state *st, uint64_t rule) noexcept nogil:
    st.rules |= rule
    st.layout = DMA_LAYOUT_NONE
    st.iova.size = 0


# link every vector, sync once; on failure everything is taken back
cdef int link_all(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, uint64_t size) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, step
    cdef dma_data_direction dir = <dma_data_direction>st.dir
    cdef uint32_t i
    cdef int rc = 0
    st.mapped = 0
    while it.have and rc == 0:
        if gapped:
            rc = dev.ops.iova_link_gapped(dev, &st.iova, it.window, it.have, st.mapped, dir, st.attrs)
        else:
            rc = dev.ops.iova_link_vec(dev, &st.iova, it.window, it.have, st.mapped, dir, st.attrs)
        if rc:
            break
        if it.whole:
            st.mapped = size
            break
        for i in range(it.have):
            step = it.window[i].len
            if gapped:
                step = (step + (it.window[i].paddr.v & gm) + gm) & ~gm
            st.mapped += step
        window_load(it, &dev.limits)
    if rc == 0:
        rc = dev.ops.iova_sync(dev, &st.iova, 0, size)
    if rc:
        dma_iova_destroy(dev, &st.iova, st.mapped, dir, st.attrs)
        give_up(st, R_LINK_FAILED)
        return rc
    window_restart(it, &dev.limits)
    return 0


# 1: one IOVA range holds the request; 0: the backend gives none; < 0: failed
cdef int map_in_one(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, uint64_t size) noexcept nogil:
    cdef phys_addr_t first = it.window[0].paddr if not gapped else phys_addr(0)
    cdef int rc
    if not dev.ops.iova_try_alloc(dev, &st.iova, first, size):
        st.rules |= R_IOVA_FULL
        return 0
    st.layout = DMA_LAYOUT_GAPPED if gapped else DMA_LAYOUT_LINEAR
    rc = link_all(dev, st, it, gapped, size)
    if rc:
        return rc
    it.next = st.iova.addr.v
    it.left = size
    return 1


# map range by range, in map_next; what unmap will need is kept only where something must be unmapped
cdef int prepare_each(dma_device *dev, dma_map_state *st, dma_map_iter *it, uint32_t most) noexcept nogil:
    st.layout = DMA_LAYOUT_PER_RANGE if it.granule_mask else DMA_LAYOUT_DIRECT
    st.iova.size = 0
    it.left = most
    if not dev.ops.need_unmap(dev):
        st.rules |= R_FORGET
        return 0
    return keep_addresses(st, most)


cdef int keep_addresses(dma_map_state *st, uint64_t most) noexcept nogil:
    st.rules &= ~<uint64_t>R_FORGET
    st.saved = <dma_seg *>take(<size_t>most * sizeof(dma_seg))
    if st.saved == NULL:
        give_up(st, R_MAP_FAILED)
        return -ENOMEM
    return 0


# what the driver said its hardware cannot take
cdef int limits_refuse(dma_device *dev, dma_map_state *st, dma_map_iter *it, const shape *s,
                       bint one_range) noexcept nogil:
    if it.rq.flags & DMA_RQ_SG:
        return 0
    if s.bits & dev.limits.dma_alignment:
        give_up(st, R_ALIGNMENT)
        return -EINVAL
    if one_range:
        return 0
    if s.edges & dev.limits.virt_boundary:
        give_up(st, R_VIRT_BOUNDARY)
        return -EINVAL
    if s.n > dev.limits.max_segments:
        give_up(st, R_MAX_SEGMENTS)
        return -EINVAL
    return 0


cdef int start_unified(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint64_t gm = it.granule_mask
    cdef bint fits, gapped_ok = dev.flags & DMA_DEV_COHERENT
    cdef shape s
    cdef int rc
    measure(it, &dev.limits, gm, &s)
    fits = gm != 0 and s.edges & gm == 0
    rc = limits_refuse(dev, st, it, &s, fits)
    if rc:
        return rc
    if gm == 0:
        st.rules |= R_NO_IOVA
    elif fits:
        st.rules |= R_FITS
        rc = map_in_one(dev, st, it, False, it.rq.total)
    elif gapped_ok:
        st.rules |= R_GAPPED
        rc = map_in_one(dev, st, it, True, s.padded)
    else:
        # unmap has to clean exactly the bytes that were mapped, so it must know the ranges
        st.rules |= R_NONCOHERENT
    if rc:
        return rc if rc < 0 else 0
    return prepare_each(dev, st, it, s.n)


# ib_umem_get maps the page list with dma_map_sgtable
cdef int start_umem(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint32_t n = 0, most, got
    cdef dma_limits lim = dev.limits
    cdef phys_vec *v
    cdef int rc
    lim.max_segment_size = dev.sg_max_segment_size
    st.rules |= R_UMEM_SG
    st.sg = 1
    most = count_vecs(it, &lim)
    v = <phys_vec *>take(<size_t>most * sizeof(phys_vec))
    st.saved = <dma_seg *>take(<size_t>most * sizeof(dma_seg))
    rc = 0 if v != NULL and st.saved != NULL else -ENOMEM
    if rc == 0:
        window_rewind(it)
        while n < most:
            got = it.rq.fill(it.rq, &it.cursor, &lim, v + n, most - n)
            if got == 0:
                break
            n += got
        rc = dev.ops.map_sg(dev, v, n, <dma_data_direction>st.dir, st.attrs, st.saved)
    free(v)
    if rc < 0:
        free(st.saved)
        st.saved = NULL
        give_up(st, R_MAP_FAILED)
        return rc
    st.nr_saved = <uint32_t>rc
    st.layout = DMA_LAYOUT_LINEAR if it.granule_mask else DMA_LAYOUT_DIRECT
    it.at = 0
    return 0


# blk_rq_dma_map_iter_start
cdef int start_linux(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint64_t gm = it.granule_mask
    cdef int rc = 0
    if it.rq.flags & DMA_RQ_SG:
        return start_umem(dev, st, it)
    it.whole = it.have < DMA_MAP_CHUNK
    if it.rq.gap_mask & gm:
        st.rules |= R_GAP
    else:
        st.rules |= R_NO_GAP if gm else R_NO_IOVA
        rc = map_in_one(dev, st, it, False, it.rq.total)
        if gm == 0:
            st.rules &= ~<uint64_t>R_IOVA_FULL
    if rc:
        return rc if rc < 0 else 0
    return prepare_each(dev, st, it, it.have if it.whole else count_vecs(it, &dev.limits))


cdef int map_start(dma_device *dev, const dma_request *rq, dma_policy policy, dma_map_state *st,
                   dma_map_iter *it) noexcept nogil:
    memset(st, 0, sizeof(dma_map_state))
    st.dir = <unsigned char>rq.dir
    st.attrs = rq.attrs
    it.rq = rq
    it.next = it.left = 0
    it.whole = 0
    it.granule_mask = dev.ops.merge_boundary(dev)
    window_rewind(it)
    if window_load(it, &dev.limits) == 0:
        st.rules = R_EMPTY
        return 0
    if policy == DMA_POLICY_LINUX:
        return start_linux(dev, st, it)
    return start_unified(dev, st, it)


# ---- next, unmap --------------------------------------------------------------------------------------------------

# the vector the window stands at, or NULL after the last
cdef inline const phys_vec *window_next(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    cdef uint32_t at = it.at
    if at == it.have:
        if it.whole or window_load(it, lim) == 0:
            return NULL
        at = 0
    it.at = at + 1
    return &it.window[at]


cdef inline int next_linear(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef uint64_t n = it.left, room
    if n == 0:
        return 0
    if st.rules & R_FITS:  # policy linux hands the range out whole, whatever the segment limits say
        room = dev.limits.seg_boundary_mask - (it.next & dev.limits.seg_boundary_mask)
        if n - 1 > room:
            n = room + 1
        if n > dev.limits.max_segment_size:
            n = dev.limits.max_segment_size
        if n < it.left:
            st.rules |= R_SEGMENT_CUT
    seg.addr = dma_addr(it.next)
    seg.len = n
    it.next += n
    it.left -= n
    return 1


cdef inline int next_gapped(dma_device *dev, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, off
    cdef const phys_vec *v = window_next(it, &dev.limits)
    if v == NULL:
        return 0
    off = v.paddr.v & gm
    seg.addr = dma_addr(it.next + off)
    seg.len = v.len
    it.next += (off + v.len + gm) & ~gm
    return 1


cdef int next_each(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef const phys_vec *v = window_next(it, &dev.limits)
    cdef int rc
    if v == NULL:
        return 0
    rc = dev.ops.map_phys(dev, v.paddr, v.len, <dma_data_direction>st.dir, st.attrs, &seg.addr)
    if rc:
        st.rules |= R_MAP_FAILED
        return rc
    seg.len = v.len
    it.left -= 1
    if dev.swiotlb != NULL and dev.ops.is_bounced(dev, seg.addr):
        st.rules |= R_BOUNCED
        st.layout = DMA_LAYOUT_BOUNCED
        # a direct device's first bounce: from here on its addresses are needed
        if st.saved == NULL and keep_addresses(st, it.left + 1):
            dev.ops.unmap_phys(dev, seg.addr, seg.len, <dma_data_direction>st.dir, st.attrs)
            return -ENOMEM
    if st.saved != NULL:
        st.saved[st.nr_saved] = seg[0]
        st.nr_saved += 1
    return 1


cdef inline int next_saved(dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    if it.at == st.nr_saved:
        return 0
    seg[0] = st.saved[it.at]
    it.at += 1
    return 1


cdef int map_next(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    if st.layout == DMA_LAYOUT_GAPPED:
        return next_gapped(dev, it, seg)
    if st.sg:
        return next_saved(st, it, seg)
    if st.layout == DMA_LAYOUT_LINEAR:
        return next_linear(dev, st, it, seg)
    return next_each(dev, st, it, seg) if st.layout != DMA_LAYOUT_NONE else 0


cdef int unmap(dma_device *dev, dma_map_state *st) noexcept nogil:
    cdef dma_data_direction dir = <dma_data_direction>st.dir
    cdef int rc = 0, one
    cdef uint32_t i
    if st.iova.size:
        rc = dma_iova_destroy(dev, &st.iova, st.mapped, dir, st.attrs)
    elif st.sg and st.nr_saved:
        rc = dev.ops.unmap_sg(dev, st.saved, st.nr_saved, dir, st.attrs)
    else:
        for i in range(st.nr_saved):
            one = dev.ops.unmap_phys(dev, st.saved[i].addr, st.saved[i].len, dir, st.attrs)
            rc = rc if rc else one
    free(st.saved)
    st.saved = NULL
    st.nr_saved = 0
    st.iova.size = 0
    st.layout = DMA_LAYOUT_NONE
    return rc


cdef dmapath_api api_table
api_table.abi = DMAPATH_ABI
api_table.size = sizeof(dmapath_api)
api_table.map_start = map_start
api_table.map_next = map_next
api_table.unmap = unmap
#: Capsule with the ``struct dmapath_api`` for C and Cython drivers.
api = PyCapsule_New(<void *>&api_table, DMAPATH_API_CAPSULE, NULL)
