# cython: language_level=3
"""THE wrapper: a request goes in, segments come out of one iterator, one state goes back.

It knows ops tables and physical vectors, no memory kind and no particular backend. Two policies choose the layout:
``unified`` (linear where the ranges fit, else gapped) and ``linux`` (what block/blk-mq-dma.c and ib_umem_get of Linux 7.3
choose).
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EINVAL, ENOMEM, EREMOTEIO, EXDEV
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_DEV_COHERENT, DMA_DEV_UNTRUSTED, DMA_LAYOUT_BOUNCED, DMA_LAYOUT_DIRECT, DMA_LAYOUT_GAPPED,
    DMA_LAYOUT_LINEAR, DMA_LAYOUT_NONE,
    DMA_LAYOUT_PER_RANGE, DMA_MAP_CHUNK, DMA_P2P_BUS_ADDR, DMA_P2P_NONE, DMA_P2P_NOT_SUPPORTED,
    DMA_P2P_THRU_HOST_BRIDGE, DMA_POLICY_LINUX, DMA_RQ_SG, DMAPATH_ABI, DMAPATH_API_CAPSULE, dma_addr,
    dma_data_direction, dma_device, dma_iova_destroy, dma_limits, dma_map_iter, dma_map_state, dma_p2p_at,
    dma_p2p_bus, dma_p2p_kind, dma_p2p_range, dma_policy, dma_request, dma_seg, dmapath_api, phys_addr, phys_addr_t,
    phys_vec,
)

cdef extern from *:
    """
    #define likely(x) __builtin_expect(!!(x), 1)
    /* in the length of an address that is kept: it was mapped as MMIO, and must be unmapped so */
    #define SAVED_MMIO (1ull << 63)
    """
    bint likely(bint) noexcept nogil
    uint64_t SAVED_MMIO

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
    R_P2P_BUS = 1 << 17
    R_P2P_HOST = 1 << 18
    R_P2P_REFUSED = 1 << 19
    R_P2P_MIX = 1 << 20
    R_SEPARATE = 1 << 21

RULE_BITS = {
    "empty": R_EMPTY, "no-iova": R_NO_IOVA, "no-gap": R_NO_GAP, "gap": R_GAP, "iova-full": R_IOVA_FULL,
    "fits": R_FITS, "gapped": R_GAPPED, "non-coherent": R_NONCOHERENT, "umem-sg": R_UMEM_SG,
    "alignment": R_ALIGNMENT, "virt-boundary": R_VIRT_BOUNDARY, "max-segments": R_MAX_SEGMENTS,
    "segment-cut": R_SEGMENT_CUT, "link-failed": R_LINK_FAILED, "map-failed": R_MAP_FAILED, "forget": R_FORGET,
    "bounced": R_BOUNCED, "p2p-bus": R_P2P_BUS, "p2p-host-bridge": R_P2P_HOST, "p2p-refused": R_P2P_REFUSED,
    "p2p-mix": R_P2P_MIX, "separate": R_SEPARATE,
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


# after the last link, or the first that failed: one sync; on failure everything is taken back
cdef int finish_links(dma_device *dev, dma_map_state *st, uint64_t size, int rc) noexcept nogil:
    if rc == 0:
        rc = dev.ops.iova_sync(dev, &st.iova, 0, size)
    if rc:
        dma_iova_destroy(dev, &st.iova, st.mapped, <dma_data_direction>st.dir, st.attrs)
        give_up(st, R_LINK_FAILED)
    return rc


# link every vector, sync once
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
    rc = finish_links(dev, st, size, rc)
    window_restart(it, &dev.limits)
    return rc


# 1: one IOVA range holds the request; 0: the backend gives none; < 0: failed
cdef int map_in_one(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, uint64_t size) noexcept nogil:
    cdef phys_addr_t first = it.window[0].paddr
    cdef int rc
    if gapped:
        first = phys_addr(first.v & ~it.granule_mask)
    if not dev.ops.iova_try_alloc(dev, &st.iova, first, size):
        st.rules |= R_IOVA_FULL
        return 0
    st.layout = DMA_LAYOUT_GAPPED if gapped else DMA_LAYOUT_LINEAR
    rc = link_all(dev, st, it, gapped, size)
    if rc == -EXDEV:
        st.rules = st.rules & ~<uint64_t>R_LINK_FAILED | R_SEPARATE
        return 0
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


# an untrusted device's buffer that begins inside a granule bounces; where bounce buffers do not keep that place, such a
# range cannot be linked (iommu_dma_iova_link_swiotlb), only mapped by itself
cdef bint heads_lose_their_place(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef uint64_t heads = 0
    cdef uint32_t i
    window_rewind(it)
    while window_load(it, &dev.limits):
        for i in range(it.have):
            heads |= it.window[i].paddr.v
    it.whole = 0
    window_restart(it, &dev.limits)
    return heads & it.granule_mask & ~dev.min_align_mask != 0


cdef inline bint cannot_link(dma_device *dev, dma_map_iter *it) noexcept nogil:
    if likely(not dev.flags & DMA_DEV_UNTRUSTED) or it.granule_mask & ~dev.min_align_mask == 0:
        return False
    return heads_lose_their_place(dev, it)


cdef int start_unified(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint64_t gm = it.granule_mask
    cdef bint alone, fits, gapped_ok = dev.flags & DMA_DEV_COHERENT
    cdef shape s
    cdef int rc
    measure(it, &dev.limits, gm, &s)
    alone = cannot_link(dev, it)
    fits = gm != 0 and s.edges & gm == 0 and not alone
    rc = limits_refuse(dev, st, it, &s, fits)
    if rc:
        return rc
    if gm == 0:
        st.rules |= R_NO_IOVA
    elif alone:
        st.rules |= R_SEPARATE
    elif fits:
        st.rules |= R_FITS
        rc = map_in_one(dev, st, it, False, it.rq.total)
        if rc == 0:  # not one range after all: each must be such as the device takes
            rc = limits_refuse(dev, st, it, &s, False)
            if rc:
                return rc
    elif gapped_ok:
        st.rules |= R_GAPPED
        rc = map_in_one(dev, st, it, True, s.padded)
    else:
        # unmap has to clean exactly the bytes that were mapped, so it must know the ranges
        st.rules |= R_NONCOHERENT
    if rc:
        return rc if rc < 0 else 0
    return prepare_each(dev, st, it, s.n)


# ---- peer-to-peer: a request that touches BARs --------------------------------------------------------------------

cdef struct piece:  # part of a vector that lies in one kind of memory
    phys_vec v
    const dma_p2p_range *peer  # NULL: the host's
    uint32_t type              # enum dma_p2p_type


# the next piece, or False after the last: vectors are cut where memory changes hands
cdef bint next_piece(dma_device *dev, dma_map_iter *it, const dma_limits *lim, piece *out) noexcept nogil:
    cdef const dma_p2p_range *r
    cdef const phys_vec *v
    cdef int inside = 0
    if it.at == it.have:
        if it.whole or window_load(it, lim) == 0:
            return False
    v = &it.window[it.at]
    out.v.paddr = phys_addr(v.paddr.v + it.pos)
    out.v.len = v.len - it.pos
    r = dma_p2p_at(dev.p2p, out.v.paddr, &inside)
    out.peer = r if inside else NULL
    out.type = dma_p2p_kind(out.peer)
    if inside:
        if out.v.len > r.start.v + r.size - out.v.paddr.v:
            out.v.len = r.start.v + r.size - out.v.paddr.v
    elif r != NULL and out.v.len > r.start.v - out.v.paddr.v:
        out.v.len = r.start.v - out.v.paddr.v
    it.pos += out.v.len
    if it.pos == v.len:
        it.pos = 0
        it.at += 1
    return True


cdef void restart_pieces(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    it.pos = 0
    window_restart(it, lim)


# which kinds of memory the request touches, as a set of bits; the window is left at the first vector
cdef uint32_t p2p_scan(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef uint32_t seen = 0
    cdef piece p
    it.whole = 0
    while next_piece(dev, it, &dev.limits, &p):
        seen |= 1 << p.type
    restart_pieces(it, &dev.limits)
    return seen


# what the unified flow must know: bytes and granules for the IOMMU, where those pieces meet, and the segments
cdef void measure_pieces(dma_device *dev, dma_map_iter *it, shape *s, uint64_t *linked, uint64_t *joints,
                         uint32_t *runs) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, end = 0, last = 0
    cdef bint before = False, first = True
    cdef piece p
    memset(s, 0, sizeof(shape))
    linked[0] = joints[0] = 0
    runs[0] = 0
    while next_piece(dev, it, &dev.limits, &p):
        s.bits |= p.v.paddr.v | p.v.len
        if not first:
            s.edges |= p.v.paddr.v | end
        first = False
        end = p.v.paddr.v + p.v.len
        s.n += 1
        if p.type == DMA_P2P_BUS_ADDR:
            before = False
            runs[0] += 1
            continue
        if linked[0]:
            joints[0] |= p.v.paddr.v | last
        last = end
        runs[0] += not before
        before = True
        linked[0] += p.v.len
        s.padded += ((end + gm) & ~gm) - (p.v.paddr.v & ~gm)
    restart_pieces(it, &dev.limits)


# link all pieces but the peers', with one sync; registers and memory differ in an attribute
cdef int link_pieces(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, uint64_t size) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, step
    cdef unsigned long attrs
    cdef piece p
    cdef int rc = 0
    st.mapped = 0
    while rc == 0 and next_piece(dev, it, &dev.limits, &p):
        if p.type == DMA_P2P_BUS_ADDR:
            continue
        attrs = st.attrs | DMA_ATTR_MMIO if p.type == DMA_P2P_THRU_HOST_BRIDGE else st.attrs
        if gapped:
            rc = dev.ops.iova_link_gapped(dev, &st.iova, &p.v, 1, st.mapped, <dma_data_direction>st.dir, attrs)
            step = (p.v.len + (p.v.paddr.v & gm) + gm) & ~gm
        else:
            rc = dev.ops.iova_link_vec(dev, &st.iova, &p.v, 1, st.mapped, <dma_data_direction>st.dir, attrs)
            step = p.v.len
        st.mapped += step if rc == 0 else 0
    rc = finish_links(dev, st, size, rc)
    restart_pieces(it, &dev.limits)
    return rc


cdef phys_addr_t first_linked(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef piece p
    while next_piece(dev, it, &dev.limits, &p):
        if p.type != DMA_P2P_BUS_ADDR:
            break
    restart_pieces(it, &dev.limits)
    return p.v.paddr


cdef int start_unified_p2p(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, linked, joints, size
    cdef uint32_t runs, pieces
    cdef bint alone, fits
    cdef shape s
    cdef int rc
    measure_pieces(dev, it, &s, &linked, &joints, &runs)
    alone = cannot_link(dev, it)
    fits = gm != 0 and joints & gm == 0 and not alone
    pieces = s.n
    if fits:
        s.n = runs
    rc = limits_refuse(dev, st, it, &s, fits and runs == 1)
    if rc:
        return rc
    if linked == 0:
        return start_peer_alone(st)
    if gm == 0:
        st.rules |= R_NO_IOVA
    elif alone:
        st.rules |= R_SEPARATE
    elif fits or dev.flags & DMA_DEV_COHERENT:
        st.rules |= R_FITS if fits else R_GAPPED
        size = linked if fits else s.padded
        if dev.ops.iova_try_alloc(dev, &st.iova, first_linked(dev, it) if fits else phys_addr(0), size):
            st.layout = DMA_LAYOUT_LINEAR if fits else DMA_LAYOUT_GAPPED
            it.next = st.iova.addr.v
            rc = link_pieces(dev, st, it, not fits, size)
            if rc != -EXDEV:
                return rc
            st.rules = st.rules & ~<uint64_t>R_LINK_FAILED | R_SEPARATE
        else:
            st.rules |= R_IOVA_FULL
        s.n = pieces
        rc = limits_refuse(dev, st, it, &s, False)
        if rc:
            return rc
    else:
        st.rules |= R_NONCOHERENT
    return prepare_each(dev, st, it, pieces)


# blk_dma_map_iter_start: the first vector's kind is the whole bio's, which bio_add_page has made sure of
cdef int start_linux_p2p(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef piece first, p
    next_piece(dev, it, &dev.limits, &first)
    while next_piece(dev, it, &dev.limits, &p):
        if p.peer != first.peer:
            give_up(st, R_P2P_MIX)
            return -EINVAL
    restart_pieces(it, &dev.limits)
    if first.type == DMA_P2P_BUS_ADDR:
        return start_peer_alone(st)
    it.p2p = 0
    st.attrs |= DMA_ATTR_MMIO
    return start_linux(dev, st, it)


# nothing for the IOMMU to do, nothing to keep
cdef int start_peer_alone(dma_map_state *st) noexcept nogil:
    st.layout = DMA_LAYOUT_DIRECT
    st.rules |= R_FORGET
    return 0


cdef int start_p2p(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_policy policy) noexcept nogil:
    st.rules |= R_P2P_BUS if it.p2p & 1 << DMA_P2P_BUS_ADDR else 0
    st.rules |= R_P2P_HOST if it.p2p & 1 << DMA_P2P_THRU_HOST_BRIDGE else 0
    if it.p2p & 1 << DMA_P2P_NOT_SUPPORTED:
        give_up(st, R_P2P_REFUSED)
        # Linux's block layer says INVAL where everybody else says EREMOTEIO
        return -EINVAL if policy == DMA_POLICY_LINUX and not it.rq.flags & DMA_RQ_SG else -EREMOTEIO
    if it.p2p & 1 << DMA_P2P_THRU_HOST_BRIDGE and not it.p2p & 1 << DMA_P2P_NONE:
        st.attrs |= DMA_ATTR_MMIO  # all that is linked is
    if policy != DMA_POLICY_LINUX:
        return start_unified_p2p(dev, st, it)
    return start_umem(dev, st, it) if it.rq.flags & DMA_RQ_SG else start_linux_p2p(dev, st, it)


# ib_umem_get maps the page list with dma_map_sgtable
cdef int start_umem(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint32_t n = 0, most, got
    cdef piece p
    cdef dma_limits lim = dev.limits
    cdef phys_vec *v
    cdef int rc
    lim.max_segment_size = dev.sg_max_segment_size
    st.rules |= R_UMEM_SG
    st.sg = 1
    most = count_vecs(it, &lim) + (2 * dev.p2p.nr if it.p2p else 0)  # each range cuts two vectors at most
    v = <phys_vec *>take(<size_t>most * sizeof(phys_vec))
    st.saved = <dma_seg *>take(<size_t>most * sizeof(dma_seg))
    rc = 0 if v != NULL and st.saved != NULL else -ENOMEM
    if rc == 0:
        restart_pieces(it, &lim)
        while it.p2p and next_piece(dev, it, &lim, &p):
            v[n] = p.v
            n += 1
        window_rewind(it)
        while not it.p2p and n < most:
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
    it.p2p = 0
    it.granule_mask = dev.ops.merge_boundary(dev)
    window_rewind(it)
    if window_load(it, &dev.limits) == 0:
        st.rules = R_EMPTY
        return 0
    if dev.p2p != NULL:
        it.pos = it.held.len = 0
        it.p2p = p2p_scan(dev, it)
        if it.p2p != 1 << DMA_P2P_NONE:
            return start_p2p(dev, st, it, policy)
        it.p2p = 0
    if policy == DMA_POLICY_LINUX:
        return start_linux(dev, st, it)
    return start_unified(dev, st, it)


# ---- next, unmap --------------------------------------------------------------------------------------------------

# the vector the window stands at, or NULL after the last
cdef inline const phys_vec *window_peek(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    if it.at == it.have:
        if it.whole or window_load(it, lim) == 0:
            return NULL
    return &it.window[it.at]


cdef inline const phys_vec *window_next(dma_map_iter *it, const dma_limits *lim) noexcept nogil:
    cdef const phys_vec *v = window_peek(it, lim)
    if v != NULL:
        it.at += 1
    return v


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
    cdef const phys_vec *v = window_next(it, &dev.limits)
    cdef uint64_t mask = dev.limits.seg_boundary_mask
    if v == NULL:
        return 0
    take_granules(it, v, seg)
    # vectors that meet on a granule lie side by side now: one segment, where the device takes it
    while (seg.addr.v + seg.len) & it.granule_mask == 0:
        v = window_peek(it, &dev.limits)
        if (v == NULL or v.paddr.v & it.granule_mask or seg.len + v.len > dev.limits.max_segment_size
                or (seg.addr.v & mask) + seg.len + v.len - 1 > mask):
            break
        seg.len += v.len
        it.next += (v.len + it.granule_mask) & ~it.granule_mask
        it.at += 1
    return 1


# the segment of a vector that has granules of its own
cdef inline int take_granules(dma_map_iter *it, const phys_vec *v, dma_seg *seg) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, off = v.paddr.v & gm
    seg.addr = dma_addr(it.next + off)
    seg.len = v.len
    it.next += (off + v.len + gm) & ~gm
    return 1


cdef int next_each(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef const phys_vec *v = window_next(it, &dev.limits)
    return 0 if v == NULL else map_one(dev, st, it, v, st.attrs, seg)


cdef int map_one(dma_device *dev, dma_map_state *st, dma_map_iter *it, const phys_vec *v, unsigned long attrs,
                 dma_seg *seg) noexcept nogil:
    cdef int rc = dev.ops.map_phys(dev, v.paddr, v.len, <dma_data_direction>st.dir, attrs, &seg.addr)
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
        if attrs & DMA_ATTR_MMIO:
            st.saved[st.nr_saved].len |= SAVED_MMIO
        st.nr_saved += 1
    return 1


# with peers in the request: their pieces by bus address, in their place among the others
cdef int next_p2p(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef piece p
    if it.left and st.layout == DMA_LAYOUT_LINEAR:
        return next_linear(dev, st, it, seg)
    if it.held.len:
        seg[0] = it.held
        it.held.len = 0
        return 1
    if not next_piece(dev, it, &dev.limits, &p):
        return 0
    if p.type == DMA_P2P_BUS_ADDR:
        seg.addr = dma_p2p_bus(p.peer, p.v.paddr)
        seg.len = p.v.len
        return 1
    if st.layout == DMA_LAYOUT_GAPPED:
        return take_granules(it, &p.v, seg)
    if st.layout != DMA_LAYOUT_LINEAR:
        return map_one(dev, st, it, &p.v, st.attrs | DMA_ATTR_MMIO if p.type == DMA_P2P_THRU_HOST_BRIDGE else st.attrs, seg)
    it.left = p.v.len  # the run up to the next peer is one range
    while next_piece(dev, it, &dev.limits, &p):
        if p.type == DMA_P2P_BUS_ADDR:
            it.held.addr = dma_p2p_bus(p.peer, p.v.paddr)
            it.held.len = p.v.len
            break
        it.left += p.v.len
    return next_linear(dev, st, it, seg)


cdef inline int next_saved(dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    if it.at == st.nr_saved:
        return 0
    seg[0] = st.saved[it.at]
    it.at += 1
    return 1


cdef int map_next(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    if st.layout == DMA_LAYOUT_GAPPED:
        return next_gapped(dev, it, seg) if likely(it.p2p == 0) else next_p2p(dev, st, it, seg)
    if st.sg:
        return next_saved(st, it, seg)
    if likely(it.p2p == 0):
        if st.layout == DMA_LAYOUT_LINEAR:
            return next_linear(dev, st, it, seg)
        return next_each(dev, st, it, seg) if st.layout != DMA_LAYOUT_NONE else 0
    return next_p2p(dev, st, it, seg) if st.layout != DMA_LAYOUT_NONE else 0


cdef int unmap(dma_device *dev, dma_map_state *st) noexcept nogil:
    cdef dma_data_direction dir = <dma_data_direction>st.dir
    cdef unsigned long attrs
    cdef int rc = 0, one
    cdef uint32_t i
    if st.iova.size:
        rc = dma_iova_destroy(dev, &st.iova, st.mapped, dir, st.attrs)
    elif st.sg and st.nr_saved:
        rc = dev.ops.unmap_sg(dev, st.saved, st.nr_saved, dir, st.attrs)
    else:
        for i in range(st.nr_saved):
            attrs = st.attrs | DMA_ATTR_MMIO if st.saved[i].len & SAVED_MMIO else st.attrs
            one = dev.ops.unmap_phys(dev, st.saved[i].addr, st.saved[i].len & ~SAVED_MMIO, dir, attrs)
            rc = rc if rc else one
    if st.saved != NULL:
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
