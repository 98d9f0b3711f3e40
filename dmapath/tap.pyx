# cython: language_level=3
"""A tap on a device's calls: an ops table between the driver and the back end that shows each call to observers.

A device that nobody observes has no tap, and its calls cost what they cost. An observer is any object with some of

* ``attached(device)``, ``detached(device)``
* ``before(call)``: may return an errno to refuse the call in the back end's stead
* ``after(call)``: the call with its result, ``call.rc`` (0 or more, or a negative errno)

and, as attribute ``need_unmap = True``, the wish that drivers keep and unmap every address (dma_need_unmap under
CONFIG_DMA_API_DEBUG). What an observer raises is shown by sys.unraisablehook and changes nothing. Calls of a back end to its
own table are not shown. While a device is observed its calls hold the GIL, and so take turns.
"""
import os
import sys

cimport cython
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memset

from dmapath._callbacks cimport enter, leave, show
from dmapath.abi cimport (
    DMA_FAULT_NOT_PRESENT, DMA_RQ_SG, dma_addr_t, dma_data_direction, dma_device, dma_fault, dma_fault_at, dma_iova_size,
    dma_iova_state, dma_map_iter, dma_map_state, dma_seg, phys_addr_t, phys_vec,
)

from dmapath.errors import DmaValueError
from dmapath.request import DIRECTIONS

cdef extern from *:
    """
    /* how deep this thread is inside a call that was shown: what a back end calls there is its own affair */
    static __thread int dmapath_tap_depth;
    """
    int dmapath_tap_depth

_DIRS = (*DIRECTIONS, "none")
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def caller():
    """Where the Python code stands that led here, outside this package: "file:line in function"."""
    try:
        frame = sys._getframe()
    except ValueError:
        return "C code"
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "C code" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


cdef class Call:
    """One call of a driver, one access of a device (``op`` "access"), or one segment that the wrapper hands out ("segment",
    shown ``after`` alone).

    ``op`` names it as in ``struct dma_ops``. What does not apply is None: ``phys``, ``addr``, ``size``, ``offset`` (bytes),
    ``dir`` (a name), ``attrs`` (bits), ``vecs`` [(phys, bytes)], ``segments`` [(addr, bytes)], ``state`` (addr, bytes),
    ``write`` and ``done`` (an access), ``rc`` (after it); of a segment ``mapping`` (a number that is its mapping's while
    that lives), ``index`` in it, and ``region`` (of a memory region). ``where`` is the caller's file and line.
    """

    @property
    def where(self):
        if self.where_ is None:
            self.where_ = caller()
        return self.where_

    def __repr__(self):
        names = ("phys", "addr", "size", "offset", "dir", "attrs", "vecs", "segments", "state", "write", "done", "rc")
        shown = [(n, getattr(self, n)) for n in names if getattr(self, n) is not None]
        words = [f"{n}={v:#x}" if n in ("phys", "addr") else f"{n}={v}" for n, v in shown]
        return f"Call({', '.join([self.op, *words])})"


cdef inline Tap tap_of(dma_device *dev):
    return <Tap>dev.tap


cdef Call new_call(str op, addr=None, size=None, dir=None, attrs=None):
    cdef Call call = Call.__new__(Call)
    call.op, call.addr, call.size, call.attrs = op, addr, size, attrs
    call.dir = None if dir is None else _DIRS[dir]
    return call


cdef tuple state_of(dma_iova_state *st):
    return st.addr.v, dma_iova_size(st)


cdef list vec_list(const phys_vec *v, uint32_t n):
    cdef uint32_t i
    return [(v[i].paddr.v, v[i].len) for i in range(n)]


cdef list seg_list(const dma_seg *s, uint32_t n):
    cdef uint32_t i
    return [(s[i].addr.v, s[i].len) for i in range(n)]


@cython.no_gc_clear  # a device calls through its table
cdef class Tap:
    """The table between; made and dropped by ``Device.attach`` and ``Device.detach``."""

    def __cinit__(self):
        self.observers = []

    cdef void put(self, dma_device *dev):
        self.inner, self.inner_bus = dev.ops, dev.bus
        self.ops = dev.ops[0]
        self.ops.map_phys, self.ops.unmap_phys = tap_map_phys, tap_unmap_phys
        self.ops.iova_try_alloc, self.ops.iova_link, self.ops.iova_link_vec = tap_try_alloc, tap_link, tap_link_vec
        self.ops.iova_link_gapped, self.ops.iova_sync = tap_link_gapped, tap_sync
        self.ops.iova_unlink, self.ops.iova_free = tap_unlink, tap_free
        self.ops.map_sg, self.ops.unmap_sg = tap_map_sg, tap_unmap_sg
        self.ops.sync_for_cpu, self.ops.sync_for_device = tap_sync_for_cpu, tap_sync_for_device
        self.ops.need_unmap = tap_need_unmap
        self.bus.access = tap_access
        dev.tap = <void *>self
        dev.ops = &self.ops
        if dev.bus != NULL:
            dev.bus = &self.bus

    cdef void take(self, dma_device *dev):
        dev.ops, dev.bus, dev.tap = self.inner, self.inner_bus, NULL

    def add(self, observer, device):
        """Show calls to an observer from now on."""
        self.observers.append(observer)
        self._settle()
        if hasattr(observer, "attached"):
            observer.attached(device)

    def drop(self, observer, device):
        """Show it none any more; True when nobody is left."""
        self.observers.remove(observer)
        self._settle()
        if hasattr(observer, "detached"):
            observer.detached(device)
        return not self.observers

    def _settle(self):
        self.need_unmap = any(getattr(o, "need_unmap", False) for o in self.observers)

    def show(self, op, **what):
        """Show a call that no table has (a list sync of Device's)."""
        cdef Call call = new_call(op)
        for name, value in what.items():
            setattr(call, name, value)
        if self.begin(call) == 0:
            self.finish(call, 0)

    cdef int begin(self, Call call):
        # 0: go on, inside the call from now; else the refusal, which everybody has been told of
        global dmapath_tap_depth
        cdef int refuse
        for observer in list(self.observers):
            refuse = self.ask(observer, call)
            if refuse:
                call.rc = 0 if call.op == "iova_try_alloc" else -refuse  # that one says no by 0
                for told in list(self.observers):
                    if told is not observer:
                        self.tell(told, call)
                return -refuse
        dmapath_tap_depth += 1
        return 0

    cdef int finish(self, Call call, int rc):
        global dmapath_tap_depth
        dmapath_tap_depth -= 1
        call.rc = rc
        for observer in list(self.observers):
            self.tell(observer, call)
        return rc

    # the errno by which an observer refuses a call, or 0
    cdef int ask(self, observer, Call call) noexcept:
        enter()
        try:
            refuse = observer.before(call) if hasattr(observer, "before") else None
            if refuse and not (isinstance(refuse, int) and 0 < abs(refuse) < 4096):
                raise DmaValueError("an errno", argument="before", value=refuse)
            return abs(refuse) if refuse else 0
        except BaseException as e:
            show(e)
            return 0
        finally:
            leave()

    cdef void tell(self, observer, Call call) noexcept:
        enter()
        try:
            if hasattr(observer, "after"):
                observer.after(call)
        except BaseException as e:
            show(e)
        finally:
            leave()


cdef int tap_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                      dma_addr_t *out) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.map_phys(dev, phys, size, dir, attrs, out)
    out.v = UINT64_MAX
    call = new_call("map_phys", out.v, size, dir, attrs)
    call.phys = phys.v
    rc = t.begin(call)
    if rc:
        return rc
    rc = t.inner.map_phys(dev, phys, size, dir, attrs, out)
    call.addr = out.v
    return t.finish(call, rc)


cdef int tap_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                        unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.unmap_phys(dev, addr, size, dir, attrs)
    call = new_call("unmap_phys", addr.v, size, dir, attrs)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.unmap_phys(dev, addr, size, dir, attrs))


cdef int tap_try_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_try_alloc(dev, st, phys, size)
    memset(st, 0, sizeof(dma_iova_state))
    call = new_call("iova_try_alloc", None, size)
    call.phys, call.state = phys.v, state_of(st)
    if t.begin(call):
        return 0
    rc = t.inner.iova_try_alloc(dev, st, phys, size)
    call.state = state_of(st)
    return t.finish(call, rc)


cdef Call state_call(str op, dma_iova_state *st, offset=None, size=None, dir=None, attrs=None):
    cdef Call call = new_call(op, None, size, dir, attrs)
    call.state, call.offset = state_of(st), offset
    return call


cdef int tap_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                  dma_data_direction dir, unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_link(dev, st, phys, offset, size, dir, attrs)
    call = state_call("iova_link", st, offset, None, dir, attrs)
    call.vecs = [(phys.v, size)]
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_link(dev, st, phys, offset, size, dir, attrs))


cdef int tap_link_vec(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                      dma_data_direction dir, unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_link_vec(dev, st, v, n, offset, dir, attrs)
    call = state_call("iova_link_vec", st, offset, None, dir, attrs)
    call.vecs = vec_list(v, n)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_link_vec(dev, st, v, n, offset, dir, attrs))


cdef int tap_link_gapped(dma_device *dev, dma_iova_state *st, const phys_vec *v, uint32_t n, uint64_t offset,
                         dma_data_direction dir, unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_link_gapped(dev, st, v, n, offset, dir, attrs)
    call = state_call("iova_link_gapped", st, offset, None, dir, attrs)
    call.vecs = vec_list(v, n)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_link_gapped(dev, st, v, n, offset, dir, attrs))


cdef int tap_sync(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_sync(dev, st, offset, size)
    call = state_call("iova_sync", st, offset, size)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_sync(dev, st, offset, size))


cdef int tap_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                    unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_unlink(dev, st, offset, size, dir, attrs)
    call = state_call("iova_unlink", st, offset, size, dir, attrs)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_unlink(dev, st, offset, size, dir, attrs))


cdef int tap_free(dma_device *dev, dma_iova_state *st) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.iova_free(dev, st)
    call = state_call("iova_free", st)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.iova_free(dev, st))


cdef int tap_map_sg(dma_device *dev, const phys_vec *v, uint32_t n, dma_data_direction dir, unsigned long attrs,
                    dma_seg *out) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.map_sg(dev, v, n, dir, attrs, out)
    call = new_call("map_sg", None, None, dir, attrs)
    call.vecs, call.segments = vec_list(v, n), []
    rc = t.begin(call)
    if rc:
        return rc
    rc = t.inner.map_sg(dev, v, n, dir, attrs, out)
    call.segments = seg_list(out, <uint32_t>rc) if rc > 0 else []
    return t.finish(call, rc)


cdef int tap_unmap_sg(dma_device *dev, const dma_seg *s, uint32_t n, dma_data_direction dir,
                      unsigned long attrs) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.unmap_sg(dev, s, n, dir, attrs)
    call = new_call("unmap_sg", None, None, dir, attrs)
    call.segments = seg_list(s, n)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.unmap_sg(dev, s, n, dir, attrs))


cdef int tap_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.sync_for_cpu(dev, addr, size, dir)
    call = new_call("sync_for_cpu", addr.v, size, dir)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.sync_for_cpu(dev, addr, size, dir))


cdef int tap_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    cdef int rc
    if dmapath_tap_depth:
        return t.inner.sync_for_device(dev, addr, size, dir)
    call = new_call("sync_for_device", addr.v, size, dir)
    rc = t.begin(call)
    return rc if rc else t.finish(call, t.inner.sync_for_device(dev, addr, size, dir))


cdef int tap_need_unmap(dma_device *dev) noexcept with gil:
    cdef Tap t = tap_of(dev)
    return 1 if t.need_unmap else t.inner.need_unmap(dev)


cdef int tap_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write, dma_fault *fault) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call = new_call("access", addr.v, n)
    cdef int rc
    call.write = write != 0
    if t.begin(call):
        return dma_fault_at(fault, addr.v, 0, DMA_FAULT_NOT_PRESENT, write)
    rc = t.inner_bus.access(dev, addr, n, buf, write, fault)
    call.done = fault.done if rc else n
    return t.finish(call, rc)


# the wrapper hands a segment to the driver: nothing to refuse any more, so that observers are only told
cdef void tap_segment(dma_device *dev, const dma_map_state *st, dma_map_iter *it, const dma_seg *seg) noexcept with gil:
    cdef Tap t = tap_of(dev)
    cdef Call call
    if dmapath_tap_depth:
        return
    call = new_call("segment", seg.addr.v, seg.len, st.dir, st.attrs)
    call.mapping, call.index, call.region, call.rc = <size_t>st, it.shown, bool(it.rq.flags & DMA_RQ_SG), 0
    it.shown += 1
    for observer in list(t.observers):
        t.tell(observer, call)
