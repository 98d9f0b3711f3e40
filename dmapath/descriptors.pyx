# cython: language_level=3, cdivision=True
"""What mapped segments become in an NVMe command: PRP entries or SGL descriptors, which of the two, and why
(drivers/nvme/host/pci.c, nvme_pci_use_sgls, nvme_pci_setup_data_prp, nvme_pci_setup_data_sgl; NVM Express Base 4.1)."""
from dataclasses import dataclass, field

from libc.errno cimport E2BIG, EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from dmapath._nvme cimport NVME_SGL_DATA, NVME_SGL_LAST, nvme_sgl
from dmapath.abi cimport dma_seg

from dmapath.addr import DmaAddr, as_dma, as_length
from dmapath.errors import AlignmentError, DmaValueError, NotSupportedError

cdef enum:
    PAGE = 4096
    ENTRIES = 512         # of a page of PRP list
    SMALL_ENTRIES = 32    # of a list in 256 bytes
    SGL_SMALL = 16        # descriptors in 256 bytes
    SGL_LARGE = 256       # in a page

#: Why a form was picked: (rule, where it comes from, what it means), by the index in a form_choice.
FORM_RULES = (
    ("as-told", "dmapath form=", "the form that was asked for"),
    ("no-sgl", "nvme_ctrl_sgl_supported", "the controller takes no SGL: PRP entries are all there is"),
    ("gap-forces-sgl", "nvme_pci_use_sgls (SGL_FORCED)",
     "a piece begins or ends inside a page in the middle of the request, which no PRP entry can say"),
    ("one-piece", "nvme_pci_setup_data_simple",
     "one piece of memory that needs more than two PRP entries is one SGL descriptor, whatever the threshold"),
    ("two-entries", "nvme_pci_setup_data_simple", "one piece of memory that two PRP entries hold"),
    ("sgl-threshold", "nvme_pci_use_sgls (sgl_threshold)", "the average segment is at least the SGL threshold"),
    ("below-threshold", "nvme_pci_use_sgls (sgl_threshold)", "the average segment is below the SGL threshold, or that is 0"),
)
cdef enum:
    AS_TOLD, NO_SGL, GAP, ONE_PIECE, TWO_ENTRIES, THRESHOLD, BELOW


# index of the first segment that PRP entries cannot say; n: they can say all
cdef uint32_t prp_gap(const dma_seg *s, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if (i and s[i].addr.v & (PAGE - 1)) or (i + 1 < n and (s[i].addr.v + s[i].len) & (PAGE - 1)):
            return i
    return n


# nvme_pci_use_sgls, and the short way of requests of one physical segment
cdef form_choice nvme_form(const dma_seg *segs, uint32_t n, uint32_t physical, uint64_t gap_mask, uint32_t wanted,
                           bint can_sgl, uint64_t threshold) noexcept nogil:
    cdef form_choice out
    cdef uint64_t total = 0
    cdef uint32_t i
    out.form, out.why = FORM_PRP, AS_TOLD
    if wanted != FORM_AUTO:
        out.form = wanted
        return out
    if not can_sgl:
        out.why = NO_SGL
        return out
    for i in range(n):
        total += segs[i].len
    if gap_mask & (PAGE - 1) or prp_gap(segs, n) < n:
        out.form, out.why = FORM_SGL, GAP
    elif physical == 1 and n == 1:
        if (segs[0].addr.v & (PAGE - 1)) + total > 2 * PAGE:
            out.form, out.why = FORM_SGL, ONE_PIECE
        else:
            out.why = TWO_ENTRIES
    elif threshold and (total + n - 1) // n >= threshold:
        out.form, out.why = FORM_SGL, THRESHOLD
    else:
        out.why = BELOW
    return out


# entries of PRP beside the first
cdef uint64_t prp_more(const dma_seg *s, uint32_t n) noexcept nogil:
    cdef uint64_t pages = 0
    cdef uint32_t i
    for i in range(n):
        pages += ((s[i].addr.v & (PAGE - 1)) + s[i].len + PAGE - 1) // PAGE
    return pages - 1


cdef bint small_and_quirky(const dma_seg *s, uint32_t n) noexcept nogil:
    # two entries are all, and Linux does not look at the end of the first piece
    return n == 2 and s[0].len + s[1].len <= PAGE - (s[0].addr.v & (PAGE - 1)) + PAGE


# pages for descriptors (small: of 256 bytes) that segments need; -EIO: PRP cannot say them, -E2BIG: too many for one command
cdef int desc_pages(uint32_t form, const dma_seg *segs, uint32_t n, bint quirks, bint *small) noexcept nogil:
    cdef uint64_t more
    small[0] = False
    if form == FORM_SGL:
        small[0] = n <= SGL_SMALL
        return 0 if n == 1 else 1 if n <= SGL_LARGE else -E2BIG
    if prp_gap(segs, n) < n and not (quirks and small_and_quirky(segs, n)):
        return -EIO
    more = prp_more(segs, n)
    if more <= 1:
        return 0
    small[0] = more <= SMALL_ENTRIES
    more = 1 if more <= ENTRIES else (more - 2) // (ENTRIES - 1) + 1
    return <int>more if more <= LIST_PAGES else -E2BIG


cdef inline void put(nvme_sgl *d, uint64_t addr, uint64_t n, uint8_t kind) noexcept nogil:
    memset(d, 0, sizeof(nvme_sgl))
    d.addr, d.len, d.type = addr, <uint32_t>n, <uint8_t>(kind << 4)


# each data page but the first into the list: the last entry of a full page links to the next
cdef void fill_list(const dma_seg *segs, uint32_t n, const desc_page *pages, uint64_t more) noexcept nogil:
    cdef uint64_t *list_ = <uint64_t *>pages[0].host
    cdef uint64_t at, pages_left
    cdef uint32_t i, k = 0, page = 0
    for i in range(n):
        at, pages_left = segs[i].addr.v & ~<uint64_t>(PAGE - 1), prp_more(&segs[i], 1)
        if i == 0:
            at += PAGE
        else:
            pages_left += 1
        while pages_left:
            pages_left -= 1
            if k == ENTRIES - 1 and more > 1:
                page += 1
                list_[k] = pages[page].addr.v
                list_ = <uint64_t *>pages[page].host
                k = 0
            list_[k] = at
            k += 1
            more -= 1
            at += PAGE


# write what desc_pages found room for
cdef void describe(uint32_t form, const dma_seg *segs, uint32_t n, const desc_page *pages, data_pointer *out) noexcept nogil:
    cdef nvme_sgl *d
    cdef uint64_t more, first
    cdef uint32_t i
    out.entries = 0
    out.second = 0
    if form == FORM_SGL:
        d = <nvme_sgl *>&out.first
        if n == 1:
            put(d, segs[0].addr.v, segs[0].len, NVME_SGL_DATA)
            return
        for i in range(n):
            put(<nvme_sgl *>pages[0].host + i, segs[i].addr.v, segs[i].len, NVME_SGL_DATA)
        put(d, pages[0].addr.v, n * sizeof(nvme_sgl), NVME_SGL_LAST)
        out.entries = n
        return
    out.first = segs[0].addr.v
    more = prp_more(segs, n)
    if more == 0:
        return
    if more == 1:
        first = (segs[0].addr.v & ~<uint64_t>(PAGE - 1)) + PAGE
        out.second = first if prp_more(segs, 1) else segs[1].addr.v & ~<uint64_t>(PAGE - 1)
        return
    fill_list(segs, n, pages, more)
    out.second = pages[0].addr.v
    out.entries = <uint32_t>more


# metadata: one segment is MPTR itself (0); more are an SGL in 256 bytes behind MPTR (1), 15 at most (-E2BIG)
cdef int describe_metadata(const dma_seg *segs, uint32_t n, const desc_page *page, uint64_t *mptr) noexcept nogil:
    cdef nvme_sgl *d
    cdef uint32_t i
    if n == 1:
        mptr[0] = segs[0].addr.v
        return 0
    if n >= SGL_SMALL:
        return -E2BIG
    d = <nvme_sgl *>page.host
    put(d, page.addr.v + sizeof(nvme_sgl), n * sizeof(nvme_sgl), NVME_SGL_LAST)
    for i in range(n):
        put(d + i + 1, segs[i].addr.v, segs[i].len, NVME_SGL_DATA)
    mptr[0] = page.addr.v
    return 1


# ---- the same for Python -----------------------------------------------------------------------------------------------


@dataclass
class Prp:
    """PRP entries of one command: ``prp1``; ``prp2``, an address of data or None where a list follows or nothing does; the
    pages of the list, each without the link to the next; and the pool that the list comes from ("small": 256 bytes).
    """

    prp1: DmaAddr
    prp2: object = None
    lists: list = field(default_factory=list)
    pool: object = None

    @property
    def entries(self):
        """List entries that name data."""
        return sum(len(page) for page in self.lists)


@dataclass
class Sgl:
    """SGL descriptors of one command: the data blocks as (DmaAddr, bytes). One stands in the command itself; more stand in a
    list of one segment, from the pool ``pool`` ("small": 256 bytes)."""

    blocks: list
    pool: object = None


@dataclass
class DataPointer:
    """What a request becomes in an NVMe command: ``form`` "prp" or "sgl", the rule that picked it with its source and
    meaning, the descriptors (Prp or Sgl), and the pages of list memory and descriptors in them."""

    form: str
    rule: str
    source: str
    because: str
    descriptors: object
    list_pages: int
    list_entries: int


cdef dma_seg *segments_of(segments, uint32_t *n) except NULL:
    pairs = [(s.addr, s.length) if hasattr(s, "addr") else s for s in segments]
    pieces = [(as_dma(addr), as_length(length, "length")) for addr, length in pairs]
    cdef dma_seg *out
    cdef uint32_t i
    if not pieces:
        raise DmaValueError("at least one segment", argument="segments", value=pieces)
    out = <dma_seg *>malloc(len(pieces) * sizeof(dma_seg))
    if out == NULL:
        raise MemoryError("no memory for the segments")
    n[0] = len(pieces)
    for i in range(n[0]):
        out[i].addr.v, out[i].len = pieces[i]
    return out


cdef refuse(int rc, uint32_t form, const dma_seg *segs, uint32_t n):
    cdef uint32_t i = prp_gap(segs, n)
    total = sum(segs[k].len for k in range(n))
    if rc == -EIO:
        # of two pieces that meet inside a page, the one that ends there or the one that begins there
        return AlignmentError("it begins or ends inside a page in the middle of the request, which no PRP entry can "
                              "say (nvme_pci_setup_data_prp)", errno=5, argument=f"segments[{i}]",
                              value=(hex(segs[i].addr.v), segs[i].len))
    if form == FORM_SGL:
        return DmaValueError(f"at most {SGL_LARGE} descriptors in one list", argument="segments", value=n)
    return DmaValueError(f"at most {LIST_PAGES} pages of list: 8 MiB", argument="segments", value=total)


cdef object described(uint32_t form, const dma_seg *segs, uint32_t n, bint quirks):
    cdef desc_page pages[LIST_PAGES]
    cdef data_pointer out
    cdef bint small
    cdef int i, need = desc_pages(form, segs, n, quirks, &small)
    cdef uint64_t *list_
    if need < 0:
        raise refuse(need, form, segs, n)
    if form == FORM_SGL:
        for k in range(n):
            if segs[k].len >> 32:
                raise DmaValueError("less than 4 GiB: a descriptor's length has 32 bits", argument=f"segments[{k}]",
                                    value=segs[k].len)
        blocks = [(DmaAddr(segs[k].addr.v), segs[k].len) for k in range(n)]
        return Sgl(blocks, ("small" if small else "large") if need else None), need, n if need else 0
    for i in range(need):
        pages[i].addr.v = i * PAGE
        pages[i].host = malloc(PAGE)
        if pages[i].host == NULL:
            for k in range(i):
                free(pages[k].host)
            raise MemoryError("no memory for the list")
    describe(form, segs, n, pages, &out)
    prp = Prp(DmaAddr(out.first))
    if need:
        prp.pool, left = "small" if small else "large", out.entries
        for i in range(need):
            list_ = <uint64_t *>pages[i].host
            take = left if left <= ENTRIES else ENTRIES - 1
            prp.lists.append([DmaAddr(list_[k]) for k in range(take)])
            left -= take
            free(list_)
    elif out.second:
        prp.prp2 = DmaAddr(out.second)
    return prp, need, out.entries


def build_prp(segments, *, kernel_quirks=False):
    """The PRP entries for segments (Segments or (addr, bytes) pairs), in pages of 4096 bytes.

    Raises AlignmentError (EIO) where a segment but the last does not end on a page, or one but the first does not begin on
    one: PRP has no way to say that, and BLK_STS_IOERR is what Linux makes of it. Linux does not look at the end of the first
    piece where two entries are all; ``kernel_quirks`` does not either.
    """
    cdef uint32_t n
    cdef dma_seg *segs = segments_of(segments, &n)
    try:
        return described(FORM_PRP, segs, n, kernel_quirks)[0]
    finally:
        free(segs)


def describe_request(segments, *, gap_mask=0, physical=0, form="auto", sgl=True, sgl_threshold=32768):
    """The DataPointer of a request: its mapped ``segments``, its ``gap_mask``, the number of ``physical`` segments it had
    before it was mapped (0: as many as segments), the ``form`` wanted ("auto", "prp", "sgl"), whether the controller takes
    SGLs, and the threshold in bytes (0: none).

    Raises AlignmentError (EIO) where PRP cannot say it, DmaValueError where it is too long for one command, and
    NotSupportedError where SGLs are wanted of a controller that takes none.
    """
    cdef uint32_t n
    cdef form_choice choice
    cdef dma_seg *segs
    if form not in FORMS:
        raise DmaValueError("auto, prp or sgl", argument="form", value=form)
    if form == "sgl" and not sgl:
        raise NotSupportedError("the controller takes no SGL", argument="form", value=form)
    segs = segments_of(segments, &n)
    try:
        choice = nvme_form(segs, n, physical or n, gap_mask, FORMS[form], sgl, sgl_threshold)
        what, pages, entries = described(choice.form, segs, n, False)
        return DataPointer("sgl" if choice.form == FORM_SGL else "prp", *FORM_RULES[choice.why], what, pages, entries)
    finally:
        free(segs)


FORMS = {"auto": FORM_AUTO, "prp": FORM_PRP, "sgl": FORM_SGL}
