# cython: language_level=3
"""An RDMA host channel adapter: memory keys with translation tables in DMA memory, reliable connected queue pairs,
completions with verbs' status codes, and a wire to another one.

The device itself is C (ext/devices/rnic.c), so that a fuzzer reaches it; this module owns it. Drivers see ``mmio``.
"""
import weakref

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.stdlib cimport calloc, free

from dmapath.abi cimport DMAPATH_MMIO_CAPSULE
from dmapath.device cimport Device

from dmapath.errors import StateError


@cython.no_gc_clear  # what drives it gives its keys back through it
cdef class Rnic:
    """An HCA. ``attach`` it to a Device, ``connect`` it to another (or to itself)."""

    def __cinit__(self):
        self.c = <rnic *>calloc(1, sizeof(rnic))
        if self.c == NULL:
            raise MemoryError("no memory for the HCA")
        self.regs.priv, self.regs.read, self.regs.write = self.c, rnic_read_reg, rnic_write_reg
        self.regs.relax = rnic_work
        self.mmio = PyCapsule_New(&self.regs, DMAPATH_MMIO_CAPSULE, NULL)

    @property
    def limits(self):
        """What a Device for it is made with, by its data sheet: pages of its translation tables keep their offsets."""
        return dict(min_align_mask=4095, max_segment_size=1 << 30)

    def attach(self, Device device not None):
        """Plug it in: from now on it reaches memory as ``device``, a Device with a memory and a bus."""
        if self.device is not None:
            raise StateError("it is plugged in already", argument="self", value=self)
        self.c.dev = device.hardware()
        self.device = device

    def connect(self, Rnic other not None):
        """Lay a wire to another HCA, or to itself; both ends lose the wire they had."""
        self.disconnect()
        other.disconnect()
        self.c.peer, other.c.peer = other.c, self.c
        self.peer, other.peer = weakref.ref(other), weakref.ref(self)

    def disconnect(self):
        """Pull the wire: what is sent is not answered any more."""
        other = None if self.peer is None else self.peer()
        if other is not None:
            (<Rnic>other).c.peer = NULL
            (<Rnic>other).peer = None
        self.c.peer = NULL
        self.peer = None

    def work(self):
        """Let it work once; the requests it carried out. Drivers do the same by waiting."""
        cdef int n
        with nogil:
            n = rnic_work(self.c)
        return n

    def counters(self):
        """Requests done, bytes moved for them, bus faults met, reads of translation tables, asynchronous events (bad
        doorbells and overflows), and what lives: keys and completion queues."""
        return dict(requests=self.c.requests, bytes=self.c.bytes, faults=self.c.faults, mtt_reads=self.c.mtt_reads,
                    events=self.c.events, keys_live=self.c.keys, cqs_live=self.c.cqs)

    def __repr__(self):
        return f"Rnic({self.c.keys} keys{'' if self.peer else ', unplugged'})"

    def __dealloc__(self):
        if self.c.peer != NULL and self.c.peer.peer == self.c:
            self.c.peer.peer = NULL
        free(self.c)
