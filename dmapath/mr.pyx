# cython: language_level=3
"""Memory regions as RDMA registers them: whole pages around a byte range, an IOVA, access rights, and the page size and
block list (MTT) that a device's translation table would get (drivers/infiniband/core/umem.c, verbs.c)."""
from dmapath.abi cimport DMA_ATTR_REQUIRE_COHERENT, DMA_BIDIRECTIONAL, DMA_RQ_SG
from dmapath.request cimport Mappable

from dmapath.addr import DmaAddr, as_dma, as_integer, as_iova, as_length
from dmapath.errors import DmaValueError, NotSupportedError, PermissionDeniedError

PAGE = 4096
LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC = 1, 2, 4, 8
MW_BIND, ZERO_BASED, ON_DEMAND, HUGETLB = 16, 32, 64, 128
FLUSH_GLOBAL, FLUSH_PERSISTENT, RELAXED_ORDERING = 256, 512, 1 << 20
#: Access bits that make a region writable, and so pin its pages for writing (ib_access_writable).
WRITABLE = LOCAL_WRITE | REMOTE_WRITE | REMOTE_ATOMIC | MW_BIND
_OPTIONAL = 0x3ff << 20


def check_rights(access):
    """Refuse what no device takes (ib_check_mr_access): unknown bits, and remote rights to write without the local one.
    Raises DmaValueError (EINVAL)."""
    access = as_integer(access, "access", last=2**32 - 1)
    if access & ~(0x3ff | _OPTIONAL):
        raise DmaValueError("unknown access bits (ib_check_mr_access)", argument="access", value=access)
    if access & (REMOTE_WRITE | REMOTE_ATOMIC) and not access & LOCAL_WRITE:
        raise DmaValueError("remote write or atomic access needs LOCAL_WRITE (ib_check_mr_access)", argument="access",
                            value=access)
    return access


def check_access(access):
    """``check_rights``, and what a simulated device has not. Raises DmaValueError (EINVAL) or NotSupportedError
    (EOPNOTSUPP)."""
    access = check_rights(access)
    if access & (ON_DEMAND | FLUSH_GLOBAL | FLUSH_PERSISTENT):
        raise NotSupportedError("the simulated device has no ODP and no persistent flush (ib_check_mr_access)",
                                argument="access", value=access)
    return access


cdef class MemoryRegion(Mappable):
    """A registered byte range: its pages are mapped whole, both ways, and must be coherent (ib_umem_get_va).

    Parameters
    ----------
    pages : iterable of (phys, bytes)
        Page-aligned runs that hold the range, in order.
    offset : int
        Bytes from the first page's start to the range's first byte, below 4096.
    length : int
        Bytes of the range.
    iova : int
        The address that the device's users give for its first byte; default: the offset.
    access : int
        LOCAL_WRITE | REMOTE_READ ... (enum ib_access_flags).
    """

    cdef readonly object offset, length, iova, access
    cdef readonly bint writable

    def __init__(self, pages, *, length, offset=0, iova=None, access=LOCAL_WRITE):
        self.load(pages)
        self.offset = as_length(offset, "offset", least=0)
        self.length = as_length(length, "length")
        if self.offset >= PAGE:
            raise DmaValueError("below 4096", argument="offset", value=offset)
        for i, (at, n) in enumerate(self.vecs):
            if (int(at) | n) & (PAGE - 1):
                raise DmaValueError("whole pages", argument=f"pages[{i}]", value=(at, n))
        if not self.rq.total - PAGE < self.offset + self.length <= self.rq.total:
            raise DmaValueError(f"offset + length must end in the last page of {self.rq.total} bytes",
                                argument="length", value=length)
        self.iova = as_iova(self.offset if iova is None else iova)
        if self.iova + self.length - 1 > 2**64 - 1:
            raise DmaValueError("iova + length passes 2**64", argument="iova", value=self.iova)
        self.access = check_access(access)
        self.writable = bool(self.access & WRITABLE)
        self.rq.dir = DMA_BIDIRECTIONAL
        self.rq.attrs = DMA_ATTR_REQUIRE_COHERENT
        self.rq.flags = DMA_RQ_SG

    @classmethod
    def from_memory(cls, memory, offset, length, *, iova=None, access=LOCAL_WRITE):
        """Register bytes [offset, offset + length) of a PhysMemory, which is kept alive."""
        offset, length = as_length(offset, "offset", least=0), as_length(length, "length")
        first = offset & ~(PAGE - 1)
        last = (offset + length + PAGE - 1) & ~(PAGE - 1)
        cdef MemoryRegion mr = cls(memory.vecs(first, last - first), offset=offset - first, length=length,
                                   iova=offset if iova is None else iova, access=access)
        mr.keeps = memory
        return mr

    def __repr__(self):
        return f"MemoryRegion({self.length} bytes at iova {self.iova:#x}, {self.nr} runs)"

    @property
    def wanted(self):
        """The region's own bytes: list of (PhysAddr, bytes)."""
        out, skip, left = [], self.offset, self.length
        for at, n in self.vecs:
            take = min(n - skip, left)
            out.append((at + skip, take))
            skip, left = 0, left - take
        return out

    def rereg(self, access):
        """Change the access rights. EACCES when pages pinned for reading would have to be written
        (ib_umem_check_rereg)."""
        access = check_access(access)
        if access & WRITABLE and not self.writable:
            raise PermissionDeniedError("the pages were pinned read-only (ib_umem_check_rereg)", errno=13,
                                        argument="access", value=access)
        self.access = access

    def best_page_size(self, segments, page_sizes):
        """The largest device page size that works for mapped segments, or 0 (ib_umem_find_best_pgsz)."""
        return find_best_pgsz(segments, self.offset, self.length, self.iova, page_sizes)

    def mtt(self, segments, page_size):
        """The device's translation table: one page-aligned DmaAddr per page (rdma_umem_for_each_dma_block)."""
        return dma_blocks(segments, self.offset, self.length, self.iova, page_size)


class FastMr:
    """A fast-registration MR as rxe keeps it: FREE until a work request registers mapped segments under a key, VALID until
    an invalidate (rxe_reg_fast_mr, rxe_invalidate_mr).

    Parameters
    ----------
    index : int
        The upper 24 bits of its keys; consumers choose the lower 8.
    pd : object
        The protection domain it belongs to.
    max_pages : int
        Pages of ``page_size`` bytes that it can hold; at most 512.
    """

    def __init__(self, index, pd, *, max_pages=256, page_size=PAGE):
        if not 0 < index < 1 << 24:
            raise DmaValueError("1 to 2**24 - 1", argument="index", value=index)
        if not 0 < max_pages <= 512:
            raise DmaValueError("1 to 512", argument="max_pages", value=max_pages)
        if page_size % PAGE and PAGE % page_size:
            raise DmaValueError("divides 4096 or is a multiple of it", argument="page_size", value=page_size)
        self.index, self.pd, self.max_pages, self.page_size = index, pd, max_pages, page_size
        self.state, self.key, self.access = "free", index << 8, 0
        self.iova, self.length, self.pages = DmaAddr(0), 0, []

    def map(self, segments, *, sg_offset=0):
        """Take mapped segments (ib_map_mr_sg): the number of entries taken; fewer than given where a gap or the capacity
        ends it."""
        taken, self.iova, self.length, self.pages, _ = sg_to_pages(
            segments, page_size=self.page_size, sg_offset=sg_offset, max_pages=self.max_pages)
        return taken

    def reg(self, key, pd, access):
        """The work request: make it VALID under a key with access rights. EINVAL where it is not FREE, of another protection
        domain, or where more than the low 8 bits of the key change."""
        if self.state != "free":
            raise DmaValueError("registered already: invalidate it first (rxe_reg_fast_mr)", argument="self",
                                value=self.state)
        if pd is not self.pd:
            raise DmaValueError("the MR's own protection domain (rxe_reg_fast_mr)", argument="pd", value=pd)
        if as_length(key, "key", least=0) >> 8 != self.index:
            raise DmaValueError("only the low 8 bits of the key may change (rxe_reg_fast_mr)", argument="key", value=key)
        self.access = check_access(access)
        self.key, self.state = key, "valid"

    def invalidate(self, key):
        """LOCAL_INV or a remote SEND_WITH_INV: FREE again. EINVAL where the key is not its own."""
        if self.state != "valid" or key != self.key:
            raise DmaValueError("the key that it was registered under (rxe_invalidate_mr)", argument="key", value=key)
        self.state, self.access = "free", 0

    def check(self, iova, length, access=0):
        """Whether a request for bytes may go ahead (rxe's mr_check_range and look-up): DmaValueError where not. A request of
        length 0 is not looked at."""
        if not length:
            return
        if self.state != "valid" or access & ~self.access:
            raise PermissionDeniedError("valid, with every right that is asked for (rxe lookup_mr)", errno=13,
                                        argument="access", value=access)
        if iova < self.iova or length > self.length or iova - self.iova > self.length - length:
            raise DmaValueError(f"within {self.length} bytes from {int(self.iova):#x} (mr_check_range)", argument="iova",
                                value=int(iova))


def _dma_runs(segments):
    runs = []
    for addr, length in [(s.addr, s.length) if hasattr(s, "addr") else s for s in segments]:
        addr, length = as_dma(addr), as_length(length, "length")
        if runs and runs[-1][0] + runs[-1][1] == addr:
            runs[-1][1] += length
        else:
            runs.append([addr, length])
    return runs


def find_best_pgsz(segments, offset, length, virt, page_sizes):
    """Largest size of the bitmap that maps virt..virt+length over the segments page by page; 0: none does.

    ``segments`` are (addr, bytes) of whole pages, ``offset`` the first byte's place in the first of them, all in
    bytes. Mirrors ib_umem_find_best_pgsz of Linux 7.3: the result may cover memory outside the region.
    """
    if virt + length - 1 > 2**64 - 1:
        return 0
    mask = page_sizes & ~((1 << ((virt + length - 1) ^ virt).bit_length()) - 1)
    va = virt
    for i, (addr, n) in enumerate(_dma_runs(segments)):
        skip = 0 if i else offset
        mask |= (addr + skip) ^ va
        if i:
            mask |= va
        va += n - skip
    usable = page_sizes & (((mask & -mask) << 1) - 1) if mask else page_sizes
    return 1 << usable.bit_length() - 1 if usable else 0


def find_best_pgoff(segments, offset, length, page_sizes, mask):
    """find_best_pgsz for an IOVA that keeps only the bits of mask of the DMA address (ib_umem_find_best_pgoff)."""
    first = _dma_runs(segments)[0][0] + offset
    if first & ~mask & (PAGE - 1):
        return 0
    return find_best_pgsz(segments, offset, length, first & mask, page_sizes)


def dma_blocks(segments, offset, length, virt, page_size):
    """Page-aligned DmaAddr of each device page of a region (rdma_umem_for_each_dma_block)."""
    if page_size & (page_size - 1) or page_size <= 0:
        raise DmaValueError("a power of two", argument="page_size", value=page_size)
    runs = _dma_runs(segments)
    first, last = virt & ~(page_size - 1), virt + length - 1
    out, run, before = [], 0, -offset  # bytes of the region before runs[run]
    for page in range(first, last + 1, page_size):
        at = max(page, virt) - virt
        while at >= before + runs[run][1]:
            before += runs[run][1]
            run += 1
        out.append(DmaAddr(runs[run][0] + at - before & ~(page_size - 1)))
    return out


def sg_to_pages(segments, *, page_size=PAGE, sg_offset=0, max_pages=None, kernel_quirks=False):
    """What a fast-registration MR takes of a list (ib_sg_to_pages): (entries taken, iova, bytes, pages, sg_offset).

    Stops at the first gap inside a page and at max_pages; the rest needs another MR. ``kernel_quirks`` reports the
    length as Linux 7.3 does when the capacity runs out inside an entry: one page short.
    """
    pairs = [(s.addr, s.length) if hasattr(s, "addr") else s for s in segments]
    sg = [(as_dma(addr), as_length(n, "length")) for addr, n in pairs]
    if not sg or sg_offset > sg[0][1]:
        raise DmaValueError("within the first entry", argument="sg_offset", value=sg_offset)
    iova, total, pages, end = sg[0][0] + sg_offset, 0, [], None
    for i, (addr, n) in enumerate(sg):
        start, stop = addr + sg_offset, addr + n
        page = start & ~(page_size - 1)
        if i and (end & (page_size - 1) or page != start):
            if end != start:
                return i, DmaAddr(iova), total, pages, 0
            page += page_size
        done = start
        while page < stop:
            if max_pages is not None and len(pages) == max_pages:
                stored_to = done if kernel_quirks else max(page, start)
                left = stored_to - addr
                if not i and not left:
                    raise DmaValueError("room for one page at least", argument="max_pages", value=max_pages)
                return i, DmaAddr(iova), total + stored_to - start, pages, left
            pages.append(DmaAddr(page))
            done = page
            page += page_size
        total += stop - start
        end, sg_offset = stop, 0
    return len(sg), DmaAddr(iova), total, pages, 0
