# cython: language_level=3
"""Device: a driver's view of its hardware's limits and of the DMA API behind them, with the kernel's names.

A request is mapped with ``map``; the two steps (``iova_*``), the classic calls (``map_phys``, ``map_sg``) and the syncs
are there one by one.
"""
import mmap
import warnings

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from dmapath._core cimport phys_mem_host, swiotlb_map, swiotlb_unmap, swiotlb_want
from dmapath.abi cimport (
    DMA_ATTR_MMIO, DMA_ATTR_NO_WARN, DMA_ATTR_PRIVILEGED, DMA_ATTR_REQUIRE_COHERENT, DMA_ATTR_SKIP_CPU_SYNC,
    DMA_DEV_COHERENT, DMA_DEV_QUIRKS, DMA_DEV_UNTRUSTED, DMA_LAYOUT_BOUNCED, DMA_LAYOUT_DIRECT,
    DMA_LAYOUT_PER_RANGE, DMA_P2P_NOT_SUPPORTED, DMA_POLICY_LINUX, DMA_POLICY_LINUX_SPLIT, DMA_POLICY_UNIFIED,
    DMAPATH_DEVICE_CAPSULE, dma_addr, dma_addr_t,
    dma_data_direction, dma_device, dma_iova_destroy, dma_iova_free,
    dma_iova_link, dma_iova_size, dma_iova_state, dma_iova_sync, dma_iova_try_alloc, dma_iova_unlink, dma_keys, dma_keys_of,
    dma_ops, dma_p2p, dma_p2p_range, dma_policy, dma_seg, phys_addr, swiotlb as swiotlb_t,
)
from dmapath.backends.base cimport CapsuleBackend
from dmapath.memory cimport PhysMemory
from dmapath.request cimport Mappable
from dmapath.swiotlb cimport Swiotlb
from dmapath.tap cimport Tap
from dmapath.xen cimport XenDomain
from dmapath.wrapper cimport map_next, map_start, unmap

from dmapath import rules
from dmapath.addr import DmaAddr, PhysAddr, as_dma, as_length, as_phys
from dmapath.backends.base import carries_ops
from dmapath.backends.direct import DirectBackend
from dmapath.backends.grant import GrantBackend
from dmapath.backends.iommu import Iommu, IommuDomain
from dmapath.backends.python import PythonBackend
from dmapath.errors import (
    AddressTypeError, DmaValueError, MappingError, NotSupportedError, StateError, at_end, error_for,
)
from dmapath.memory import HostBuffer
from dmapath.request import DIRECTIONS, direction

ATTRS = {"skip_cpu_sync": DMA_ATTR_SKIP_CPU_SYNC, "no_warn": DMA_ATTR_NO_WARN, "privileged": DMA_ATTR_PRIVILEGED,
         "mmio": DMA_ATTR_MMIO, "require_coherent": DMA_ATTR_REQUIRE_COHERENT}


cdef unsigned long attr_bits(attrs) except? 0xffffffff:
    if isinstance(attrs, int):
        return attrs
    cdef unsigned long bits = 0
    for name in (attrs,) if isinstance(attrs, str) else attrs:
        if name not in ATTRS:
            raise DmaValueError(f"one of {', '.join(ATTRS)}", argument="attrs", value=name)
        bits |= <unsigned long>ATTRS[name]
    return bits


cdef dma_data_direction dir_of(value) except *:
    if value == "to_device":
        return <dma_data_direction>1
    if value == "from_device":
        return <dma_data_direction>2
    if value == "none":
        return <dma_data_direction>3
    return <dma_data_direction><int>direction(value)


def _mask(value, name, *, zero=False):
    value = as_length(value, name, least=0) if value < 2**63 else int(value)
    if value >= 2**64 or (value == 0 and not zero):
        raise DmaValueError("a mask of 1 to 64 bits", argument=name, value=value)
    return value


cdef class Segment:
    """What the hardware is given: a DMA address, a length in bytes, and the keys of the registration that it lies in
    (``lkey``, ``rkey``; 0 where the back end needs none)."""

    @property
    def addr(self):
        return DmaAddr(self.addr_)

    def __iter__(self):
        yield DmaAddr(self.addr_)
        yield self.length

    def __eq__(self, other):
        if not isinstance(other, Segment):
            return NotImplemented
        return self.addr_ == (<Segment>other).addr_ and self.length == (<Segment>other).length

    def __hash__(self):
        return hash((self.addr_, self.length))

    def __repr__(self):
        return f"Segment(addr={self.addr_:#x}, length={self.length:#x})"


cdef Segment new_segment(dma_device *dev, const dma_seg *s):
    cdef Segment out = Segment.__new__(Segment)
    cdef dma_keys keys
    out.addr_ = s.addr.v
    out.length = s.len
    if dma_keys_of(dev, s.addr, s.len, &keys) == 0:
        out.lkey, out.rkey = keys.lkey, keys.rkey
    return out


class _UnreadError(StateError, TypeError):
    """A TypeError too: list(mapping) asks for len() first, and takes that for "not known"."""


class SgList(list):
    """What ``Device.map_sg`` gives: a list of Segments that remembers its direction."""

    dir = "bidirectional"


cdef class IovaState:
    """struct dma_iova_state: a reserved range of IOVA. Made by ``Device.iova_try_alloc``; 16 bytes in C."""

    def __init__(self):
        raise TypeError("made by Device.iova_try_alloc")

    @property
    def addr(self):
        """DmaAddr of byte 0; its in-granule offset is that of the physical address it was reserved for."""
        return DmaAddr(self.c.addr.v)

    @property
    def size(self):
        """Bytes, as asked for (dma_iova_size)."""
        return dma_iova_size(&self.c)

    def __repr__(self):
        return f"IovaState(addr={self.c.addr.v:#x}, size={self.size:#x}{'' if self.live else ', freed'})"


@cython.no_gc_clear  # mappings are given back through it
cdef class Device:
    """A DMA device: the limits of its hardware, stated once, and a back end to map on.

    Parameters
    ----------
    iommu : Iommu or None
        The IOMMU that the device is behind; None or mode "passthrough": addresses are physical ones.
    memory : PhysMemory or None
        What physical addresses stand for; needed only where a simulated device moves bytes.
    dma_mask, bus_dma_limit : int
        Greatest address the device and its bus can name (inclusive masks; 0 for the bus: no limit).
    coherent, untrusted : bool
        Whether CPU caches see its DMA; whether it may see nothing but the bytes it was given.
    max_segments, max_segment_size, seg_boundary_mask, virt_boundary, dma_alignment
        As in Linux's queue_limits, and kept for every segment of every request. max_segments None: 65535, and no limit for
        memory regions. max_segment_size in bytes, None: no limit for requests and 64 KiB for ``map_sg``.
    min_align_mask : int
        Address bits that a bounce buffer must keep.
    dma_ranges : sequence of (cpu_start, dma_start, bytes)
        Bus offsets of the direct path.
    forcedac : bool
        Do not try below 4 GiB first (iommu.forcedac).
    swiotlb : Swiotlb or None
        The pool it bounces through: what a direct device cannot reach, and the unaligned ends of an untrusted device's
        buffers behind an IOMMU.
    kernel_quirks : bool
        Accept what Linux accepts though it looks like a defect (a link outside its allocation).
    pci : pci.Function or None
        Its place in the PCIe fabric, by which it reaches other functions' BARs; None: it reaches none.
    xen : XenDomain or None
        The Xen guest it belongs to: it is told machine addresses (swiotlb-xen).
    grants : GrantTable or None
        It is a backend in another domain that sees only what is granted (Xen grant DMA).
    backend : object
        A back end from elsewhere: carries a "dmapath.ops.v1" capsule as ``dma_ops``.
    """

    def __cinit__(self, *, iommu=None, PhysMemory memory=None, dma_mask=2**64 - 1, bus_dma_limit=0, coherent=True,
                  untrusted=False, max_segments=None, max_segment_size=None, seg_boundary_mask=2**64 - 1,
                  virt_boundary=0, dma_alignment=0, min_align_mask=0, dma_ranges=(), forcedac=False,
                  kernel_quirks=False, Swiotlb swiotlb=None, pci=None, XenDomain xen=None, grants=None, backend=None):
        self.config_ = dict(dma_mask=dma_mask, bus_dma_limit=bus_dma_limit, coherent=coherent, untrusted=untrusted,
                            max_segments=max_segments, max_segment_size=max_segment_size,
                            seg_boundary_mask=seg_boundary_mask, virt_boundary=virt_boundary,
                            dma_alignment=dma_alignment, min_align_mask=min_align_mask, dma_ranges=tuple(dma_ranges),
                            forcedac=forcedac, kernel_quirks=kernel_quirks)
        if iommu is not None and not isinstance(iommu, Iommu):
            raise AddressTypeError("an Iommu or None is wanted", argument="iommu", value=iommu)
        if sum(x is not None for x in (xen, grants, backend, iommu)) > 1:
            raise DmaValueError("at most one of iommu, xen, grants and backend", argument="backend", value=backend)
        self.iommu, self.memory, self.swiotlb, self.pci, self.xen, self.grants = iommu, memory, swiotlb, pci, xen, grants
        if swiotlb is not None:
            self.c.swiotlb = <swiotlb_t *>&swiotlb.pool
        self._limits()
        self._ranges(dma_ranges)
        if backend is not None:
            self.backend = CapsuleBackend(backend) if carries_ops(backend) else PythonBackend(backend)
        elif grants is not None:
            self.backend = GrantBackend(grants)
        elif iommu is not None and iommu.mode != "passthrough":
            window = () if pci is None else (pci.root.bus_window,)
            self.backend = IommuDomain(iommu, untrusted=untrusted, reserved=window)
        else:
            self.backend = DirectBackend(xen)
        if memory is not None:
            self.c.mem = memory.mem
            memory.watchers.add(self)
            self.refresh_peers()
        self.backend.attach(&self.c)
        self.c.uncut = self.c.limits
        self.c.uncut.max_segment_size = self.c.uncut.seg_boundary_mask = UINT64_MAX
        if hasattr(backend, "attach"):
            backend.attach(self)

    # as simulated hardware uses it: refused where that could not reach memory
    cdef dma_device *hardware(self) except NULL:
        if self.c.bus == NULL or self.c.mem == NULL:
            raise NotSupportedError("a device with a memory, on a back end with a bus, is wanted", argument="device",
                                    value=self)
        return &self.c

    cdef _limits(self):
        c = self.config_
        self.c.dma_mask = _mask(c["dma_mask"], "dma_mask")
        self.c.bus_dma_limit = _mask(c["bus_dma_limit"], "bus_dma_limit", zero=True)
        self.c.reach = min(self.c.dma_mask, self.c.bus_dma_limit or self.c.dma_mask)
        self.c.min_align_mask = _mask(c["min_align_mask"], "min_align_mask", zero=True)
        self.c.limits.seg_boundary_mask = _mask(c["seg_boundary_mask"], "seg_boundary_mask")
        self.c.limits.virt_boundary = _mask(c["virt_boundary"], "virt_boundary", zero=True)
        self.c.limits.dma_alignment = as_length(c["dma_alignment"], "dma_alignment", least=0, last=UINT32_MAX)
        for name in ("dma_mask", "seg_boundary_mask", "virt_boundary", "min_align_mask", "dma_alignment"):
            if c[name] & (c[name] + 1):
                raise DmaValueError("a mask: all bits below its highest are set", argument=name, value=c[name])
        most = c["max_segments"]
        self.c.limits.max_segments = 65535 if most is None else min(as_length(most, "max_segments"), UINT32_MAX)
        self.c.sg_max_segments = UINT32_MAX if most is None else self.c.limits.max_segments
        size = c["max_segment_size"]
        self.c.limits.max_segment_size = UINT64_MAX if size is None else as_length(size, "max_segment_size")
        self.c.sg_max_segment_size = 65536 if size is None else self.c.limits.max_segment_size
        self.c.pci_32bit_workaround = not c["forcedac"]
        self.c.flags = ((DMA_DEV_COHERENT if c["coherent"] else 0) | (DMA_DEV_UNTRUSTED if c["untrusted"] else 0)
                        | (DMA_DEV_QUIRKS if c["kernel_quirks"] else 0))

    cdef _ranges(self, ranges):
        cdef uint32_t i
        ranges = [(as_phys(cpu, "dma_ranges.cpu_start"), as_dma(dma, "dma_ranges.dma_start"),
                   as_length(n, "dma_ranges.size")) for cpu, dma, n in ranges]
        self.ranges_ = <dma_range_map *>calloc(len(ranges) + 1, sizeof(dma_range_map))
        if self.ranges_ == NULL:
            raise MemoryError("no memory for dma_ranges")
        for cpu, dma, n in ranges:
            if max(cpu, dma) + n > 2**64:
                raise DmaValueError("a region ends at 2**64 at most, on both sides", argument="dma_ranges",
                                    value=(hex(cpu), hex(dma), hex(n)))
        for i in range(len(ranges)):
            self.ranges_[i].cpu_start.v, self.ranges_[i].dma_start.v, self.ranges_[i].size = ranges[i]
        self.c.ranges = self.ranges_
        self.c.nr_ranges = len(ranges)

    def refresh_peers(self):
        """Learn how this device reaches each BAR of its memory; PhysMemory calls it when one is added."""
        cdef dma_p2p *table
        cdef void **old
        cdef uint32_t i
        peers = [] if self.memory is None else sorted(self.memory.peers, key=lambda bar: int(bar.phys()))
        if not peers:
            return
        kinds = [DMA_P2P_NOT_SUPPORTED if self.pci is None else self.pci.reach(bar.function) for bar in peers]
        old = <void **>realloc(self.old_p2p, (self.nold + 1) * sizeof(void *))
        if old == NULL:
            raise MemoryError("no memory for the peers")
        self.old_p2p = old
        table = <dma_p2p *>calloc(1, sizeof(dma_p2p) + <size_t>len(peers) * sizeof(dma_p2p_range))
        if table == NULL:
            raise MemoryError("no memory for the peers")
        table.nr = len(peers)
        for i in range(table.nr):
            bar = peers[i]
            table.ranges[i].start.v, table.ranges[i].size = int(bar.phys()), bar.size
            table.ranges[i].bus_offset = bar.bus_offset
            table.ranges[i].type = kinds[i]
        old[self.nold] = <void *>self.c.p2p  # a driver may be reading it
        self.nold += 1
        self.c.p2p = table

    def __dealloc__(self):
        cdef size_t i
        free(self.ranges_)
        free(<void *>self.c.p2p)
        for i in range(self.nold):
            free(self.old_p2p[i])
        free(self.old_p2p)

    # whether what is mapped must be given back before the collector clears Python objects: their code runs at an unmap
    cdef bint unmap_early(self) noexcept:
        return self.tap is not None or not self.backend.native

    def __repr__(self):
        return f"Device({self.backend.name}{'' if self.iommu is None else ', ' + repr(self.iommu)})"

    @property
    def dma_mask(self):
        """Greatest address the device can name (inclusive)."""
        return self.config_["dma_mask"]

    @property
    def bus_dma_limit(self):
        """Greatest address its bus can name; 0: no limit."""
        return self.config_["bus_dma_limit"]

    @property
    def coherent(self):
        """Whether CPU caches see its DMA."""
        return self.config_["coherent"]

    @property
    def untrusted(self):
        """Whether it may see nothing but the bytes it was given."""
        return self.config_["untrusted"]

    @property
    def max_segments(self):
        """Segments in a request."""
        return self.c.limits.max_segments

    @property
    def max_segment_size(self):
        """Bytes in a segment, or None: no limit of its own."""
        return self.config_["max_segment_size"]

    @property
    def sg_max_segment_size(self):
        """Bytes in a segment that map_sg makes (dma_get_max_seg_size)."""
        return self.c.sg_max_segment_size

    @property
    def seg_boundary_mask(self):
        """Mask whose multiples a segment must not cross."""
        return self.config_["seg_boundary_mask"]

    @property
    def virt_boundary(self):
        """Mask of bits where segments must meet; 0: gaps are fine."""
        return self.config_["virt_boundary"]

    @property
    def dma_alignment(self):
        """Mask of address and length bits that must be 0."""
        return self.config_["dma_alignment"]

    @property
    def min_align_mask(self):
        """Address bits that a bounce buffer must keep."""
        return self.config_["min_align_mask"]

    def fresh(self, **changes):
        """A device of the same kind on a fresh Iommu and pool of the same kind: nothing mapped, nothing cached."""
        return Device(**{"backend": self.backend.fresh(), "iommu": None if self.iommu is None else self.iommu.copy(),
                         "memory": self.memory,
                         "swiotlb": None if self.swiotlb is None else self.swiotlb.fresh(), "pci": self.pci,
                         "xen": self.xen, "grants": None if self.grants is None else self.grants.fresh(),
                         **self.config_, **changes})

    @property
    def capsule(self):
        """Capsule "dmapath.device" with the ``struct dma_device *``, for C and Cython drivers. Keep the Device."""
        return PyCapsule_New(&self.c, DMAPATH_DEVICE_CAPSULE, NULL)

    @property
    def merge_boundary(self):
        """Granule - 1 in bytes, 0 where ranges never join (dma_get_merge_boundary)."""
        return self.c.ops.merge_boundary(&self.c)

    @property
    def need_unmap(self):
        """Whether addresses must be kept for unmap (dma_need_unmap)."""
        return self.c.ops.need_unmap(&self.c) != 0

    def narrow(self, max_segment_size):
        """Take shorter segments from now on than the hardware could (dma_set_max_seg_size); never longer ones. For back ends
        that have a limit of their own."""
        cdef uint64_t n = as_length(max_segment_size, "max_segment_size")
        self.c.limits.max_segment_size = min(self.c.limits.max_segment_size, n)
        self.c.sg_max_segment_size = min(self.c.sg_max_segment_size, n)

    def attach(self, observer):
        """Show each call on this device to an observer (dmapath.tap): DmaDebug, Tracer, Exposure, FaultInjector, or yours.
        Returns the observer."""
        cdef Tap tap = self.tap
        if tap is None:
            tap = self.tap = Tap()
            tap.put(&self.c)
        tap.add(observer, self)
        return observer

    def detach(self, observer):
        """Show it none any more. A DmaDebug reports now what is still mapped."""
        cdef Tap tap = self.tap
        if tap is None or observer not in tap.observers:
            raise StateError("it does not observe this device", argument="observer", value=observer)
        if tap.drop(observer, self):
            tap.take(&self.c)
            self.tap = None

    @property
    def observers(self):
        """Who observes this device now."""
        return [] if self.tap is None else list((<Tap>self.tap).observers)

    def counters(self):
        """Exact counts since the device was made: dict, all keys on every back end (dmapath.COUNTERS)."""
        return self.backend.counters()

    # ---- requests -------------------------------------------------------------------------------------------------

    def map(self, Mappable request not None, policy="unified", *, split=False):
        """Map a whole request.

        Returns a Mapping: iterate it for segments, use it in a ``with`` block or call ``unmap``. ``policy`` is
        "unified" (one IOVA range whenever there is an IOMMU) or "linux" (as Linux 7.3 decides). Each segment is within the
        device's limits. Linux maps what its block layer has split; so "linux" refuses a request that ``Bio.split`` would
        cut. With ``split=True`` the caller answers for that: it gets what Linux would give, and no limit is looked at.
        Raises a DmaError with the rule that refused; nothing is mapped then.
        """
        cdef Mapping m = self.map_start(request, policy, split=split)
        m.read_all()  # some layouts map as they are read: what fails must fail here
        return m

    def map_start(self, Mappable request not None, policy="unified", *, split=False):
        """The C driver's flow in Python: start here, take segments with ``Mapping.next``, end with ``Mapping.unmap``.

        As ``map``, but without an IOVA range for all of it each segment is mapped when ``next`` (or iteration) asks for it,
        and may fail there; the mapping is undone then. What depends on segments that were not asked for yet cannot be known:
        ``segments``, ``len``, ``case`` and the like raise StateError until the last was, and map nothing.
        """
        cdef Mapping m = Mapping.__new__(Mapping)
        cdef dma_policy p
        cdef int rc
        if policy == "unified":
            p = DMA_POLICY_UNIFIED
        elif policy == "linux":
            p = DMA_POLICY_LINUX_SPLIT if split else DMA_POLICY_LINUX
        else:
            raise DmaValueError("unified or linux", argument="policy", value=policy)
        if split and p == DMA_POLICY_UNIFIED:
            raise DmaValueError("with policy linux alone: unified always keeps the limits", argument="split", value=split)
        with nogil:
            rc = map_start(&self.c, &request.rq, p, &m.st, &m.it)
        m.device, m.request, m.policy = self, request, p
        if rc:
            raise rules.refusal(self, request, -rc, m.st.rules)
        m.live = True
        m.layout_ = m.st.layout
        m.maps = not m.st.sg and (m.layout_ == DMA_LAYOUT_DIRECT or m.layout_ == DMA_LAYOUT_PER_RANGE)
        m.segments_ = []
        return m

    def explain(self, Mappable request not None, policy="unified", *, split=False):
        """What ``map`` would do with the request and why, without mapping it: an Explanation.

        Answered on a fresh IOVA space, so the same question has the same answer.
        """
        from dmapath.explain import explain

        return explain(self, request, policy, split=split)

    # the exception for a negative return code: the back end's own words, where it has some
    def _failed(self, rc, words, argument, value):
        return error_for(-rc, self.backend.why(-rc) or words, argument, value)

    # ---- the two steps --------------------------------------------------------------------------------------------

    cdef IovaState _own(self, state):
        if not isinstance(state, IovaState):
            raise AddressTypeError("an IovaState is wanted", argument="state", value=state)
        if (<IovaState>state).device is not self:
            raise StateError("the state is another device's", argument="state", value=state)
        if not (<IovaState>state).live:
            raise StateError("the state was freed", argument="state", value=state)
        return state

    def iova_try_alloc(self, phys, size):
        """Reserve IOVA for ``size`` bytes that begin like ``phys`` inside a granule (dma_iova_try_alloc).

        Returns an IovaState, or None when refused: no IOMMU, size 0 or beyond 63 bits, or no space. No page table is
        touched.
        """
        cdef IovaState st = IovaState.__new__(IovaState)
        cdef uint64_t p = as_phys(phys), n = as_length(size, least=0, last=2**64 - 1)
        with nogil:
            st.live = dma_iova_try_alloc(&self.c, &st.c, phys_addr(p), n) != 0
        st.device = self
        return st if st.live else None

    def iova_link(self, state, phys, offset, size, dir="bidirectional", attrs=0):
        """Map ``size`` bytes at ``phys`` at byte ``offset`` of the state (dma_iova_link).

        Only the first range may start, and only the last may end, inside a granule: EIO, ENXIO or EINVAL otherwise.
        Also EADDRINUSE (linked already), ERANGE (outside the state), ENOMEM, EPERM, EOPNOTSUPP.
        """
        cdef IovaState st = self._own(state)
        cdef uint64_t p = as_phys(phys), at = as_length(offset, "offset", least=0), n = as_length(size, least=0)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef int rc
        with nogil:
            rc = dma_iova_link(&self.c, &st.c, phys_addr(p), at, n, d, a)
        if rc:
            raise rules.link_refusal(self, -rc, phys=p, offset=at, size=n, state_size=st.size)

    def iova_sync(self, state, offset, size):
        """Make what was linked in [offset, offset + size) visible to the device (dma_iova_sync)."""
        cdef IovaState st = self._own(state)
        cdef uint64_t at = as_length(offset, "offset", least=0), n = as_length(size)
        cdef int rc
        self._inside(st, at, n)
        with nogil:
            rc = dma_iova_sync(&self.c, &st.c, at, n)
        if rc:
            raise self._failed(rc, "the back end could not sync (dma_iova_sync)", "state", st)

    cdef _inside(self, IovaState st, uint64_t offset, uint64_t size):
        if size > dma_iova_size(&st.c) or offset > dma_iova_size(&st.c) - size:
            raise error_for(34, f"offset + size within the state's {st.size} bytes", "size", size)

    def iova_unlink(self, state, offset, size, dir="bidirectional", attrs=0):
        """Unmap [offset, offset + size) and flush it at once, in lazy mode too (dma_iova_unlink). ENOENT: a hole."""
        cdef IovaState st = self._own(state)
        cdef uint64_t at = as_length(offset, "offset", least=0), n = as_length(size)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef int rc
        with nogil:
            rc = dma_iova_unlink(&self.c, &st.c, at, n, d, a)
        if rc:
            raise self._failed(rc, "not all of the range was linked (dma_iova_unlink)" if rc == -2 else
                               f"offset + size within the state's {st.size} bytes", "size", n)

    def iova_free(self, state):
        """Give the IOVA back (dma_iova_free). Everything must have been unlinked."""
        cdef IovaState st = self._own(state)
        cdef int rc
        st.live = False
        with nogil:
            rc = dma_iova_free(&self.c, &st.c)
        if rc:
            raise self._failed(rc, "the back end could not free (dma_iova_free)", "state", st)

    def iova_destroy(self, state, mapped, dir="bidirectional", attrs=0):
        """Unlink the first ``mapped`` bytes (0: none were linked) and free the state (dma_iova_destroy)."""
        cdef IovaState st = self._own(state)
        cdef uint64_t n = as_length(mapped, "mapped", least=0)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef int rc
        if n:
            self._inside(st, 0, n)
        st.live = False
        with nogil:
            rc = dma_iova_destroy(&self.c, &st.c, n, d, a)
        if rc:
            raise self._failed(rc, "not all of the first `mapped` bytes were linked (dma_iova_destroy)", "mapped", n)

    # ---- the classic calls ----------------------------------------------------------------------------------------

    def map_phys(self, phys, size, dir="bidirectional", attrs=0):
        """Map one range by itself; its DmaAddr (dma_map_phys). Raises MappingError where Linux gives all ones."""
        cdef uint64_t p = as_phys(phys), n = as_length(size)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef dma_addr_t out
        cdef int rc
        if p + n - 1 < p:
            raise DmaValueError("phys + size passes 2**64", argument="size", value=size)
        with nogil:
            rc = self.c.ops.map_phys(&self.c, phys_addr(p), n, d, a, &out)
        if rc:
            raise MappingError(rules.map_refusal(self, -rc, p, n, a), argument="phys", value=p)
        return DmaAddr(out.v)

    def unmap_phys(self, addr, size, dir="bidirectional", attrs=0):
        """Undo map_phys (dma_unmap_phys): at once in strict mode, queued in lazy mode. ENOENT: nothing is there."""
        cdef uint64_t at = as_dma(addr), n = as_length(size)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef int rc
        with nogil:
            rc = self.c.ops.unmap_phys(&self.c, dma_addr(at), n, d, a)
        if rc:
            raise self._failed(rc, "not mapped (dma_unmap_phys)", "addr", at)

    def map_sg(self, Mappable request not None, dir=None, attrs=0):
        """Map a list with partial coalescing (dma_map_sgtable): list of Segments, no longer than the list.

        ``dir`` defaults to the request's. Segments join under max_segment_size and seg_boundary_mask.
        """
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = request.rq.dir if dir is None else dir_of(dir)
        cdef dma_seg *out = <dma_seg *>calloc(request.nr + 1, sizeof(dma_seg))
        cdef int rc, i
        if out == NULL:
            raise MemoryError("no memory for the segments")
        try:
            with nogil:
                rc = self.c.ops.map_sg(&self.c, request.vecs_, request.nr, d, a, out)
            if rc < 0:
                raise rules.refusal(self, request, -rc, 0)
            mapped = SgList([new_segment(&self.c, &out[i]) for i in range(rc)])
            mapped.dir = DIRECTIONS[<int>d]
            return mapped
        finally:
            free(out)

    def unmap_sg(self, segments, dir=None, attrs=0):
        """Undo map_sg, with the very list it gave (dma_unmap_sg); ``dir`` defaults to the list's."""
        dir = getattr(segments, "dir", "bidirectional") if dir is None else dir
        segments = list(segments)
        cdef unsigned long a = attr_bits(attrs)
        cdef dma_data_direction d = dir_of(dir)
        cdef dma_seg *list_ = <dma_seg *>calloc(len(segments) + 1, sizeof(dma_seg))
        cdef uint32_t i, n = len(segments)
        cdef int rc
        if list_ == NULL:
            raise MemoryError("no memory for the segments")
        try:
            for i in range(n):
                if not isinstance(segments[i], Segment):
                    raise AddressTypeError("a Segment is wanted", argument=f"segments[{i}]", value=segments[i])
                list_[i].addr.v, list_[i].len = (<Segment>segments[i]).addr_, (<Segment>segments[i]).length
            with nogil:
                rc = self.c.ops.unmap_sg(&self.c, list_, n, d, a)
        finally:
            free(list_)
        if rc:
            raise self._failed(rc, "not mapped (dma_unmap_sg)", "segments", segments)

    def alloc_coherent(self, size):
        """Memory for rings and descriptors that the CPU and the device see alike without syncs (dma_alloc_coherent).

        Returns a CoherentBuffer of whole pages, zeroed: a buffer to the CPU, an ``addr`` for the device. Raises
        MappingError where none can be had; StateError without a memory.
        """
        cdef CoherentBuffer out = CoherentBuffer.__new__(CoherentBuffer)
        if self.memory is None:
            raise StateError("a device with a memory is wanted", argument="self", value=self)
        out.make(self, (as_length(size, last=1 << 52) + 4095) & ~4095)
        return out

    def map_resource(self, phys, size, dir="bidirectional", attrs=0):
        """Map a device's registers: map_phys with the attribute MMIO (dma_map_resource). Never bounced, never cached."""
        return self.map_phys(phys, size, dir, attr_bits(attrs) | DMA_ATTR_MMIO)

    def unmap_resource(self, addr, size, dir="bidirectional", attrs=0):
        """Undo map_resource (dma_unmap_resource)."""
        self.unmap_phys(addr, size, dir, attr_bits(attrs) | DMA_ATTR_MMIO)

    def sync_sg_for_cpu(self, segments, dir=None):
        """Hand a mapped list to the CPU (dma_sync_sg_for_cpu): the very list that map_sg gave, whose direction is the
        default."""
        self._sync_list("sync_sg_for_cpu", segments, dir)

    def sync_sg_for_device(self, segments, dir=None):
        """Hand a mapped list to the device (dma_sync_sg_for_device)."""
        self._sync_list("sync_sg_for_device", segments, dir)

    def _sync_list(self, op, segments, dir):
        pairs = [(int(s.addr), s.length) for s in segments]
        cdef dma_data_direction d = dir_of(getattr(segments, "dir", "bidirectional") if dir is None else dir)
        cdef const dma_ops *ops = self.c.ops
        if self.tap is not None:
            self.tap.show(op, segments=pairs, dir=DIRECTIONS[<int>d])
            ops = (<Tap>self.tap).inner
        for at, n in pairs:
            if op == "sync_sg_for_cpu":
                ops.sync_for_cpu(&self.c, dma_addr(at), n, d)
            else:
                ops.sync_for_device(&self.c, dma_addr(at), n, d)

    @property
    def max_mapping_size(self):
        """Greatest size in bytes of one mapping: no limit (2**64 - 1) unless the device bounces (dma_max_mapping_size)."""
        if self.swiotlb is None or not (self.untrusted or (self.backend.name != "iommu" and self._bounces())):
            return 2**64 - 1
        return self.swiotlb.max_mapping_size(self.min_align_mask)

    def _bounces(self):
        return (self.swiotlb.force or self.swiotlb.restricted or self.xen is not None
                or min(self.dma_mask, self.bus_dma_limit or 2**64 - 1) < 2**64 - 1)

    @property
    def opt_mapping_size(self):
        """Greatest size in bytes of a mapping that is fast: 128 KiB behind an IOMMU, whose IOVA caches hold no more
        (dma_opt_mapping_size)."""
        return min(self.max_mapping_size, 128 << 10 if self.backend.name == "iommu" else 2**64 - 1)

    def sync_for_cpu(self, addr, size, dir="bidirectional"):
        """Hand [addr, addr + size) of a live mapping to the CPU (dma_sync_single_for_cpu)."""
        cdef uint64_t at = as_dma(addr), n = as_length(size)
        self.c.ops.sync_for_cpu(&self.c, dma_addr(at), n, dir_of(dir))

    def sync_for_device(self, addr, size, dir="bidirectional"):
        """Hand [addr, addr + size) of a live mapping to the device (dma_sync_single_for_device)."""
        cdef uint64_t at = as_dma(addr), n = as_length(size)
        self.c.ops.sync_for_device(&self.c, dma_addr(at), n, dir_of(dir))


@cython.no_gc_clear  # __dealloc__ unmaps through the device
cdef class CoherentBuffer:
    """Coherent memory, from ``Device.alloc_coherent``: supports the buffer protocol; ``free`` it once, or use a ``with``
    block. Views of it must be released before."""

    def __init__(self):
        raise TypeError("made by Device.alloc_coherent")

    cdef make(self, Device device, size_t size):
        cdef swiotlb_want want
        cdef uint64_t at = 0
        cdef PhysMemory memory = device.memory
        cdef int rc
        limit = min(device.dma_mask, device.bus_dma_limit or device.dma_mask) if device.iommu is None else 2**64 - 1
        self.device, self.size = device, size
        if device.swiotlb is not None and device.swiotlb.restricted and device.backend.name == "direct":
            want.min_align_mask, want.alloc_align_mask, want.boundary_mask = 0, 4095, UINT64_MAX
            if swiotlb_map(device.c.swiotlb, &want, 1ULL << 60, size, &at):  # a buffer of nobody's: nothing is copied
                raise MappingError("the restricted pool has no room", argument="size", value=size)
            self.pooled = True
        else:
            try:
                self.ram = mmap.mmap(-1, size)  # as long as this object: views and devices' tables lie in it
            except OSError:
                raise MappingError("this process cannot have so much memory", argument="size", value=size) from None
            at = memory.free_run(size, limit if device.xen is None else 2**64 - 1)
            self.frames = HostBuffer(self.ram, memory, layout="contiguous", phys=at, uncached=not device.coherent)
            if device.xen is not None:
                device.xen.back_in_order(at, size, limit)
        self.phys_ = at
        self.host = <char *>phys_mem_host(memory.mem, at)
        memset(self.host, 0, size)
        rc = device.backend.map_coherent(&device.c, at, size, &self.addr_)
        if rc:
            self.release()
            raise MappingError(rules.map_refusal(device, -rc, at, size, 0), argument="size", value=size)
        self.live = True
        self.tell("alloc_coherent")

    cdef tell(self, op):
        if self.device.tap is not None:
            self.device.tap.show(op, addr=self.addr_.v, phys=self.phys_, size=self.size)

    cdef release(self):
        if self.pooled:
            swiotlb_unmap(self.device.c.swiotlb, self.phys_, False)
            return
        if self.device.xen is not None:
            self.device.xen.forget(self.phys_, self.size)
        self.frames.close()

    @property
    def addr(self):
        """DmaAddr for the device."""
        return DmaAddr(self.addr_.v)

    @property
    def phys(self):
        """PhysAddr of its first byte."""
        return PhysAddr(self.phys_)

    def __len__(self):
        return self.size

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("freed already", argument="self", value=self)
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.must_live()
        PyBuffer_FillInfo(view, self, self.host, self.size, 0, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1

    def free(self):
        """Unmap it and give the memory back (dma_free_coherent). StateError when done already or still viewed."""
        self.must_live()
        if self.views:
            raise StateError("a view of it is held", argument="self", value=self)
        self.tell("free_coherent")
        self.let_go()

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

    cdef void let_go(self) noexcept:
        self.live = False
        self.device.backend.unmap_coherent(&self.device.c, self.addr_, self.size)
        self.release()

    def __repr__(self):
        return f"CoherentBuffer({self.size} bytes at {self.addr_.v:#x}{'' if self.live else ', freed'})"


@cython.no_gc_clear  # __dealloc__ unmaps through the device
cdef class Mapping:
    """A mapped request, from ``Device.map``: iterate it for Segments; ``unmap`` it once, or use a ``with`` block."""

    def __init__(self):
        raise TypeError("made by Device.map")

    # the next segment from the iterator; where `maps`, that maps it
    cdef Segment step(self):
        cdef dma_seg s
        cdef Segment out
        cdef int rc
        if self.ended:
            return None
        rc = map_next(&self.device.c, &self.st, &self.it, &s)
        self.layout_ = self.st.layout
        if rc > 0:
            out = new_segment(&self.device.c, &s)
            self.segments_.append(out)
            return out
        if rc < 0:
            bits = self.st.rules
            self.end()
            raise rules.refusal(self.device, self.request, -rc, bits)
        self.ended = True
        return None

    # take back what is mapped, and remember what was
    cdef int end(self) noexcept:
        cdef int rc
        self.kept = self.state_bytes()
        self.live = False
        with nogil:
            rc = unmap(&self.device.c, &self.st)
        return rc

    cdef size_t state_bytes(self) noexcept:
        return (sizeof(dma_seg) * self.st.nr_saved if self.st.saved != NULL
                else sizeof(dma_iova_state) if self.st.iova.size else 0)

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("unmapped already", argument="self", value=self)
        return 0

    # whether there are no more segments to come than those that were read
    cdef bint is_whole(self) noexcept:
        return self.ended or self.maps and not self.live

    # whether a segment that is not read yet may still bounce
    cdef bint may_bounce(self) noexcept:
        return (self.maps and self.layout_ != DMA_LAYOUT_BOUNCED and self.device.c.swiotlb != NULL
                and not self.is_whole())

    # all segments; reading them maps nothing here
    cdef list whole(self):
        if not self.is_whole():
            if self.maps or not self.live:
                raise _UnreadError("its segments are not read yet: next() maps each" if self.live else
                                   "unmapped before its segments were read", argument="self", value=self)
            self.read_all()
        return self.segments_

    cdef list read_all(self):
        while self.step() is not None:
            pass
        return self.segments_

    def next(self):
        """The next segment, or None after the last. StateError once it is unmapped."""
        self.must_live()
        if self.at < len(self.segments_):
            self.at += 1
            return self.segments_[self.at - 1]
        segment = self.step()
        self.at += segment is not None
        return segment

    @property
    def segments(self):
        """What to give the hardware, in order: list of Segment. Once it is unmapped: what it was given."""
        return list(self.whole())

    def __iter__(self):
        cdef _Segments out = _Segments.__new__(_Segments)
        self.must_live()
        out.mapping = self
        return out

    def __len__(self):
        return len(self.whole())

    @property
    def layout(self):
        """"direct", "linear", "gapped", "per-range" or "bounced" ("none": nothing to map)."""
        if self.may_bounce():
            self.whole()
        return rules.LAYOUTS[self.layout_]

    @property
    def case(self):
        """Which of the six cases of docs/concepts.md this is."""
        layout = self.layout
        return rules.case_of(layout, self.st.rules, len(self.whole()) if layout == "bounced" else 0)

    @property
    def rules(self):
        """Names of the rules that decided, as in dmapath.rules."""
        if self.may_bounce() or not self.maps:
            self.whole()  # where one range is cut is a rule too
        return rules.names_of(self.st.rules)

    @property
    def unmap_state_bytes(self):
        """Bytes of DMA addresses and lengths that must be kept until unmap."""
        if self.maps and (self.may_bounce() or self.st.saved != NULL):
            self.whole()
        return self.state_bytes() if self.live else self.kept

    def unmap(self):
        """Unmap what was mapped; segments that were not read yet are not mapped for it. StateError when done already."""
        cdef int rc
        self.must_live()
        rc = self.end()
        if rc:
            raise self.device._failed(rc, "part of it was not mapped any more (dma_iova_destroy)", "self", self)

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        if self.live and error is None:
            self.unmap()
        elif self.live:
            at_end(error, self.unmap)

    def __dealloc__(self):
        if self.live:
            unmap(&self.device.c, &self.st)

    def __del__(self):
        if not self.live:
            return
        if self.device.unmap_early():
            self.end()
        if warnings is not None:  # the interpreter is not at its end
            warnings.warn(f"a mapping of {self.request!r} was dropped without unmap", ResourceWarning, stacklevel=2)

    # what is mapped now
    cdef list mapped(self):
        self.must_live()
        return self.segments_ if self.maps else self.whole()

    def sync_for_cpu(self):
        """Hand all that is mapped of it to the CPU while it stays mapped (dma_sync_single_for_cpu, segment by segment)."""
        for s in self.mapped():
            self.device.sync_for_cpu(s.addr, s.length, self.request.dir)

    def sync_for_device(self):
        """Hand all that is mapped of it back to the device (dma_sync_single_for_device)."""
        for s in self.mapped():
            self.device.sync_for_device(s.addr, s.length, self.request.dir)

    def __repr__(self):
        words = f"{len(self.segments_)} segments so far" if self.may_bounce() else rules.LAYOUTS[self.layout_]
        return f"<Mapping of {self.request!r}: {words}{'' if self.live else ', unmapped'}>"


@cython.freelist(8)
@cython.final
cdef class _Segments:
    """What ``iter(mapping)`` gives: the segments from the first on. Those not read yet come from Mapping.next's source."""

    cdef Mapping mapping
    cdef Py_ssize_t at

    def __init__(self):
        raise TypeError("made by iter(mapping)")

    def __iter__(self):
        return self

    def __next__(self):
        cdef Mapping m = self.mapping
        if m is None:
            raise StopIteration
        m.must_live()
        if self.at == len(m.segments_) and m.step() is None:
            raise StopIteration
        self.at += 1
        return m.segments_[self.at - 1]
