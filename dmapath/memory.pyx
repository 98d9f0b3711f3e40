# cython: language_level=3
"""Physical memory made explicit: an arena on a memfd whose pages lie where we say, and buffers of the user's in place."""
import os
import random
import struct
import threading
import weakref
from contextlib import contextmanager

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EEXIST, ERANGE, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from dmapath._core cimport (
    phys_mem_add, phys_mem_copy, phys_mem_destroy, phys_mem_dma, phys_mem_evict, phys_mem_full, phys_mem_host, phys_mem_init,
    phys_mem_read_lock, phys_mem_read_unlock, phys_mem_remove,
)
from dmapath.abi cimport (
    DMA_FAULT_BUS, DMAPATH_ABI, DMAPATH_MEMORY_CAPSULE, dma_device, dma_fault, dma_fault_at, dmapath_memory_api, phys_addr_t,
    phys_mem,
)

from dmapath.addr import PhysAddr, as_length, as_phys
from dmapath.errors import (
    DmaValueError, NoMemoryError, NotSupportedError, PermissionDeniedError, StateError, at_end, error_for,
)

cdef extern from "<unistd.h>" nogil:
    int close_fd "close"(int)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int, int, long, long)

cdef extern from "<linux/falloc.h>" nogil:
    enum:
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_KEEP_SIZE

PAGE = 4096
_LAYOUTS = ("contiguous", "scattered", "huge")
_REFUSALS = {-EEXIST: "the frame is taken", -ERANGE: "page aligned and below 2**52"}


def _runs(frames, offset, length, unit):
    """(phys, bytes) runs of physically adjacent bytes of [offset, offset + length) over frames of `unit` bytes."""
    out = []
    while length:
        index, inside = divmod(offset, unit)
        n = min(unit - inside, length)
        at = frames[index] + inside
        if out and out[-1][0] + out[-1][1] == at:
            out[-1][1] += n
        else:
            out.append([at, n])
        offset += n
        length -= n
    return [(PhysAddr(at), n) for at, n in out]


@cython.no_gc_clear  # devices and pools reach its frames until they are gone
cdef class PhysMemory:
    """A machine's physical memory: an arena on a memfd, and whatever HostBuffers are added to it.

    Parameters
    ----------
    size : int
        Bytes of the arena; rounded up to whole pages (2 MiB for layout "huge").
    layout : "contiguous", "scattered" or "huge"
        Where the arena's pages lie: side by side; 4 KiB pages in random order, no two neighbours adjacent; or 2 MiB
        pages in random order, each 2 MiB aligned.
    base : int
        Lowest physical address of the arena.
    seed : int
        Of the order; the same seed gives the same layout.
    backing : "4k" or "2m"
        Pages of this machine's that really hold the arena. 2 MiB ones come from the pool of huge pages
        (/proc/sys/vm/nr_hugepages): NoMemoryError where it has too few.
    """

    def __cinit__(self, size=1 << 24, *, layout="contiguous", base=1 << 32, seed=0, backing="4k"):
        self.fd = -1  # before anything can fail: __dealloc__ closes what is not negative
        if layout not in _LAYOUTS:
            raise DmaValueError("contiguous, scattered or huge", argument="layout", value=layout)
        if backing not in ("4k", "2m") or (backing == "2m" and layout == "scattered"):
            raise DmaValueError("4k, or 2m with pages that lie whole (layout contiguous or huge)", argument="backing",
                                value=backing)
        self.page_size = 1 << 21 if layout == "huge" else PAGE
        self.backing_page = 1 << 21 if backing == "2m" else PAGE
        cdef size_t unit = max(self.page_size, self.backing_page)
        self.size = (as_length(size) + unit - 1) & ~(unit - 1)
        self.layout = layout
        base = as_phys(base, "base")
        if base & (unit - 1) or base + 4 * <object>self.size > 1 << 51:
            raise DmaValueError(f"a multiple of {unit}, below 2**51", argument="base", value=base)
        self.mem = <phys_mem *>calloc(1, sizeof(phys_mem_full))
        if self.mem == NULL or phys_mem_init(self.mem):
            raise MemoryError("no memory for a physical memory map")
        self.fd = os.memfd_create("dmapath", os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if backing == "2m" else 0))
        os.ftruncate(self.fd, self.size)
        cdef void *at = mmap(NULL, self.size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if at == MAP_FAILED:
            raise error_for(errno, "the arena cannot be mapped" + ("" if backing == "4k" else ": too few free huge pages "
                            "(sysctl vm.nr_hugepages)"), "size", self.size)
        self.arena = <char *>at
        self.next_synthetic = max(1 << 50, base + 4 * <object>self.size)  # behind the arena, wherever that is
        self.borrowed = {}
        self.peers, self.tags, self.watchers, self.notifiers = [], [], weakref.WeakSet(), weakref.WeakSet()
        self.moving = threading.Lock()
        self._place(base, seed)

    cdef _place(self, uint64_t base, seed):
        cdef uint64_t frame, sub
        cdef size_t i, n = self.size // self.page_size, unit = self.page_size
        if self.layout == "contiguous":
            order = range(n)
        else:
            order = [2 * i for i in range(n)]  # every other frame: none touches the next
            random.Random(seed).shuffle(order)
        self.frames_ = [base + i * unit for i in order]
        self.flat = base if self.layout == "contiguous" else 0
        for i in range(n):
            frame = self.frames_[i]
            for sub in range(0, unit, 4096):
                if phys_mem_add(self.mem, frame + sub, self.arena + i * unit + sub, False):
                    raise MemoryError("no memory for a physical memory map")

    cdef int add_frame(self, uint64_t phys, void *host, bint uncached=False) noexcept:
        return phys_mem_add(self.mem, phys, host, uncached)

    # any iterable of frames; needs no memory of its own, since objects that are freed call it
    cdef void remove_frames(self, frames) noexcept:
        cdef uint64_t part[64]
        cdef uint64_t n = 0
        for frame in frames:
            part[n] = frame
            n += 1
            if n == 64:
                phys_mem_remove(self.mem, part, n)
                n = 0
        phys_mem_remove(self.mem, part, n)

    def __dealloc__(self):
        if self.arena != NULL:
            munmap(self.arena, self.size)
        if self.fd >= 0:
            close_fd(self.fd)
        if self.mem != NULL:
            phys_mem_destroy(self.mem)
            free(self.mem)

    def __repr__(self):
        return f"PhysMemory({self.size}, layout={self.layout!r})"

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.arena, self.size, 0, flags)

    @property
    def frames(self):
        """Bytes of memory in all, the arena and buffers added."""
        return (<phys_mem_full *>self.mem).frames * 4096

    def phys(self, offset):
        """PhysAddr of a byte of the arena."""
        offset = as_length(offset, "offset", least=0)
        if offset >= self.size:
            raise DmaValueError(f"inside the arena of {self.size} bytes", argument="offset", value=offset)
        return PhysAddr(self.frames_[offset // self.page_size] + offset % self.page_size)

    def vecs(self, offset=0, length=None):
        """Physically contiguous runs of arena bytes: list of (PhysAddr, bytes)."""
        offset = as_length(offset, "offset", least=0)
        length = as_length(self.size - offset if length is None else length, "length")
        if offset + length > self.size:
            raise DmaValueError(f"offset + length within {self.size} bytes", argument="length", value=length)
        return _runs(self.frames_, offset, length, self.page_size)

    def add_peer(self, bar):
        """Called by a Bar: this machine has it now, and devices learn how they reach it."""
        self.peers.append(bar)
        for device in self.watchers:
            device.refresh_peers()

    def free_run(self, size, limit):
        """Lowest of the highest free page-aligned physical addresses for ``size`` bytes that end at ``limit`` or below."""
        cdef uint64_t at, page
        cdef bint free_
        size = (size + PAGE - 1) // PAGE * PAGE
        if limit >= 1 << 51:
            self.next_synthetic += size + PAGE
            return self.next_synthetic - size
        at = max(0, limit + 1 - size) // PAGE * PAGE
        while at >= 4096:
            free_ = True
            for page in range(at, at + <uint64_t>size, 4096):
                if phys_mem_host(self.mem, page) != NULL:
                    free_ = False
                    break
            if free_:
                return at
            at -= 4096
        raise NoMemoryError("no free physical memory below the limit", argument="limit", value=limit)

    def tag(self, phys, size, kind):
        """Say what [phys, phys + size) is used for, where drivers must not map it: "stack", "vmalloc" or "text" (DmaDebug
        knows; nothing else changes)."""
        if kind not in ("stack", "vmalloc", "text"):
            raise DmaValueError("stack, vmalloc or text", argument="kind", value=kind)
        self.tags.append((as_phys(phys), as_length(size), kind))

    def kind_of(self, phys):
        """What is at a physical address: "ram", "peer", a tag's kind, or None."""
        at = as_phys(phys)
        for first, size, kind in self.tags:
            if 0 <= at - first < size:
                return kind
        if any(0 <= at - int(bar.phys()) < len(bar) for bar in self.peers):
            return "peer"
        phys_mem_read_lock(self.mem)
        there = phys_mem_host(self.mem, at) != NULL
        phys_mem_read_unlock(self.mem)
        return "ram" if there else None

    def evict(self):
        """Let the CPU's caches write back every dirty line and drop the rest, as they may at any time.

        Only devices that are not coherent can tell (their RAM and the CPU's view differ until a sync).
        """
        with nogil:
            phys_mem_evict(self.mem)

    def migrate(self, offset, length):
        """Move the arena's pages that hold [offset, offset + length) to other physical frames, as the kernel does when it
        compacts memory or a process remaps.

        Everyone who asked (``OdpRegion``) is told before, with the bytes of the pages that go, and after (mmu_notifier's
        invalidate_range_start and _end), and must not use the old frames any more: nothing is there.
        """
        cdef size_t first, last
        if self.page_size != PAGE:
            raise NotSupportedError("huge pages do not move", argument="self", value=self)
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        if offset + length > self.size:
            raise DmaValueError(f"offset + length within {self.size} bytes", argument="length", value=length)
        first, last = offset // PAGE, (offset + length + PAGE - 1) // PAGE
        with self.moving:
            with _told(self, first * PAGE, (last - first) * PAGE):
                self._move(first, _synthetic(self, last - first, "scattered", first))

    def discard(self, offset, length):
        """Give whole pages of the arena back to the machine (fallocate with FALLOC_FL_PUNCH_HOLE; for a file that is mapped,
        what MADV_REMOVE does). They read as zeros, on pages that are new.

        Who holds registrations of them (a Verbs cache) or has them mapped by index (``OdpRegion``) is told before. A device
        that still has them mapped goes on reading and writing the old pages.
        """
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        unit = self.backing_page
        if offset % unit or length % unit:
            raise DmaValueError(f"whole pages of {unit} bytes", argument="offset" if offset % unit else "length",
                                value=offset if offset % unit else length)
        if offset + length > self.size:
            raise DmaValueError(f"offset + length within {self.size} bytes", argument="length", value=length)
        cdef long at = offset, n = length
        cdef int rc = 0, code = 0
        with self.moving:
            with _told(self, offset, length):
                with nogil:
                    rc = fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, n)
                    code = errno
        if rc:
            raise error_for(code, "the pages cannot be given back (fallocate)", "length", length)

    def _move(self, size_t first, list fresh):
        cdef uint64_t frame
        cdef size_t i
        self.flat = 0
        self.remove_frames(self.frames_[first:first + len(fresh)])
        for i in range(first, first + len(fresh)):
            frame = self.frames_[i] = fresh[i - first]
            if phys_mem_add(self.mem, frame, self.arena + i * 4096, False):
                raise MemoryError("no memory for a physical memory map")

    def read(self, phys, length):
        """Bytes at a physical address, as the CPU sees them."""
        cdef uint64_t at = as_phys(phys), n = as_length(length, "length", least=0), done
        if n > self.frames:
            raise DmaValueError(f"there are {self.frames} bytes of memory in all", argument="length", value=n)
        out = bytearray(n)
        cdef unsigned char[::1] view = out
        if n:
            phys_mem_read_lock(self.mem)
            done = phys_mem_copy(self.mem, at, &view[0], n, False)
            phys_mem_read_unlock(self.mem)
            if done != n:
                raise DmaValueError("no memory there", argument="phys", value=at + done)
        return bytes(out)

    def write(self, phys, data):
        """Put bytes at a physical address, as the CPU would."""
        cdef uint64_t at = as_phys(phys), done
        cdef const unsigned char[::1] view = data
        if view.shape[0]:
            phys_mem_read_lock(self.mem)
            done = phys_mem_copy(self.mem, at, <void *>&view[0], view.shape[0], True)
            phys_mem_read_unlock(self.mem)
            if done != <uint64_t>view.shape[0]:
                raise DmaValueError("no memory there", argument="phys", value=at + done)


@contextmanager
def _told(memory, offset, length):
    """Tell everybody who asked that pages go, and when they have gone; who was told before another one failed, too."""
    told = []
    try:
        for notifier in list(memory.notifiers):
            notifier.invalidate_start(memory, offset, length)
            told.append(notifier)
        yield
    finally:
        for notifier in told:
            notifier.invalidate_end()


def _synthetic(memory, n, layout, seed):
    """n free frames: one run, or a shuffled set of which no two are neighbours."""
    cdef PhysMemory m = memory
    step = 1 if layout == "contiguous" else 2
    base = m.next_synthetic
    m.next_synthetic += (step * n + 1) * PAGE
    order = list(range(n))
    if step == 2:
        random.Random(seed).shuffle(order)
    return [base + step * i * PAGE for i in order]


def _machine_frames(address, n):
    """Frames that really hold n pages from a page-aligned address, from /proc/self/pagemap."""
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        f.seek(address // PAGE * 8)
        words = struct.unpack(f"<{n}Q", f.read(8 * n))
    frames = [w & (1 << 55) - 1 for w in words]
    if not all(w >> 63 for w in words):
        raise StateError("a page of the buffer is not in memory: touch it first", argument="layout", value="pagemap")
    if not all(frames):
        raise PermissionDeniedError("frame numbers are hidden without CAP_SYS_ADMIN", argument="layout",
                                    value="pagemap")
    return [f * PAGE for f in frames]


@cython.no_gc_clear  # close() takes the frames out of the memory
cdef class HostBuffer:
    """Any object with the buffer protocol as DMA memory, in place.

    Its pages are added to a PhysMemory until ``close()`` (or the end of a ``with`` block). While it is held, the owner
    cannot be resized (Python refuses with BufferError).

    Parameters
    ----------
    obj : buffer
        C-contiguous; its bytes are used in place.
    memory : PhysMemory
        The machine the buffer belongs to.
    layout : "scattered", "contiguous" or "pagemap"
        Synthetic frames, apart or side by side; or the machine's own (needs CAP_SYS_ADMIN).
    writable : bool
        False takes a read-only buffer too; devices then must not write to it.
    phys : int or None
        Page-aligned physical address of its first page, for layout "contiguous"; None: anywhere.
    uncached : bool
        The CPU's caches never hold it (a BAR, coherent memory).
    """

    cdef Py_buffer view
    cdef bint held
    cdef readonly PhysMemory memory
    cdef readonly str layout
    cdef tuple frames_  # those that the memory has of it; the collector empties lists
    cdef size_t offset

    def __cinit__(self, obj, PhysMemory memory not None, *, layout="scattered", seed=0, writable=True, phys=None,
                  bint uncached=False):
        if layout not in ("scattered", "contiguous", "pagemap"):
            raise DmaValueError("scattered, contiguous or pagemap", argument="layout", value=layout)
        self.memory, self.layout, self.frames_ = memory, layout, ()
        PyObject_GetBuffer(obj, &self.view, PyBUF_CONTIG if writable else PyBUF_CONTIG_RO)
        self.held = True
        if self.view.len == 0:
            raise DmaValueError("an empty buffer has no memory", argument="obj", value=obj)
        cdef size_t start = <size_t>self.view.buf
        self.offset = start & 4095
        n = (self.offset + self.view.len + PAGE - 1) // PAGE
        if phys is not None:
            frames = [as_phys(phys) + i * PAGE for i in range(n)]
        elif layout == "pagemap":
            frames = _machine_frames(start - self.offset, n)
        else:
            frames = _synthetic(memory, n, layout, seed)
        cdef uint64_t frame
        cdef int rc
        for i, frame in enumerate(frames):
            rc = phys_mem_add(memory.mem, frame, <char *>start - self.offset + <size_t>i * 4096, uncached)
            if rc:
                self.frames_ = tuple(frames[:i])
                self.close()
                raise error_for(-rc, _REFUSALS.get(rc, "no memory for the map"), "layout" if phys is None else "phys",
                                layout if phys is None else phys)
        self.frames_ = tuple(frames)

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept:
        if not self.held:
            return
        self.held = False
        self.memory.remove_frames(self.frames_)
        PyBuffer_Release(&self.view)

    # what is no longer there to be used
    def _must_live(self):
        if not self.held:
            raise StateError("the buffer was closed", argument="self", value=self)

    def __enter__(self):
        self._must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)

    def __len__(self):
        return self.view.len if self.held else 0

    def close(self):
        """Take the pages out of the memory and let go of the buffer. A device that still has them mapped faults."""
        self.let_go()

    def vecs(self, offset=0, length=None):
        """Physically contiguous runs of the buffer: list of (PhysAddr, bytes)."""
        self._must_live()
        offset = as_length(offset, "offset", least=0)
        length = as_length(self.view.len - offset if length is None else length, "length")
        if offset + length > self.view.len:
            raise DmaValueError(f"offset + length within {self.view.len} bytes", argument="length", value=length)
        return _runs(self.frames_, self.offset + offset, length, PAGE)


# a device's access by physical address, for buses of other packages' back ends
cdef int memory_access(dma_device *dev, phys_addr_t phys, uint64_t n, void *buf, int write, dma_fault *fault) noexcept nogil:
    cdef uint64_t done
    if dev.mem == NULL:
        return dma_fault_at(fault, phys.v, 0, DMA_FAULT_BUS, write)
    phys_mem_read_lock(dev.mem)
    done = phys_mem_dma(dev.mem, dev, phys.v, buf, n, write)
    phys_mem_read_unlock(dev.mem)
    return 0 if done == n else dma_fault_at(fault, phys.v, done, DMA_FAULT_BUS, write)


cdef dmapath_memory_api api_table
api_table.abi = DMAPATH_ABI
api_table.size = sizeof(dmapath_memory_api)
api_table.access = memory_access
#: Capsule with the ``struct dmapath_memory_api`` for C and Cython back ends.
api = PyCapsule_New(<void *>&api_table, DMAPATH_MEMORY_CAPSULE, NULL)
