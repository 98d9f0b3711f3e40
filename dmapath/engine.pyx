# cython: language_level=3
"""A simulated DMA engine: a device that does nothing but move bytes, through translation, by the addresses it is given."""
from libc.stdlib cimport free, malloc

from dmapath.abi cimport dma_fault, dma_seg
from dmapath.device cimport Device, Segment

from dmapath.addr import as_dma, as_length
from dmapath.errors import DmaFault, DmaValueError

_REASONS = {1: "not present", 2: "no read permission", 3: "no write permission", 4: "no memory behind the address"}


cdef class DmaEngine:
    """The device's side of a Device: reads and writes memory by DMA address.

    Every access goes through the IOMMU's IOTLB and, on a miss, its page walk; without an IOMMU addresses are physical.
    """

    cdef readonly Device device

    def __cinit__(self, Device device not None):
        device.hardware()
        self.device = device

    def read(self, segments):
        """Fetch the bytes of segments (Segments or (addr, bytes) pairs) from memory. Raises DmaFault."""
        plain, total = _plain(segments)
        out = bytearray(total)
        self._move(plain, total, out, 0)
        return bytes(out)

    def read_into(self, segments, buffer):
        """As ``read``, into a writable buffer of the same size; returns the bytes moved."""
        plain, total = _plain(segments)
        self._move(plain, total, buffer, 0)
        return total

    def write(self, segments, data):
        """Store ``data`` into memory at segments of the same total size. Raises DmaFault; bytes before it are stored."""
        plain, total = _plain(segments)
        self._move(plain, total, data, 1)
        return total

    cdef _move(self, list plain, total, buffer, int write):
        cdef const unsigned char[::1] view = buffer
        cdef dma_fault fault
        cdef dma_seg *segs
        cdef Py_ssize_t i, n = len(plain)
        cdef unsigned char *at
        cdef int rc = 0
        if view.shape[0] != total:
            raise DmaValueError(f"as long as the segments, {total} bytes", argument="data", value=view.shape[0])
        if total == 0:
            return
        if not write and memoryview(buffer).readonly:
            raise DmaValueError("a writable buffer", argument="buffer", value=buffer)
        segs = <dma_seg *>malloc(n * sizeof(dma_seg))
        if segs == NULL:
            raise MemoryError("no memory for the segments")
        for i in range(n):
            segs[i].addr.v, segs[i].len = plain[i]
        at = <unsigned char *>&view[0]
        with nogil:
            for i in range(n):
                rc = self.device.c.bus.access(&self.device.c, segs[i].addr, segs[i].len, at, write, &fault)
                if rc:
                    break
                at += segs[i].len
        free(segs)
        if rc:
            done = (at - <unsigned char *>&view[0]) + fault.done
            verb = "write" if write else "read"
            raise DmaFault(f"{verb} of {plain[i][0]:#x}+{plain[i][1]:#x} faults at {fault.addr.v:#x}: "
                           f"{_REASONS[fault.reason]}", iova=fault.addr.v, reason=_REASONS[fault.reason], done=done,
                           write=bool(write))


# the segments as (addr, bytes), and the bytes in all: of any size, so not in 64 bits
cdef tuple _plain(segments):
    cdef list out = []
    total = 0
    for s in segments:
        if isinstance(s, Segment):
            addr, n = (<Segment>s).addr_, (<Segment>s).length
        else:
            addr, n = as_dma(s[0]), as_length(s[1], "length")
        out.append((addr, n))
        total += n
    return out, total
