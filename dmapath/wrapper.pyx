# cython: language_level=3
"""THE wrapper: a request goes in, segments come out of one iterator, one state goes back.

It knows ops tables and physical vectors, no memory kind and no particular backend. Two policies choose the layout:
``unified`` (linear where the ranges fit, else gapped) and ``linux`` (what block/blk-mq-dma.c and ib_umem_get of Linux 7.3
choose).
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EINVAL, ENOMEM, EREMOTEIO, ERANGE, EXDEV
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_ATTR_SKIP_CPU_SYNC, DMA_DEV_COHERENT, DMA_DEV_UNTRUSTED, DMA_LAYOUT_BOUNCED, DMA_LAYOUT_DIRECT,
    DMA_LAYOUT_GAPPED, DMA_LAYOUT_LINEAR, DMA_LAYOUT_NONE, DMA_LAYOUT_PER_RANGE, DMA_MAP_CHUNK, DMA_P2P_BUS_ADDR,
    DMA_P2P_NONE, DMA_P2P_NOT_SUPPORTED, DMA_P2P_THRU_HOST_BRIDGE, DMA_POLICY_LINUX_SPLIT, DMA_POLICY_UNIFIED, DMA_RQ_SG,
    DMAPATH_ABI, DMAPATH_API_CAPSULE, dma_addr, dma_data_direction, dma_device, dma_iova_destroy, dma_limits, dma_map_iter,
    dma_map_state, dma_p2p_at, dma_p2p_bus, dma_p2p_find, dma_p2p_kind, dma_p2p_range, dma_policy, dma_request, dma_seg,
    dma_segment_room, dmapath_api, phys_addr, phys_addr_t, phys_vec,
)
from dmapath.tap cimport tap_segment

cdef extern from *:
    """
    #define likely(x) __builtin_expect(!!(x), 1)
    #define unlikely(x) __builtin_expect(!!(x), 0)
    /* in the length of an address that is kept: it was mapped as MMIO, and must be unmapped so */
    #define SAVED_MMIO (1ull << 63)
    """
    bint likely(bint) noexcept nogil
    bint unlikely(bint) noexcept nogil
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
    R_LIMITS = 1 << 22
    R_NOT_CAPABLE = 1 << 23
    R_NO_CUT = 1 << 24
    R_BOUNCE_OFFSET = 1 << 25

RULE_BITS = {
    "empty": R_EMPTY, "no-iova": R_NO_IOVA, "no-gap": R_NO_GAP, "gap": R_GAP, "iova-full": R_IOVA_FULL,
    "fits": R_FITS, "gapped": R_GAPPED, "non-coherent": R_NONCOHERENT, "umem-sg": R_UMEM_SG,
    "alignment": R_ALIGNMENT, "virt-boundary": R_VIRT_BOUNDARY, "max-segments": R_MAX_SEGMENTS,
    "segment-cut": R_SEGMENT_CUT, "link-failed": R_LINK_FAILED, "map-failed": R_MAP_FAILED, "forget": R_FORGET,
    "bounced": R_BOUNCED, "p2p-bus": R_P2P_BUS, "p2p-host-bridge": R_P2P_HOST, "p2p-refused": R_P2P_REFUSED,
    "p2p-mix": R_P2P_MIX, "separate": R_SEPARATE,
    "limits": R_LIMITS, "not-capable": R_NOT_CAPABLE, "no-cut": R_NO_CUT, "bounce-offset": R_BOUNCE_OFFSET,
}

cdef uint64_t REFUSALS = R_ALIGNMENT | R_VIRT_BOUNDARY | R_MAX_SEGMENTS | R_NOT_CAPABLE | R_NO_CUT | R_BOUNCE_OFFSET

# How the segments of a mapping leave: dma_map_iter.flags.
cdef enum:
    F_CHECK = 1  # look at each: where they lie was not known before
    F_WHOLE = 2  # as they are: the caller has split the request
    F_GUESS = 4  # range by range: cut a vector before it is mapped, where its segments will probably end


cdef struct shape:  # what one look at all vectors tells
    uint64_t bits       # or of all addresses and lengths
    uint64_t edges      # or of the addresses and ends where two vectors meet
    uint64_t joints     # the same of those that the IOMMU lays side by side: all but peers' by bus address
    uint64_t linked     # their bytes
    uint64_t padded     # their bytes, each vector rounded out to granules
    phys_addr_t first   # the first of them
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


# ---- reading vectors: with peers in the request each is of one kind of memory --------------------------------------

# cut vectors where memory changes hands
cdef uint32_t load_pieces(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef const dma_p2p_range *r
    cdef phys_vec *v
    cdef uint32_t n = 0
    cdef int inside = 0
    while n < DMA_MAP_CHUNK and (it.rest.len or it.rq.fill(it.rq, &it.cursor, it.lim, &it.rest, 1)):
        v = &it.window[n]
        v[0] = it.rest
        r = dma_p2p_at(dev.p2p, v.paddr, &inside)
        if inside and v.len > r.start.v + r.size - v.paddr.v:
            v.len = r.start.v + r.size - v.paddr.v
        elif not inside and r != NULL and v.len > r.start.v - v.paddr.v:
            v.len = r.start.v - v.paddr.v
        it.rest.paddr.v += v.len
        it.rest.len -= v.len
        n += 1
    return n


cdef inline void window_rewind(dma_map_iter *it) noexcept nogil:
    it.cursor.item = it.cursor.sub = it.cursor.pos = 0
    it.rest.len = 0
    it.at = 0


cdef inline uint32_t window_load(dma_device *dev, dma_map_iter *it) noexcept nogil:
    if likely(it.p2p == 0):
        it.have = it.rq.fill(it.rq, &it.cursor, it.lim, it.window, DMA_MAP_CHUNK)
    else:
        it.have = load_pieces(dev, it)
    it.at = 0
    return it.have


# back to the first vector; when the window holds them all there is nothing to read again
cdef inline void window_restart(dma_device *dev, dma_map_iter *it) noexcept nogil:
    window_rewind(it)
    if not it.whole:
        window_load(dev, it)


# read the vectors again, by other limits or in pieces
cdef inline void window_again(dma_device *dev, dma_map_iter *it) noexcept nogil:
    it.whole = 0
    window_restart(dev, it)


# the vector the window stands at, or NULL after the last
cdef inline const phys_vec *window_peek(dma_device *dev, dma_map_iter *it) noexcept nogil:
    if it.at == it.have:
        if it.whole or window_load(dev, it) == 0:
            return NULL
    return &it.window[it.at]


# the peer that a vector goes to without the host, or NULL: the IOMMU has nothing to do with it
cdef inline const dma_p2p_range *peer_of(dma_device *dev, dma_map_iter *it, const phys_vec *v) noexcept nogil:
    cdef const dma_p2p_range *r
    if likely(it.p2p == 0):
        return NULL
    r = dma_p2p_find(dev, v.paddr)
    return r if dma_p2p_kind(r) == DMA_P2P_BUS_ADDR else NULL


cdef inline unsigned long attrs_of(dma_device *dev, dma_map_state *st, dma_map_iter *it, const phys_vec *v) noexcept nogil:
    if likely(it.p2p == 0) or dma_p2p_kind(dma_p2p_find(dev, v.paddr)) != DMA_P2P_THRU_HOST_BRIDGE:
        return st.attrs
    return st.attrs | DMA_ATTR_MMIO


# look at every vector once, and leave the window at the first
cdef void measure(dma_device *dev, dma_map_iter *it, shape *s) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, at = it.window[0].paddr.v, size = it.window[0].len, end = at + size
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
        if window_load(dev, it) == 0:
            it.have = n  # exactly full: the window still holds the last of them
            break
        n = it.have
    it.whole = s.n == it.have
    window_restart(dev, it)
    s.bits, s.edges, s.padded = bits, edges, padded
    s.joints, s.linked, s.first = edges, it.rq.total, it.window[0].paddr


# the same of what the IOMMU gets where a request has peers in it
cdef void measure_linked(dma_device *dev, dma_map_iter *it, shape *s) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, end = 0
    cdef const phys_vec *v = window_peek(dev, it)
    s.joints = s.linked = s.padded = 0
    while v != NULL:
        if peer_of(dev, it, v) == NULL:
            if s.linked:
                s.joints |= v.paddr.v | end
            else:
                s.first = v.paddr
            end = v.paddr.v + v.len
            s.linked += v.len
            s.padded += ((end + gm) & ~gm) - (v.paddr.v & ~gm)
        it.at += 1
        v = window_peek(dev, it)
    window_restart(dev, it)


# how many vectors there are; the window ends up at the first
cdef uint32_t count_vecs(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef uint32_t n = 0
    window_rewind(it)
    while window_load(dev, it):
        n += it.have
    window_again(dev, it)
    return n


# ---- segments leave: the one place where the device's limits are kept ------------------------------------------------

cdef inline uint32_t most_segments(dma_device *dev, dma_map_iter *it) noexcept nogil:
    return dev.sg_max_segments if it.rq.flags & DMA_RQ_SG else dev.limits.max_segments


# where the next segment must meet the last one: the low bits count, and 0 stands for "there was none"
cdef inline uint64_t end_after(uint64_t last) noexcept nogil:
    return (last + 1) | <uint64_t>(last == UINT64_MAX) << 63


# 1, or what the device cannot take: a rule, and -errno
cdef int check_segment(dma_device *dev, dma_map_state *st, dma_map_iter *it, const dma_seg *seg) noexcept nogil:
    cdef uint64_t at = seg.addr.v, last = at + (seg.len - 1)
    cdef bint moved = st.rules & R_BOUNCED  # the request's own addresses were looked at before
    if last < at or last > dev.reach:
        st.rules |= R_NOT_CAPABLE
        return -ERANGE
    if (at | seg.len) & dev.limits.dma_alignment:
        st.rules |= R_BOUNCE_OFFSET if moved else R_ALIGNMENT
        return -EINVAL
    if it.end and (at | it.end) & dev.limits.virt_boundary:
        st.rules |= R_BOUNCE_OFFSET if moved else R_VIRT_BOUNDARY
        return -EINVAL
    if it.given == most_segments(dev, it):
        st.rules |= R_MAX_SEGMENTS
        return -EINVAL
    it.given += 1
    it.end = end_after(last)
    return 1


# a segment of what is mapped
cdef inline int hand_out(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef uint64_t n = it.left, at = it.addr, mask = dev.limits.seg_boundary_mask
    if unlikely(n > dev.limits.max_segment_size or n - 1 > mask - (at & mask)) and not it.flags & F_WHOLE:
        n = dma_segment_room(&dev.limits, at, n)
        if n == 0:
            st.rules |= R_NO_CUT
            return -EINVAL
        st.rules |= R_SEGMENT_CUT
    seg.addr = dma_addr(at)
    seg.len = n
    it.addr = at + n
    it.left -= n
    return check_segment(dev, st, it, seg) if unlikely(it.flags & F_CHECK) else 1


# what is mapped as a list
cdef inline int run_saved(dma_map_state *st, dma_map_iter *it) noexcept nogil:
    if it.at == st.nr_saved:
        return 0
    it.addr, it.left = st.saved[it.at].addr.v, st.saved[it.at].len
    it.at += 1
    return 1


# one range without gaps, between two peers
cdef int run_linear(dma_device *dev, dma_map_iter *it, const phys_vec *v) noexcept nogil:
    it.addr = it.base
    while v != NULL and peer_of(dev, it, v) == NULL:
        it.left += v.len
        it.at += 1
        v = window_peek(dev, it)
    it.base += it.left
    return 1


# of one gapped range: a vector has granules of its own, and those that meet it on a granule lie side by side with it
cdef int next_gapped(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef uint64_t gm = it.granule_mask, off, n, base = it.base
    cdef const phys_vec *v = window_peek(dev, it)
    if v == NULL:
        return 0
    it.at += 1
    off, n = v.paddr.v & gm, v.len
    seg.addr = dma_addr(base + off)
    base += (off + n + gm) & ~gm
    while (off + n) & gm == 0:
        v = window_peek(dev, it)
        if v == NULL or v.paddr.v & gm or peer_of(dev, it, v) != NULL:
            break
        n += v.len
        base += (v.len + gm) & ~gm
        it.at += 1
    seg.len, it.base = n, base
    return 1


# a peer's memory by its bus address; False: it is not one
cdef bint run_peer(dma_device *dev, dma_map_iter *it, const phys_vec *v) noexcept nogil:
    cdef const dma_p2p_range *peer = peer_of(dev, it, v)
    if peer == NULL:
        return False
    it.addr, it.left = dma_p2p_bus(peer, v.paddr).v, v.len
    it.at += 1
    return True


# the next run of bytes that lie side by side for the device; range by range this is where they are mapped
cdef int next_run(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef const phys_vec *v
    cdef dma_seg run
    if st.sg:
        return run_saved(st, it)
    if st.layout == DMA_LAYOUT_LINEAR and it.p2p == 0:
        return 0  # it was one run
    v = window_peek(dev, it)
    if v == NULL:
        return 0
    if run_peer(dev, it, v):
        return 1
    if st.layout == DMA_LAYOUT_GAPPED:
        next_gapped(dev, st, it, &run)
        it.addr, it.left = run.addr.v, run.len
        return 1
    return run_linear(dev, it, v) if st.layout == DMA_LAYOUT_LINEAR else run_mapped(dev, st, it, v)


# of anything: what has to be cut or looked at
cdef int next_cut(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef int rc = 1
    if it.left == 0:
        rc = next_run(dev, st, it)
    return hand_out(dev, st, it, seg) if rc > 0 else rc


cdef int next_none(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    return 0


cdef int next_shown(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef int rc = it.next(dev, st, it, seg)
    if rc > 0:
        tap_segment(dev, st, it, seg)
    return rc


# 1 and the next segment, 0 after the last
cdef int map_next(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    if unlikely(dev.tap != NULL):
        return next_shown(dev, st, it, seg)
    return it.next(dev, st, it, seg)


# read all segments of what lies in one range or list, without giving them to anybody: does the device take them?
cdef bint device_takes(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint64_t rules = st.rules, addr = it.addr, left = it.left, base = it.base
    cdef uint32_t flags = it.flags
    cdef dma_seg seg
    cdef int rc = 1
    it.flags |= F_CHECK
    it.given = it.end = 0
    while rc > 0:
        rc = next_cut(dev, st, it, &seg)
    it.flags, it.addr, it.left, it.base = flags, addr, left, base
    if rc == 0:
        st.rules = rules
    return rc == 0


# ---- start --------------------------------------------------------------------------------------------------------

cdef inline void give_up(dma_map_state *st, uint64_t rule) noexcept nogil:
    st.rules |= rule
    st.layout = DMA_LAYOUT_NONE
    st.iova.size = 0


# does it break what holds for the vectors themselves, wherever they are mapped?
cdef inline bint breaks(dma_device *dev, dma_map_iter *it, const shape *s) noexcept nogil:
    return (s.bits & dev.limits.dma_alignment or s.edges & dev.limits.virt_boundary
            or s.n > most_segments(dev, it))


cdef int refuse(dma_device *dev, dma_map_state *st, dma_map_iter *it, const shape *s) noexcept nogil:
    if s.bits & dev.limits.dma_alignment:
        give_up(st, R_ALIGNMENT)
    elif s.edges & dev.limits.virt_boundary:
        give_up(st, R_VIRT_BOUNDARY)
    else:
        give_up(st, R_MAX_SEGMENTS)
    return -EINVAL


cdef inline uint64_t span_of(const phys_vec *v, bint gapped, uint64_t gm) noexcept nogil:
    return (v.len + (v.paddr.v & gm) + gm) & ~gm if gapped else v.len


# the window's vectors one by one, since registers and memory differ in an attribute
cdef int link_pieces(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped) noexcept nogil:
    cdef const phys_vec *v
    cdef unsigned long attrs
    cdef uint32_t i
    cdef int rc
    for i in range(it.have):
        v = &it.window[i]
        if peer_of(dev, it, v) != NULL:
            continue
        attrs = attrs_of(dev, st, it, v)
        if gapped:
            rc = dev.ops.iova_link_gapped(dev, &st.iova, v, 1, st.mapped, <dma_data_direction>st.dir, attrs)
        else:
            rc = dev.ops.iova_link_vec(dev, &st.iova, v, 1, st.mapped, <dma_data_direction>st.dir, attrs)
        if rc:
            return rc
        st.mapped += span_of(v, gapped, it.granule_mask)
    return 0


# link every vector but peers', sync once
cdef int link_all(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, uint64_t size) noexcept nogil:
    cdef dma_data_direction dir = <dma_data_direction>st.dir
    cdef uint32_t i
    cdef int rc = 0
    st.mapped = 0
    while it.have:
        if unlikely(it.p2p):
            rc = link_pieces(dev, st, it, gapped)
        elif gapped:
            rc = dev.ops.iova_link_gapped(dev, &st.iova, it.window, it.have, st.mapped, dir, st.attrs)
        else:
            rc = dev.ops.iova_link_vec(dev, &st.iova, it.window, it.have, st.mapped, dir, st.attrs)
        if rc:
            break
        if it.whole:
            st.mapped = size
            break
        for i in range(it.have if it.p2p == 0 else 0):
            st.mapped += span_of(&it.window[i], gapped, it.granule_mask)
        window_load(dev, it)
    if rc == 0:
        rc = dev.ops.iova_sync(dev, &st.iova, 0, size)
    if unlikely(rc):
        dma_iova_destroy(dev, &st.iova, st.mapped, dir, st.attrs)
        give_up(st, R_LINK_FAILED)
    window_restart(dev, it)
    return rc


# is it plain to see that segments of one range are within the limits? If not, device_takes looks at each
cdef inline bint plainly_taken(dma_device *dev, dma_map_state *st, dma_map_iter *it, uint64_t size,
                               uint32_t most) noexcept nogil:
    cdef uint64_t at = st.iova.addr.v, last = at + (size - 1)
    return (it.p2p == 0 and last >= at and last <= dev.reach and size <= dev.limits.max_segment_size
            and (at ^ last) & ~dev.limits.seg_boundary_mask == 0 and most <= most_segments(dev, it)
            and (dev.limits.dma_alignment | dev.limits.virt_boundary) & ~it.granule_mask == 0)


# 1: one IOVA range holds the request; 0: not one that the backend gives and the device takes; < 0: failed
cdef int map_in_one(dma_device *dev, dma_map_state *st, dma_map_iter *it, bint gapped, const shape *s) noexcept nogil:
    cdef uint64_t size = s.padded if gapped else s.linked
    cdef phys_addr_t first = phys_addr(s.first.v & ~it.granule_mask) if gapped else s.first
    cdef int rc
    if not dev.ops.iova_try_alloc(dev, &st.iova, first, size):
        return separately(st, it, R_IOVA_FULL)
    st.layout = DMA_LAYOUT_GAPPED if gapped else DMA_LAYOUT_LINEAR
    it.addr = it.base = st.iova.addr.v
    it.left = 0 if gapped or it.p2p else size
    it.next = next_cut
    if plainly_taken(dev, st, it, size, s.n if gapped else 1):
        it.next = next_gapped if gapped else next_cut
    elif not it.flags & F_WHOLE:
        rc = device_takes(dev, st, it)
        window_restart(dev, it)
        if not rc:
            dev.ops.iova_free(dev, &st.iova)
            return separately(st, it, R_LIMITS)
    rc = link_all(dev, st, it, gapped, size)
    if rc == -EXDEV:
        return separately(st, it, R_SEPARATE)
    return rc if rc else 1


# one range it cannot be, and why
cdef int separately(dma_map_state *st, dma_map_iter *it, uint64_t rule) noexcept nogil:
    st.rules = st.rules & ~<uint64_t>(R_LINK_FAILED | R_SEGMENT_CUT | REFUSALS) | rule
    st.iova.size = 0
    it.left = it.given = 0
    return 0


# map n vectors range by range, in map_next; what unmap will need is kept only where something must be unmapped
cdef inline int prepare_each(dma_device *dev, dma_map_state *st, dma_map_iter *it, uint32_t n, bint cuts) noexcept nogil:
    st.layout = DMA_LAYOUT_PER_RANGE if it.granule_mask else DMA_LAYOUT_DIRECT
    it.keep = dev.limits.dma_alignment | dev.limits.virt_boundary
    it.end = 0
    it.next = map_vector
    if unlikely(cuts or it.p2p or it.flags & F_WHOLE):
        it.next = next_cut
        it.flags |= 0 if it.flags & F_WHOLE else F_CHECK
        it.left = it.pos = it.delta = 0
    if not dev.ops.need_unmap(dev):
        st.rules |= R_FORGET
        return 0
    return keep_addresses(st, it, n)


cdef int keep_addresses(dma_map_state *st, dma_map_iter *it, uint32_t n) noexcept nogil:
    st.rules &= ~<uint64_t>R_FORGET
    it.room = n
    st.saved = <dma_seg *>take(<size_t>n * sizeof(dma_seg))
    if st.saved == NULL:
        give_up(st, R_MAP_FAILED)
        return -ENOMEM
    return 0


# more segments than vectors, since the device's limits cut them
cdef int keep_more(dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef dma_seg *more = <dma_seg *>take(2 * <size_t>it.room * sizeof(dma_seg))
    if more == NULL:
        return -ENOMEM
    memcpy(more, st.saved, it.room * sizeof(dma_seg))
    free(st.saved)
    st.saved = more
    it.room *= 2
    return 0


# an untrusted device's buffer that begins inside a granule bounces; where bounce buffers do not keep that place, such a
# range cannot be linked (iommu_dma_iova_link_swiotlb), only mapped by itself
cdef bint heads_lose_their_place(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef uint64_t heads = 0
    cdef uint32_t i
    window_rewind(it)
    while window_load(dev, it):
        for i in range(it.have):
            heads |= it.window[i].paddr.v
    window_again(dev, it)
    return heads & it.granule_mask & ~dev.min_align_mask != 0


cdef inline bint cannot_link(dma_device *dev, dma_map_iter *it) noexcept nogil:
    if likely(not dev.flags & DMA_DEV_UNTRUSTED) or it.granule_mask & ~dev.min_align_mask == 0:
        return False
    return heads_lose_their_place(dev, it)


# segments that come at least, range by range: each vector's own, cut by the address where that is known, else by size alone
cdef uint64_t count_cut(dma_device *dev, dma_map_iter *it, uint32_t most) noexcept nogil:
    cdef dma_limits lim = dev.limits
    cdef const phys_vec *v = window_peek(dev, it)
    cdef const dma_p2p_range *peer
    cdef uint64_t n = 0, done, part, at
    while v != NULL and n <= most:
        peer = peer_of(dev, it, v)
        at = v.paddr.v if peer == NULL else dma_p2p_bus(peer, v.paddr).v
        # an IOVA is aligned to its size, so it is cut where the physical address would be
        lim.seg_boundary_mask = dev.limits.seg_boundary_mask if it.granule_mask or peer != NULL else UINT64_MAX
        done = 0
        while done < v.len and n <= most:
            part = dma_segment_room(&lim, at + done, v.len - done)
            done += part if part else v.len
            n += 1
        it.at += 1
        v = window_peek(dev, it)
    window_again(dev, it)
    return n


# may the device's limits cut a vector?
cdef inline bint may_cut(dma_device *dev, dma_map_iter *it) noexcept nogil:
    return it.rq.total > dev.limits.max_segment_size or dev.limits.seg_boundary_mask != UINT64_MAX


cdef inline int start_each(dma_device *dev, dma_map_state *st, dma_map_iter *it, const shape *s) noexcept nogil:
    cdef uint32_t most = most_segments(dev, it)
    cdef bint cuts = may_cut(dev, it)
    if unlikely(breaks(dev, it, s)):
        return refuse(dev, st, it, s)
    if unlikely(cuts):
        it.flags = F_GUESS
        if count_cut(dev, it, most) > most:
            give_up(st, R_MAX_SEGMENTS)
            return -EINVAL
    return prepare_each(dev, st, it, s.n, cuts)


cdef int start_unified(dma_device *dev, dma_map_state *st, dma_map_iter *it, shape *s) noexcept nogil:
    cdef uint64_t gm = it.granule_mask
    cdef bint fits
    cdef int rc
    if unlikely(s.bits & dev.limits.dma_alignment):
        return refuse(dev, st, it, s)
    if unlikely(it.p2p):
        measure_linked(dev, it, s)
        if s.linked == 0:
            return start_peer_alone(dev, st, it, s)
    if gm == 0:
        st.rules |= R_NO_IOVA
    elif cannot_link(dev, it):
        st.rules |= R_SEPARATE
    else:
        fits = s.joints & gm == 0
        if fits or dev.flags & DMA_DEV_COHERENT:
            if unlikely(not fits and s.edges & dev.limits.virt_boundary):
                return refuse(dev, st, it, s)
            st.rules |= R_FITS if fits else R_GAPPED
            rc = map_in_one(dev, st, it, not fits, s)
            if rc:
                return rc if rc < 0 else 0
        else:
            # unmap has to clean exactly the bytes that were mapped, so it must know the ranges
            st.rules |= R_NONCOHERENT
    return start_each(dev, st, it, s)


# ---- peer-to-peer: a request that touches BARs --------------------------------------------------------------------

# which kinds of memory the request touches, as a set of bits; the window is left at the first vector
cdef uint32_t p2p_scan(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef uint32_t seen = 0
    cdef const phys_vec *v = window_peek(dev, it)
    while v != NULL:
        seen |= 1 << dma_p2p_kind(dma_p2p_find(dev, v.paddr))
        it.at += 1
        v = window_peek(dev, it)
    return seen


# nothing for the IOMMU to do, nothing to keep
cdef int start_peer_alone(dma_device *dev, dma_map_state *st, dma_map_iter *it, const shape *s) noexcept nogil:
    if not it.flags & F_WHOLE and breaks(dev, it, s):
        return refuse(dev, st, it, s)
    st.layout = DMA_LAYOUT_DIRECT
    st.rules |= R_FORGET
    it.next = next_cut
    if not it.flags & F_WHOLE and not device_takes(dev, st, it):
        st.layout = DMA_LAYOUT_NONE
        return -ERANGE if st.rules & R_NOT_CAPABLE else -EINVAL
    window_restart(dev, it)
    return 0


# may this request have these peers in it?
cdef int admit_peers(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_policy policy) noexcept nogil:
    st.rules |= R_P2P_BUS if it.p2p & 1 << DMA_P2P_BUS_ADDR else 0
    st.rules |= R_P2P_HOST if it.p2p & 1 << DMA_P2P_THRU_HOST_BRIDGE else 0
    if it.p2p & 1 << DMA_P2P_NOT_SUPPORTED:
        give_up(st, R_P2P_REFUSED)
        # Linux's block layer says INVAL where everybody else says EREMOTEIO
        return -EREMOTEIO if policy == DMA_POLICY_UNIFIED or it.rq.flags & DMA_RQ_SG else -EINVAL
    if it.p2p & 1 << DMA_P2P_THRU_HOST_BRIDGE and not it.p2p & 1 << DMA_P2P_NONE:
        st.attrs |= DMA_ATTR_MMIO  # all that is linked is
    return 0


# ---- policy linux -------------------------------------------------------------------------------------------------

# ib_umem_get maps the page list with dma_map_sgtable
cdef int start_umem(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    cdef uint32_t n = 0, most
    cdef dma_limits lim = dev.limits
    cdef phys_vec *v
    cdef int rc
    lim.max_segment_size = dev.sg_max_segment_size
    it.lim = &lim
    st.rules |= R_UMEM_SG
    most = count_vecs(dev, it)
    v = <phys_vec *>take(<size_t>most * sizeof(phys_vec))
    st.saved = <dma_seg *>take(<size_t>most * sizeof(dma_seg))
    rc = 0 if v != NULL and st.saved != NULL else -ENOMEM
    if rc == 0:
        while it.have and it.have <= most - n:
            memcpy(v + n, it.window, it.have * sizeof(phys_vec))
            n += it.have
            window_load(dev, it)
        rc = dev.ops.map_sg(dev, v, n, <dma_data_direction>st.dir, st.attrs, st.saved)
    free(v)
    if rc < 0:
        free(st.saved)
        st.saved = NULL
        give_up(st, R_MAP_FAILED)
        return rc
    st.sg = 1
    st.nr_saved = <uint32_t>rc
    st.layout = DMA_LAYOUT_LINEAR if it.granule_mask else DMA_LAYOUT_DIRECT
    return check_umem(dev, st, it)


cdef int check_umem(dma_device *dev, dma_map_state *st, dma_map_iter *it) noexcept nogil:
    it.at = 0
    it.next = next_cut
    if not it.flags & F_WHOLE and not device_takes(dev, st, it):
        unmap(dev, st)
        return -ERANGE if st.rules & R_NOT_CAPABLE else -EINVAL
    it.at = 0
    return 0


# blk_dma_map_iter_start: the first vector's kind is the whole bio's, which bio_add_page has made sure of
cdef bint mixed(dma_device *dev, dma_map_iter *it) noexcept nogil:
    cdef const phys_vec *v = window_peek(dev, it)
    cdef const dma_p2p_range *first = dma_p2p_find(dev, v.paddr)
    while v != NULL and dma_p2p_find(dev, v.paddr) == first:
        it.at += 1
        v = window_peek(dev, it)
    window_again(dev, it)
    return v != NULL


# may the request break a limit? If not there is no need to measure it
cdef inline bint may_break(dma_device *dev, dma_map_iter *it) noexcept nogil:
    return (it.rq.max_vecs > dev.limits.max_segments or may_cut(dev, it)
            or dev.limits.dma_alignment | dev.limits.virt_boundary)


# blk_rq_dma_map_iter_start
cdef int start_linux(dma_device *dev, dma_map_state *st, dma_map_iter *it, shape *s) noexcept nogil:
    cdef uint64_t gm = it.granule_mask
    cdef int rc = 0
    if it.rq.flags & DMA_RQ_SG:
        return start_umem(dev, st, it)
    if unlikely(it.p2p):
        if mixed(dev, it):
            give_up(st, R_P2P_MIX)
            return -EINVAL
        if it.p2p & 1 << DMA_P2P_BUS_ADDR:
            return start_peer_alone(dev, st, it, s)
        it.p2p = 0
        window_again(dev, it)
    if s.n and breaks(dev, it, s):
        return refuse(dev, st, it, s)
    it.whole = it.whole or it.have < DMA_MAP_CHUNK
    if it.rq.gap_mask & gm:
        st.rules |= R_GAP
    else:
        st.rules |= R_NO_GAP if gm else R_NO_IOVA
        s.linked, s.first = it.rq.total, it.window[0].paddr
        rc = map_in_one(dev, st, it, False, s)
        if gm == 0:
            st.rules &= ~<uint64_t>R_IOVA_FULL
    if rc:
        return rc if rc < 0 else 0
    return prepare_each(dev, st, it, it.have if it.whole else count_vecs(dev, it), may_cut(dev, it))


cdef int map_start(dma_device *dev, const dma_request *rq, dma_policy policy, dma_map_state *st,
                   dma_map_iter *it) noexcept nogil:
    cdef shape s
    cdef int rc
    memset(st, 0, sizeof(dma_map_state))
    st.dir = <unsigned char>rq.dir
    st.attrs = rq.attrs
    it.rq = rq
    # unified: vectors join as they lie; segments are cut by the address the device sees
    it.lim = &dev.uncut if policy == DMA_POLICY_UNIFIED else &dev.limits
    it.left = 0
    it.whole = it.given = it.shown = 0
    it.flags = F_WHOLE if unlikely(policy == DMA_POLICY_LINUX_SPLIT) else 0
    it.granule_mask = dev.ops.merge_boundary(dev)
    it.p2p = dev.p2p != NULL
    window_rewind(it)
    if window_load(dev, it) == 0:
        st.rules = R_EMPTY
        it.next = next_none
        return 0
    if unlikely(it.p2p):
        it.p2p = p2p_scan(dev, it)
        it.p2p = it.p2p if it.p2p != 1 << DMA_P2P_NONE else 0
        window_again(dev, it)
        rc = admit_peers(dev, st, it, policy) if it.p2p else 0
        if rc:
            return rc
    s.n = 0
    if policy == DMA_POLICY_UNIFIED or may_break(dev, it) and not it.flags & F_WHOLE:
        measure(dev, it, &s)
    return start_unified(dev, st, it, &s) if policy == DMA_POLICY_UNIFIED else start_linux(dev, st, it, &s)


# ---- range by range -----------------------------------------------------------------------------------------------

cdef int undo_map(dma_device *dev, dma_map_state *st, const dma_seg *seg, unsigned long attrs, int rc) noexcept nogil:
    dev.ops.unmap_phys(dev, seg.addr, seg.len, <dma_data_direction>st.dir, attrs | DMA_ATTR_SKIP_CPU_SYNC)
    return rc


# a direct device bounces: from here on its addresses are needed
cdef int note_bounce(dma_device *dev, dma_map_state *st, dma_map_iter *it, const dma_seg *seg,
                     unsigned long attrs) noexcept nogil:
    if not dev.ops.is_bounced(dev, seg.addr):
        return 0
    st.rules |= R_BOUNCED
    st.layout = DMA_LAYOUT_BOUNCED
    if st.saved == NULL and keep_addresses(st, it, 16):
        return undo_map(dev, st, seg, attrs, -ENOMEM)
    return 0


cdef inline int save(dma_device *dev, dma_map_state *st, dma_map_iter *it, const dma_seg *seg,
                     unsigned long attrs) noexcept nogil:
    if unlikely(st.nr_saved == it.room) and keep_more(st, it):
        return undo_map(dev, st, seg, attrs, -ENOMEM)
    st.saved[st.nr_saved] = seg[0]
    if unlikely(attrs & DMA_ATTR_MMIO):
        st.saved[st.nr_saved].len |= SAVED_MMIO
    st.nr_saved += 1
    return 0


# a vector that is one segment
cdef int map_vector(dma_device *dev, dma_map_state *st, dma_map_iter *it, dma_seg *seg) noexcept nogil:
    cdef const phys_vec *v = window_peek(dev, it)
    cdef uint64_t last
    cdef int rc
    if v == NULL:
        return 0
    it.at += 1
    rc = dev.ops.map_phys(dev, v.paddr, v.len, <dma_data_direction>st.dir, st.attrs, &seg.addr)
    if unlikely(rc):
        st.rules |= R_MAP_FAILED
        return rc
    seg.len = v.len
    if dev.swiotlb != NULL and note_bounce(dev, st, it, seg, st.attrs):
        return -ENOMEM
    if st.saved != NULL and save(dev, st, it, seg, st.attrs):
        return -ENOMEM
    last = seg.addr.v + (v.len - 1)
    if unlikely((seg.addr.v | it.end) & it.keep or last > dev.reach or last < seg.addr.v):
        return check_segment(dev, st, it, seg)
    it.end = end_after(last)
    return 1


# map what one segment will probably hold of a vector. The guess is where the last one ended up; a wrong one is corrected
# once, so that the device's limits cut as few as they can
cdef int map_part(dma_device *dev, dma_map_state *st, dma_map_iter *it, const phys_vec *v, unsigned long attrs,
                  dma_seg *seg) noexcept nogil:
    cdef uint64_t at = v.paddr.v + it.pos, rest = v.len - it.pos
    cdef bint guess = it.flags & F_GUESS
    cdef int rc
    while True:
        seg.len = dma_segment_room(&dev.limits, at + it.delta, rest) if it.flags & F_GUESS else rest
        seg.len = seg.len if seg.len else rest
        rc = dev.ops.map_phys(dev, phys_addr(at), seg.len, <dma_data_direction>st.dir, attrs, &seg.addr)
        if rc:
            st.rules |= R_MAP_FAILED
            return rc
        # where addresses follow the physical ones, too short a guess is wrong as well
        if not guess or dma_segment_room(&dev.limits, seg.addr.v, seg.len if it.granule_mask else rest) == seg.len:
            return 0
        guess = False
        it.delta = seg.addr.v - at
        undo_map(dev, st, seg, attrs, 0)


cdef int run_mapped(dma_device *dev, dma_map_state *st, dma_map_iter *it, const phys_vec *v) noexcept nogil:
    cdef unsigned long attrs = attrs_of(dev, st, it, v)
    cdef dma_seg seg
    cdef int rc = map_part(dev, st, it, v, attrs, &seg)
    if rc == 0 and dev.swiotlb != NULL:
        rc = note_bounce(dev, st, it, &seg, attrs)
    if rc == 0 and st.saved != NULL:
        rc = save(dev, st, it, &seg, attrs)
    if rc:
        return rc
    it.addr, it.left = seg.addr.v, seg.len
    it.pos += seg.len
    if it.pos == v.len:
        it.pos = 0
        it.at += 1
    return 1


# ---- unmap --------------------------------------------------------------------------------------------------------

# what was mapped range by range; apart: only what bounced, or only what did not. The first error is kept
cdef inline int unmap_saved(dma_device *dev, dma_map_state *st, bint apart, int bounced) noexcept nogil:
    cdef unsigned long attrs
    cdef uint32_t i
    cdef int rc = 0, one
    for i in range(st.nr_saved):
        if unlikely(apart) and (dev.ops.is_bounced(dev, st.saved[i].addr) != 0) != bounced:
            continue
        attrs = st.attrs | DMA_ATTR_MMIO if st.saved[i].len & SAVED_MMIO else st.attrs
        one = dev.ops.unmap_phys(dev, st.saved[i].addr, st.saved[i].len & ~SAVED_MMIO, <dma_data_direction>st.dir, attrs)
        rc = rc if rc else one
    return rc


cdef int unmap(dma_device *dev, dma_map_state *st) noexcept nogil:
    cdef dma_data_direction dir = <dma_data_direction>st.dir
    cdef bint apart
    cdef int rc = 0, one
    if st.iova.size:
        rc = dma_iova_destroy(dev, &st.iova, st.mapped, dir, st.attrs)
    elif st.sg and st.nr_saved:
        rc = dev.ops.unmap_sg(dev, st.saved, st.nr_saved, dir, st.attrs)
    else:
        # a part that bounced may share a cache line with one that did not: it is copied back after that line was dropped
        apart = st.layout == DMA_LAYOUT_BOUNCED and not dev.flags & DMA_DEV_COHERENT
        rc = unmap_saved(dev, st, apart, 0)
        one = unmap_saved(dev, st, True, 1) if apart else 0
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
