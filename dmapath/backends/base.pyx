# cython: language_level=3
"""What a backend is to a Device: an ops table, and counters to read."""
cimport cython
from cpython.pycapsule cimport PyCapsule_GetContext, PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdint cimport uint64_t

from dmapath.abi cimport (
    DMA_ATTR_SKIP_CPU_SYNC, DMA_BIDIRECTIONAL, DMAPATH_ABI, DMAPATH_BUS_CAPSULE, DMAPATH_OPS_CAPSULE, dma_addr_t,
    dma_bus_ops, dma_device, dma_ops, dma_ops_init, phys_addr,
)

from dmapath.errors import AddressTypeError, DmaValueError

#: Keys of ``Device.counters()`` that every backend gives; what a backend has no notion of stays 0.
COUNTERS = (
    "iova_allocs", "iova_frees", "iova_live", "iova_live_bytes", "links", "syncs", "unlinks", "maps", "unmaps",
    "sg_maps", "sg_unmaps", "ptes_4k", "ptes_2m", "ptes_1g", "ptes_4k_live", "ptes_2m_live", "ptes_1g_live",
    "mapped_bytes", "invalidations", "invalidations_ranged", "invalidations_full", "sync_flushes",
    "cache_clean_bytes", "cache_inval_bytes", "barriers", "faults", "queued", "bounces",
    "bounces_live", "bounced_bytes",
)
#: Those of them that say what stands now, and so are 0 again when everything was unmapped and flushed.
LIVE_COUNTERS = ("iova_live", "iova_live_bytes", "ptes_4k_live", "ptes_2m_live", "ptes_1g_live", "mapped_bytes",
                 "queued", "bounces_live")


cdef class Backend:
    """One device's back end."""

    name = "none"

    #: Whether ``fresh`` gives one.
    can_be_fresh = False

    cdef int attach(self, dma_device *dev) except -1:
        raise NotImplementedError

    cdef int map_coherent(self, dma_device *dev, uint64_t phys, uint64_t size, dma_addr_t *out) noexcept:
        # memory that the CPU does not cache: nothing to sync, nothing to bounce
        return dev.ops.map_phys(dev, phys_addr(phys), size, DMA_BIDIRECTIONAL, DMA_ATTR_SKIP_CPU_SYNC, out)

    cdef void unmap_coherent(self, dma_device *dev, dma_addr_t addr, uint64_t size) noexcept:
        dev.ops.unmap_phys(dev, addr, size, DMA_BIDIRECTIONAL, DMA_ATTR_SKIP_CPU_SYNC)

    def why(self, errno):
        """Why the last call failed with this errno, where the back end knows better than ``dmapath.rules``; else None."""
        return None

    def fresh(self):
        """What to give a new Device as its ``backend`` for the same kind of back end with nothing mapped; None: no such."""
        return None

    def counters(self):
        """Exact counts since the device was made, by the names in COUNTERS."""
        return dict.fromkeys(COUNTERS, 0)


def carries_ops(owner):
    """Whether an object is, or has as ``dma_ops``, a capsule with an ops table."""
    return PyCapsule_IsValid(getattr(owner, "dma_ops", owner), DMAPATH_OPS_CAPSULE) != 0


@cython.no_gc_clear  # mappings are given back through it
cdef class CapsuleBackend(Backend):
    """A backend from elsewhere: a capsule "dmapath.ops.v1" that holds a ``struct dma_ops *``.

    The capsule's context becomes ``dma_device.priv``. An attribute ``dma_bus``, a capsule "dmapath.bus.v1" with a ``struct
    dma_bus_ops *``, lets simulated devices reach memory. The owner is kept alive as long as the device.
    """

    def __cinit__(self, owner):
        self.owner = owner
        self.capsule = getattr(owner, "dma_ops", owner)
        if not PyCapsule_IsValid(self.capsule, DMAPATH_OPS_CAPSULE):
            raise AddressTypeError('an object with a "dmapath.ops.v1" capsule in its attribute dma_ops is wanted',
                                   argument="backend", value=owner)
        cdef const dma_ops *src = <const dma_ops *>PyCapsule_GetPointer(self.capsule, DMAPATH_OPS_CAPSULE)
        if dma_ops_init(&self.ops, src):
            raise DmaValueError(f"its ops table is of ABI {src.abi} (wanted: {DMAPATH_ABI}) or lacks a required member",
                                argument="backend", value=owner)

    @property
    def name(self):
        return self.ops.name.decode()

    @property
    def can_be_fresh(self):
        return hasattr(self.owner, "fresh")

    cdef int attach(self, dma_device *dev) except -1:
        dev.ops = &self.ops
        dev.priv = PyCapsule_GetContext(self.capsule)
        bus = getattr(self.owner, "dma_bus", None)
        if bus is not None:
            dev.bus = <const dma_bus_ops *>PyCapsule_GetPointer(bus, DMAPATH_BUS_CAPSULE)
        return 0

    def why(self, errno):
        """The owner's own ``why(errno)``."""
        own = getattr(self.owner, "why", None)
        return None if own is None else own(errno)

    def fresh(self):
        """The owner's own ``fresh()``."""
        own = getattr(self.owner, "fresh", None)
        return None if own is None else own()

    def counters(self):
        """The owner's own ``counters()``, over zeros for what it does not count."""
        own = getattr(self.owner, "counters", None)
        return {**dict.fromkeys(COUNTERS, 0), **(own() if own is not None else {})}
