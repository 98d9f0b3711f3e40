# cython: language_level=3
"""An NVMe controller with one namespace, on memory or a file (NVM Express Base 2.0, NVM Command Set 1.0).

The controller itself is C (ext/devices/nvme.c), so that a fuzzer reaches it; this module owns it. Drivers see ``mmio``.
"""
import mmap
import os
from dataclasses import dataclass

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from dmapath._nvme cimport NVME_NOT_READY, NVME_PAGE
from dmapath.abi cimport DMAPATH_MMIO_CAPSULE
from dmapath.device cimport Device

from dmapath.addr import as_length
from dmapath.errors import DmaValueError, StateError
from dmapath.nvme_status import status_name


@dataclass(frozen=True)
class NvmeErrorEntry:
    """An entry of the controller's error log: which command of which queue failed with which status, and the byte and bit of
    the command that say so (65535: no field is to blame)."""

    count: int
    queue: int
    command: int
    status: int
    byte: int
    bit: int
    lba: int
    nsid: int

    @property
    def name(self):
        """The status in words."""
        return status_name(self.status)


@cython.no_gc_clear  # a driver stops it when it goes
cdef class NvmeController:
    """A controller whose blocks are in memory, in a buffer of yours, or in a file.

    Parameters
    ----------
    media : int, str, or writable buffer
        Bytes of media in memory; or the path of a file that holds the blocks; or a buffer that does.
    block_size : int
        Bytes of a block: 512 or 4096.
    metadata_size : int
        Bytes of metadata beside each block (a multiple of 4 up to 64; 0: none).
    mdts : int
        Greatest transfer, as a power of two of 4 KiB pages; 0: no limit.
    sgl : bool
        Whether it takes SGLs; without, PRP entries are all there is, and it takes no gaps.
    metadata_sgl : bool
        Whether metadata may be an SGL too.
    order : "fifo" or "random"
        In which order commands that it has fetched are carried out and completed; ``seed`` fixes a random one.
    """

    def __cinit__(self, media=64 << 20, *, int block_size=512, int metadata_size=0, int mdts=10, bint sgl=True,
                  bint metadata_sgl=True, order="fifo", seed=1):
        cdef uint8_t[::1] view
        if block_size not in (512, 4096):
            raise DmaValueError("512 or 4096", argument="block_size", value=block_size)
        if metadata_size % 4 or not 0 <= metadata_size <= 64:
            raise DmaValueError("a multiple of 4 from 0 to 64", argument="metadata_size", value=metadata_size)
        if not 0 <= mdts <= 11:
            raise DmaValueError("0 to 11: 8 MiB", argument="mdts", value=mdts)
        if order not in ("fifo", "random"):
            raise DmaValueError("fifo or random", argument="order", value=order)
        self.c = <nvme_ctrl *>calloc(1, sizeof(nvme_ctrl))
        if self.c == NULL:
            raise MemoryError("no memory for the controller")
        self.kept = _media(media, block_size)
        self.media = memoryview(self.kept).cast("B")
        view = self.media
        self.c.media, self.c.blocks = &view[0], view.shape[0] // block_size
        self.c.block_shift = block_size.bit_length() - 1
        self.metadata = memoryview(bytearray(self.c.blocks * metadata_size))
        if metadata_size:
            view = self.metadata
            self.c.meta = &view[0]
        self.block_size, self.metadata_size, self.mdts, self.sgl = block_size, metadata_size, mdts, sgl
        self.c.meta_size, self.c.mdts, self.c.sgl, self.c.metaseg = metadata_size, mdts, sgl, sgl and metadata_sgl
        self.c.random, self.c.seed = order == "random", (as_length(seed, "seed", least=0) | 1 << 40) & (2**64 - 1)
        self.regs.priv, self.regs.read, self.regs.write = self.c, nvme_read_reg, nvme_write_reg
        self.regs.relax = nvme_work
        self.mmio = PyCapsule_New(&self.regs, DMAPATH_MMIO_CAPSULE, NULL)

    @property
    def blocks(self):
        """Blocks of the namespace."""
        return self.c.blocks

    @property
    def limits(self):
        """What a Device for it is made with: the hardware's limits as its data sheet has them (nvme_set_ctrl_limits)."""
        return dict(dma_alignment=3, min_align_mask=NVME_PAGE - 1, virt_boundary=0 if self.sgl else NVME_PAGE - 1,
                    max_segment_size=2**32 - 1)

    def attach(self, Device device not None):
        """Plug it in: from now on it reaches memory as ``device``, a Device with a memory and a bus."""
        if self.device is not None:
            raise StateError("it is plugged in already", argument="self", value=self)
        self.c.dev = device.hardware()
        self.device = device

    def work(self):
        """Let it work once; the commands it completed. Drivers do the same by waiting."""
        cdef int n
        with nogil:
            n = nvme_work(self.c)
        return n

    def fail_next(self, int n, int status=NVME_NOT_READY):
        """The next ``n`` I/O commands complete with ``status`` and do nothing."""
        self.c.fail_n, self.c.fail_status = n, status

    @property
    def errors(self):
        """The error log, newest first: list of NvmeErrorEntry (at most 64)."""
        cdef nvme_error *e
        cdef uint64_t i
        out = []
        for i in range(min(self.c.nerrors, NVME_ERRORS)):
            e = &self.c.log[(self.c.nerrors - 1 - i) % NVME_ERRORS]
            out.append(NvmeErrorEntry(e.count, e.sq, e.cid, e.status, e.byte, e.bit, e.lba, e.nsid))
        return out

    @property
    def fatal(self):
        """Whether it gave up (CSTS.CFS): a queue of its own was out of reach."""
        return bool(self.c.csts & 2)

    def counters(self):
        """Commands done, bytes read and written (by the host), failed commands, doorbells that were refused."""
        return dict(commands=self.c.commands, read_bytes=self.c.bytes_out, written_bytes=self.c.bytes_in,
                    errors=self.c.nerrors, bad_doorbells=self.c.bad_doorbells)

    def __repr__(self):
        return f"NvmeController({self.c.blocks} blocks of {self.block_size}{'' if self.sgl else ', PRP only'})"

    def __dealloc__(self):
        free(self.c)


def _media(media, block_size):
    """Writable memory of whole blocks."""
    if isinstance(media, int):
        media = mmap.mmap(-1, as_length(media, "media"))
    elif isinstance(media, (str, os.PathLike)):
        with open(media, "r+b") as f:
            if not os.path.getsize(media):
                raise DmaValueError("a file of whole blocks", argument="media", value=str(media))
            media = mmap.mmap(f.fileno(), 0)
    view = memoryview(media)
    if view.readonly or view.nbytes == 0 or view.nbytes % block_size:
        raise DmaValueError(f"writable, and whole blocks of {block_size} bytes", argument="media", value=view.nbytes)
    return media
