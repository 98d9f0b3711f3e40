# cython: language_level=3
"""A back end written in Python: slow, for experiments and for tests of drivers.

The object needs ``map_phys`` and ``unmap_phys``; what else it has, of the names below, is used. A method refuses by raising
a DmaError, whose errno the caller sees. Addresses and sizes are plain integers (bytes), ``dir`` is a name.

====================  =========================================================================================
``attach``            (device): called once, with the Device
``map_phys``          (phys, size, dir, attrs) -> DMA address
``unmap_phys``        (addr, size, dir, attrs)
``iova_try_alloc``    (phys, size) -> DMA address of byte 0 of a reserved range, or None
``iova_link``         (state, phys, offset, size, dir, attrs); ``state`` is (address, size)
``iova_sync``         (state, offset, size)
``iova_unlink``       (state, offset, size, dir, attrs)
``iova_free``         (state)
``sync_for_cpu``      (addr, size, dir), and ``sync_for_device``
``merge_boundary``    attribute: granule - 1, or 0
``need_unmap``        attribute: whether addresses must be kept
``is_bounced``        (addr) -> bool
``map_coherent``      (phys, size) -> DMA address at which the device shares the memory with the CPU; default: map_phys
``read``, ``write``   (addr, n) -> bytes, (addr, data): a device's access; DmaFault where it is refused
``counters``          () -> dict, shown by Device.counters()
====================  =========================================================================================
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EIO
from libc.stdint cimport UINT64_MAX, uint64_t
from libc.string cimport memcpy, memset

from dmapath._callbacks cimport enter, leave, show
from dmapath.abi cimport (
    DMA_FAULT_NOT_PRESENT, DMAPATH_ABI, dma_addr_t, dma_bus_ops, dma_data_direction, dma_device, dma_fault,
    dma_fault_at, dma_iova_size, dma_iova_state, dma_ops, dma_ops_init, phys_addr_t,
)
from dmapath.backends.base cimport Backend

from dmapath.backends.base import COUNTERS
from dmapath.errors import AddressTypeError, DmaError, DmaFault
from dmapath.request import DIRECTIONS

_DIRS = (*DIRECTIONS, "none")


cdef object owner_of(dma_device *dev):
    return (<PythonBackend>dev.priv).owner


# -errno of what a method raised; a bug in the back end must not pass for a refusal without a word
cdef int failed(object error) noexcept:
    if isinstance(error, DmaError) and isinstance(error.errno, int) and 0 < error.errno < 4096:
        return -error.errno
    show(error)
    return -EIO


cdef tuple state_of(dma_iova_state *st):
    return st.addr.v, dma_iova_size(st)


cdef int py_map_phys(dma_device *dev, phys_addr_t phys, uint64_t size, dma_data_direction dir, unsigned long attrs,
                     dma_addr_t *out) noexcept with gil:
    enter()
    try:
        out.v = UINT64_MAX
        out.v = owner_of(dev).map_phys(phys.v, size, _DIRS[<int>dir], attrs)
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_unmap_phys(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir,
                       unsigned long attrs) noexcept with gil:
    enter()
    try:
        owner_of(dev).unmap_phys(addr.v, size, _DIRS[<int>dir], attrs)
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_try_alloc(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t size) noexcept with gil:
    enter()
    try:
        memset(st, 0, sizeof(dma_iova_state))
        addr = owner_of(dev).iova_try_alloc(phys.v, size)
        if addr is None:
            return 0
        st.addr.v, st.size = addr, size
        return 1
    except BaseException as e:
        failed(e)
        return 0
    finally:
        leave()


cdef int py_link(dma_device *dev, dma_iova_state *st, phys_addr_t phys, uint64_t offset, uint64_t size,
                 dma_data_direction dir, unsigned long attrs) noexcept with gil:
    enter()
    try:
        owner_of(dev).iova_link(state_of(st), phys.v, offset, size, _DIRS[<int>dir], attrs)
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_sync(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size) noexcept with gil:
    enter()
    try:
        owner_of(dev).iova_sync(state_of(st), offset, size)
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_unlink(dma_device *dev, dma_iova_state *st, uint64_t offset, uint64_t size, dma_data_direction dir,
                   unsigned long attrs) noexcept with gil:
    enter()
    try:
        owner_of(dev).iova_unlink(state_of(st), offset, size, _DIRS[<int>dir], attrs)
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_free(dma_device *dev, dma_iova_state *st) noexcept with gil:
    enter()
    try:
        owner_of(dev).iova_free(state_of(st))
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_sync_for_cpu(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept with gil:
    enter()
    try:
        owner_of(dev).sync_for_cpu(addr.v, size, _DIRS[<int>dir])
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef int py_sync_for_device(dma_device *dev, dma_addr_t addr, uint64_t size, dma_data_direction dir) noexcept with gil:
    enter()
    try:
        owner_of(dev).sync_for_device(addr.v, size, _DIRS[<int>dir])
        return 0
    except BaseException as e:
        return failed(e)
    finally:
        leave()


cdef uint64_t py_merge_boundary(dma_device *dev) noexcept with gil:
    enter()
    try:
        return owner_of(dev).merge_boundary
    except BaseException as e:
        show(e)
        return 0
    finally:
        leave()


cdef int py_need_unmap(dma_device *dev) noexcept with gil:
    enter()
    try:
        return bool(owner_of(dev).need_unmap)
    except BaseException as e:
        show(e)
        return 0
    finally:
        leave()


cdef int py_is_bounced(dma_device *dev, dma_addr_t addr) noexcept with gil:
    enter()
    try:
        return bool(owner_of(dev).is_bounced(addr.v))
    except BaseException as e:
        show(e)
        return 0
    finally:
        leave()


cdef int py_access(dma_device *dev, dma_addr_t addr, uint64_t n, void *buf, int write, dma_fault *fault) noexcept with gil:
    enter()
    try:
        if write:
            owner_of(dev).write(addr.v, PyBytes_FromStringAndSize(<char *>buf, n))
            return 0
        data = bytes(owner_of(dev).read(addr.v, n))
        if <uint64_t>PyBytes_GET_SIZE(data) != n:
            raise DmaFault("the back end read another number of bytes", iova=addr.v)
        memcpy(buf, PyBytes_AS_STRING(data), n)
        return 0
    except BaseException as e:
        failed(e)
        done = getattr(e, "done", 0)
        return dma_fault_at(fault, addr.v, done if isinstance(done, int) and 0 <= done <= n else 0, DMA_FAULT_NOT_PRESENT,
                            write)
    finally:
        leave()


cdef dma_bus_ops py_bus
py_bus.access = py_access


@cython.no_gc_clear  # mappings are given back through it
cdef class PythonBackend(Backend):
    """One device's back end whose ops are a Python object's methods."""

    def __cinit__(self, owner):
        cdef dma_ops mine
        if not (callable(getattr(owner, "map_phys", None)) and callable(getattr(owner, "unmap_phys", None))):
            raise AddressTypeError('an object with a "dmapath.ops.v1" capsule in its attribute dma_ops, or with methods '
                                   "map_phys and unmap_phys, is wanted", argument="backend", value=owner)
        self.owner = owner
        memset(&mine, 0, sizeof(mine))
        mine.abi, mine.size, mine.name = DMAPATH_ABI, sizeof(dma_ops), b"python"
        mine.map_phys, mine.unmap_phys = py_map_phys, py_unmap_phys
        if hasattr(owner, "iova_try_alloc"):
            mine.iova_try_alloc, mine.iova_link, mine.iova_sync = py_try_alloc, py_link, py_sync
            mine.iova_unlink, mine.iova_free = py_unlink, py_free
        if hasattr(owner, "sync_for_cpu"):
            mine.sync_for_cpu = py_sync_for_cpu
        if hasattr(owner, "sync_for_device"):
            mine.sync_for_device = py_sync_for_device
        if hasattr(owner, "merge_boundary"):
            mine.merge_boundary = py_merge_boundary
        if hasattr(owner, "need_unmap"):
            mine.need_unmap = py_need_unmap
        if hasattr(owner, "is_bounced"):
            mine.is_bounced = py_is_bounced
        dma_ops_init(&self.ops, &mine)

    @property
    def name(self):
        return getattr(self.owner, "name", type(self.owner).__name__)

    cdef int attach(self, dma_device *dev) except -1:
        dev.ops = &self.ops
        dev.priv = <void *>self
        if hasattr(self.owner, "read") and hasattr(self.owner, "write"):
            dev.bus = &py_bus
        return 0

    cdef int map_coherent(self, dma_device *dev, uint64_t phys, uint64_t size, dma_addr_t *out) noexcept:
        enter()
        try:
            if not hasattr(self.owner, "map_coherent"):
                return Backend.map_coherent(self, dev, phys, size, out)
            out.v = self.owner.map_coherent(phys, size)
            return 0
        except BaseException as e:
            return failed(e)
        finally:
            leave()

    def counters(self):
        """The owner's own ``counters()``, over zeros for what it does not count."""
        own = getattr(self.owner, "counters", None)
        return {**dict.fromkeys(COUNTERS, 0), **(own() if own is not None else {})}
