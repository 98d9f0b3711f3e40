# cython: language_level=3, cdivision=True
"""An NVMe driver: block requests in, commands out (the shape of drivers/nvme/host/pci.c).

One flow: map, read segments, describe them, ring, reap, unmap. What the memory is and what maps it, it does not ask.
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport E2BIG, EAGAIN, EIO, ENOMEM, ETIMEDOUT
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport cython

from dmapath._nvme cimport (
    NVME_ACQ, NVME_ADMIN_CREATE_CQ, NVME_ADMIN_CREATE_SQ, NVME_ADMIN_DELETE_CQ, NVME_ADMIN_DELETE_SQ, NVME_ADMIN_IDENTIFY,
    NVME_ADMIN_SET, NVME_AQA, NVME_ASQ, NVME_CAP, NVME_CC, NVME_CSTS, NVME_DNR, NVME_DOORBELLS, NVME_DSM, NVME_FLUSH,
    NVME_PAGE, NVME_PSDT_METABUF, NVME_PSDT_METASEG, NVME_READ, NVME_STRIDE, NVME_WRITE, NVME_WRITE_ZEROES, nvme_cmd,
    nvme_cqe,
)
from dmapath.abi cimport (
    DMA_POLICY_LINUX, DMA_POLICY_UNIFIED, dma_device, dma_map_iter, dma_map_state,
    dma_mmio, dma_policy, dma_readl, dma_readq, dma_request, dma_seg, dma_writel, dma_writeq,
)
from dmapath.bio cimport Bio, Request
from dmapath.descriptors cimport (
    FORM_SGL, LIST_PAGES, data_pointer, desc_page, desc_pages, describe, describe_metadata, form_choice, nvme_form,
)
from dmapath.device cimport CoherentBuffer, Device
from dmapath.mmio cimport registers_of
from dmapath.request cimport Mappable
from dmapath.wrapper cimport map_next, map_start, unmap

from dmapath import rules
from dmapath.addr import as_length
from dmapath.descriptors import FORM_RULES, FORMS
from dmapath.errors import AddressTypeError, DmaError, DmaValueError, NvmeError, StateError, at_end, error_for
from dmapath.limits import QueueLimits
from dmapath.nvme_status import status_name

cdef enum:
    SEGMENTS = 1024     # of one command, more than any descriptor list holds
    SMALL = 256         # bytes of a piece of the small pool
    INTERNAL = 6        # status of what a dead controller took with it; may be tried again
    IDLE = 10000        # looks without anything to see, until the controller is taken for dead
    ADMIN_DEPTH = 16
    MOST_BLOCKS = 65536  # of one command, whose count has 16 bits

# requests that were handed over together, as commands
cdef struct io_list:
    io_req *reqs
    uint32_t n, next, done
    io_list *after

cdef struct io_req:
    const dma_request *data     # NULL: it moves nothing
    const dma_request *meta     # NULL: its blocks have no metadata
    io_list *parent
    uint64_t lba
    uint32_t blocks
    int error                   # -errno: it never reached the controller
    uint16_t status
    uint8_t opcode, tries

# what a command in flight holds
cdef struct slot:
    io_req *req
    dma_map_state data, meta
    uint16_t piece[LIST_PAGES + 1]
    uint16_t pieces, metas      # of the pool that `small` names, and of the small one for metadata
    bint small

# pieces of coherent memory for descriptors (dma_pool)
cdef struct pool:
    char *host
    uint64_t addr
    uint32_t size, left
    uint16_t *free_

cdef struct queue:
    dma_device *dev
    const dma_mmio *regs
    nvme_cmd *sq
    nvme_cqe *cq
    uint32_t id, entries, tail, rung, head, phase, inflight
    slot *slots
    uint16_t *cids
    uint32_t left               # command identifiers
    io_list *first
    io_list *last
    io_req **again
    uint32_t nagain             # commands to try again
    pool small, large
    uint32_t form, tries, nsid
    bint can_sgl
    uint64_t threshold
    dma_policy policy
    dma_seg segs[SEGMENTS]
    dma_seg meta_segs[SEGMENTS]
    # what was done, and how the last request was mapped
    uint64_t commands, prps, sgls, retries, resets, list_pages, inlined
    uint64_t rules
    uint32_t layout, nsegs, why


cdef inline bint pool_take(pool *p, uint16_t *out, uint32_t n) noexcept nogil:
    cdef uint32_t i
    if p.left < n:
        return False
    for i in range(n):
        p.left -= 1
        out[i] = p.free_[p.left]
    return True


cdef inline void pool_give(pool *p, const uint16_t *pieces, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        p.free_[p.left] = pieces[i]
        p.left += 1


cdef inline desc_page pool_at(const pool *p, uint16_t i) noexcept nogil:
    cdef desc_page out
    out.host, out.addr.v = p.host + i * p.size, p.addr + <uint64_t>i * p.size
    return out


# map a request and read its segments; the physical segments it had where they are known
cdef int map_request(queue *q, const dma_request *rq, dma_map_state *st, dma_seg *segs, uint32_t *n,
                     uint32_t *physical) noexcept nogil:
    cdef dma_map_iter it
    cdef uint32_t k = 0
    cdef int rc = map_start(q.dev, rq, q.policy, st, &it)
    if rc:
        return rc
    physical[0] = it.have if it.whole else 0
    while True:
        rc = map_next(q.dev, st, &it, &segs[k])
        if rc <= 0:
            break
        k += 1
        if k == SEGMENTS:
            rc = -E2BIG
            break
    n[0] = k
    if rc < 0:
        unmap(q.dev, st)
    return rc


cdef void let_go(queue *q, slot *s, io_req *r) noexcept nogil:
    if r.meta != NULL:
        unmap(q.dev, &s.meta)
    if r.data != NULL:
        unmap(q.dev, &s.data)
    pool_give(&q.small if s.small else &q.large, s.piece, s.pieces)
    pool_give(&q.small, &s.piece[LIST_PAGES], s.metas)
    s.pieces = s.metas = 0


# descriptors for what is mapped, into the command and pieces of the pools
cdef int describe_data(queue *q, slot *s, nvme_cmd *c, uint32_t n, const form_choice *choice) noexcept nogil:
    cdef desc_page pages[LIST_PAGES]
    cdef data_pointer out
    cdef pool *p
    cdef bint small
    cdef int i, need = desc_pages(choice.form, q.segs, n, False, &small)
    if need < 0:
        return need
    s.small = small
    p = &q.small if small else &q.large
    if not pool_take(p, s.piece, need):
        return -EAGAIN
    s.pieces = need
    for i in range(need):
        pages[i] = pool_at(p, s.piece[i])
    describe(choice.form, q.segs, n, pages, &out)
    c.prp1, c.prp2 = out.first, out.second
    if choice.form == FORM_SGL:
        c.flags = NVME_PSDT_METABUF
        q.sgls += 1
    else:
        q.prps += 1
    q.list_pages += need
    q.inlined += need == 0
    return 0


cdef int describe_meta(queue *q, slot *s, nvme_cmd *c, uint32_t n) noexcept nogil:
    cdef desc_page page
    cdef int rc
    if not pool_take(&q.small, &s.piece[LIST_PAGES], 1):
        return -EAGAIN
    s.metas = 1
    page = pool_at(&q.small, s.piece[LIST_PAGES])
    rc = describe_metadata(q.meta_segs, n, &page, &c.mptr)
    if rc > 0:
        c.flags = NVME_PSDT_METASEG
    return rc if rc < 0 else 0


# map a request and its metadata, and describe both; -errno with nothing mapped
cdef int load(queue *q, slot *s, io_req *r, nvme_cmd *c) noexcept nogil:
    cdef uint32_t n = 0, metas = 0, physical = 0, ignored = 0
    cdef form_choice choice
    cdef int rc = map_request(q, r.data, &s.data, q.segs, &n, &physical)
    if rc:
        return rc
    s.pieces = s.metas = 0
    if r.meta != NULL:
        rc = map_request(q, r.meta, &s.meta, q.meta_segs, &metas, &ignored)
        if rc:
            unmap(q.dev, &s.data)
            return rc
    choice = nvme_form(q.segs, n, physical if physical else n, r.data.gap_mask,
                       FORM_SGL if metas > 1 and q.can_sgl else q.form, q.can_sgl, q.threshold)
    q.rules, q.layout, q.nsegs, q.why = s.data.rules, s.data.layout, n, choice.why
    rc = describe_data(q, s, c, n, &choice)
    if rc == 0 and r.meta != NULL:
        rc = describe_meta(q, s, c, metas)
    if rc:
        let_go(q, s, r)
    return rc


# put one command into the ring; -EAGAIN: later, when something has completed
cdef int issue(queue *q, io_req *r) noexcept nogil:
    cdef nvme_cmd *c = &q.sq[q.tail]
    cdef uint16_t cid
    cdef slot *s
    cdef int rc
    if q.left == 0:
        return -EAGAIN
    cid = q.cids[q.left - 1]
    s = &q.slots[cid]
    memset(c, 0, sizeof(nvme_cmd))
    c.opcode, c.cid, c.nsid = r.opcode, cid, q.nsid
    c.cdw10, c.cdw11, c.cdw12 = <uint32_t>r.lba, <uint32_t>(r.lba >> 32), r.blocks - 1
    s.pieces = s.metas = 0
    if r.data != NULL:
        rc = load(q, s, r, c)
        if rc:
            # memory that others hold comes back when they complete
            return -EAGAIN if rc == -ENOMEM and q.inflight else rc
    q.left -= 1
    s.req = r
    q.tail = q.tail + 1 if q.tail + 1 < q.entries else 0
    q.inflight += 1
    q.commands += 1
    return 0


cdef inline void finish(io_req *r, uint16_t status, int error) noexcept nogil:
    r.status, r.error = status, error
    r.parent.done += 1


# lists whose commands were all issued leave the queue; their owners may go when they are done
cdef inline void skip_issued(queue *q) noexcept nogil:
    while q.first != NULL and q.first.next == q.first.n:
        q.first = q.first.after


# issue until the queue is full or nothing waits; then tell the controller
cdef void issue_more(queue *q) noexcept nogil:
    cdef io_req *r
    cdef int rc = 0
    while True:
        skip_issued(q)
        if q.nagain:
            r = q.again[q.nagain - 1]
        elif q.first != NULL:
            r = &q.first.reqs[q.first.next]
        else:
            break
        rc = issue(q, r)
        if rc == -EAGAIN and q.inflight:
            break
        if q.nagain:
            q.nagain -= 1
        else:
            q.first.next += 1
        if rc:
            finish(r, 0, rc)
    if q.tail != q.rung:
        dma_writel(q.regs, NVME_DOORBELLS + 2 * q.id * NVME_STRIDE, q.tail)
        q.rung = q.tail


cdef void retire(queue *q, uint16_t cid, uint16_t status) noexcept nogil:
    cdef slot *s = &q.slots[cid]
    cdef io_req *r = s.req
    s.req = NULL
    let_go(q, s, r)
    q.cids[q.left] = cid
    q.left += 1
    q.inflight -= 1
    if status and not status & NVME_DNR and r.tries < q.tries:
        r.tries += 1
        q.retries += 1
        q.again[q.nagain] = r
        q.nagain += 1
    else:
        finish(r, status, 0)


# take what completed; how many
cdef uint32_t reap(queue *q) noexcept nogil:
    cdef uint32_t got = 0
    cdef nvme_cqe *e = &q.cq[q.head]
    while e.status & 1 == q.phase:
        if e.cid < q.entries - 1 and q.slots[e.cid].req != NULL:  # a completion of nothing is the controller's mistake
            retire(q, e.cid, e.status >> 1)
        got += 1
        q.head += 1
        if q.head == q.entries:
            q.head = 0
            q.phase ^= 1
        e = &q.cq[q.head]
    if got:
        dma_writel(q.regs, NVME_DOORBELLS + (2 * q.id + 1) * NVME_STRIDE, q.head)
    return got


# work until all of a list is done; -errno: the controller does not answer
cdef int drive(queue *q, io_list *target) noexcept nogil:
    cdef uint32_t idle = 0
    while target.done < target.n:
        issue_more(q)
        if q.regs.relax(q.regs.priv) == 0:
            idle += 1
        if reap(q):
            idle = 0
        elif idle and (dma_readl(q.regs, NVME_CSTS) & 3) != 1:
            return -EIO
        elif idle == IDLE:
            return -ETIMEDOUT
    return 0


def _number(value, argument, least, last):
    if not hasattr(value, "__index__") or not least <= value <= last:
        raise DmaValueError(f"{least} to {last}", argument=argument, value=value)
    return value


cdef class Io:
    """Requests that were submitted together. ``wait`` for them; ``errors`` says what became of each."""

    cdef io_list list_
    cdef readonly list requests
    cdef Nvme driver

    def __cinit__(self, Nvme driver=None):
        if driver is None:
            raise TypeError("made by Nvme.submit")
        self.driver = driver

    def __dealloc__(self):
        free(self.list_.reqs)

    @property
    def done(self):
        """Whether all of its commands completed."""
        return self.list_.done == self.list_.n

    @property
    def commands(self):
        """Commands that its requests became."""
        return self.list_.n

    @property
    def errors(self):
        """What failed: list of exceptions (NvmeError, or the DmaError of a request that could not be mapped)."""
        cdef uint32_t i
        return [self.error(i) for i in range(self.list_.n)
                if self.list_.reqs[i].error or self.list_.reqs[i].status] if self.done else []

    cdef object error(self, uint32_t i):
        cdef io_req *r = &self.list_.reqs[i]
        if r.error:
            return error_for(-r.error, "the request could not be mapped, or one command cannot say it", "requests",
                             self.requests[i])
        return NvmeError(f"opcode {r.opcode:#x} on blocks {r.lba}+{r.blocks}: {status_name(r.status)} "
                         f"({r.status & 0x7ff:#x}), tried {r.tries + 1} times", status=r.status,
                         status_name=status_name(r.status), opcode=r.opcode, lba=r.lba, blocks=r.blocks)

    def wait(self):
        """Work until all are done; raises the first error. The others are in ``errors``."""
        self.driver.drive(self)
        errors = self.errors
        if errors:
            raise errors[0]


@cython.no_gc_clear  # __dealloc__ stops the controller
cdef class Nvme:
    """The driver of one namespace of an NVMe controller. One thread at a time uses it.

    Parameters
    ----------
    controller : object
        Its attribute ``mmio`` is a capsule "dmapath.mmio.v1": the controller's registers.
    device : Device
        How the controller reaches memory, made with the limits of its data sheet.
    queue_depth : int
        Commands in flight, 1 to 1000.
    form : "auto", "prp" or "sgl"
        auto: as Linux 7.3 picks (nvme_pci_use_sgls).
    sgl_threshold : int
        Average bytes of a segment from which SGLs are used; 0: only where they must be.
    policy : "unified" or "linux"
        By which rules requests are mapped.
    retries : int
        How often a command is tried again whose status allows it.

    Raises StateError where the controller does not come up.
    """

    cdef queue q
    cdef readonly Device device
    cdef object controller
    cdef CoherentBuffer admin_sq, admin_cq, sq, cq, small, large
    cdef uint32_t admin_tail, admin_head, admin_phase
    cdef readonly int queue_depth, block_size, metadata_size
    cdef readonly object blocks, max_bytes, limits, identity
    cdef list live
    cdef bint up, dead

    def __cinit__(self, controller, Device device not None, *, int queue_depth=32, form="auto", sgl_threshold=32768,
                  policy="unified", int retries=5):
        self.q.regs = registers_of(controller, "controller")
        if not 1 <= queue_depth <= 1000:
            raise DmaValueError("1 to 1000", argument="queue_depth", value=queue_depth)
        if form not in FORMS:
            raise DmaValueError("auto, prp or sgl", argument="form", value=form)
        if policy not in ("unified", "linux"):
            raise DmaValueError("unified or linux", argument="policy", value=policy)
        if not 0 <= retries <= 100:
            raise DmaValueError("0 to 100", argument="retries", value=retries)
        self.controller, self.device, self.queue_depth, self.live = controller, device, queue_depth, []
        self.q.dev = &device.c
        self.q.form, self.q.threshold = FORMS[form], as_length(sgl_threshold, "sgl_threshold", least=0)
        self.q.policy = DMA_POLICY_LINUX if policy == "linux" else DMA_POLICY_UNIFIED
        self.q.tries, self.q.nsid, self.q.id, self.q.entries = retries, 1, 1, queue_depth + 1
        self.q.slots = <slot *>calloc(queue_depth, sizeof(slot))
        self.q.cids = <uint16_t *>calloc(queue_depth, sizeof(uint16_t))
        self.q.again = <io_req **>calloc(queue_depth, sizeof(io_req *))
        if self.q.slots == NULL or self.q.cids == NULL or self.q.again == NULL:
            raise MemoryError("no memory for the queue")
        self.admin_sq, self.admin_cq = device.alloc_coherent(NVME_PAGE), device.alloc_coherent(NVME_PAGE)
        self.sq = device.alloc_coherent(self.q.entries * sizeof(nvme_cmd))
        self.cq = device.alloc_coherent(self.q.entries * sizeof(nvme_cqe))
        self.small = device.alloc_coherent(2 * queue_depth * SMALL)  # one for data and one for metadata of each command
        self.large = device.alloc_coherent((queue_depth + LIST_PAGES) * NVME_PAGE)
        self.make_pool(&self.q.small, self.small, SMALL)
        self.make_pool(&self.q.large, self.large, NVME_PAGE)
        self.start()
        self._learn()

    cdef make_pool(self, pool *p, CoherentBuffer memory, uint32_t size):
        cdef uint32_t i, n = memory.size // size
        p.host, p.addr, p.size, p.left = memory.host, memory.addr_.v, size, n
        p.free_ = <uint16_t *>calloc(n, sizeof(uint16_t))
        if p.free_ == NULL:
            raise MemoryError("no memory for the pool")
        for i in range(n):
            p.free_[i] = n - 1 - i

    cdef wait_ready(self, uint32_t want):
        cdef int _look
        for _look in range(IDLE):
            if (dma_readl(self.q.regs, NVME_CSTS) & 3) == want:
                return
            self.q.regs.relax(self.q.regs.priv)
        raise StateError(f"the controller does not become {'ready' if want else 'idle'} (CSTS "
                         f"{dma_readl(self.q.regs, NVME_CSTS):#x})", argument="controller", value=self.controller)

    # bring the controller up with empty queues (nvme_pci_configure_admin_queue, nvme_setup_io_queues)
    cdef start(self):
        cdef uint32_t i
        most = dma_readq(self.q.regs, NVME_CAP) & 0xffff
        if self.q.entries > most + 1:
            raise DmaValueError(f"at most {most}, by the controller's CAP.MQES", argument="queue_depth",
                                value=self.queue_depth)
        dma_writel(self.q.regs, NVME_CC, 0)
        self.wait_ready(0)
        memset(self.admin_cq.host, 0, self.admin_cq.size)
        memset(self.cq.host, 0, self.cq.size)
        self.admin_tail = self.admin_head = self.q.tail = self.q.rung = self.q.head = 0
        self.admin_phase = self.q.phase = 1
        self.q.sq, self.q.cq = <nvme_cmd *>self.sq.host, <nvme_cqe *>self.cq.host
        self.q.left = self.queue_depth
        for i in range(self.queue_depth):
            self.q.cids[i] = self.queue_depth - 1 - i
        dma_writel(self.q.regs, NVME_AQA, (ADMIN_DEPTH - 1) << 16 | ADMIN_DEPTH - 1)
        dma_writeq(self.q.regs, NVME_ASQ, self.admin_sq.addr_.v)
        dma_writeq(self.q.regs, NVME_ACQ, self.admin_cq.addr_.v)
        self.up = True
        dma_writel(self.q.regs, NVME_CC, 4 << 20 | 6 << 16 | 1)  # entries of 16 and 64 bytes; enable
        self.wait_ready(1)
        self.admin(NVME_ADMIN_SET, 7)  # number of queues
        self.admin(NVME_ADMIN_CREATE_CQ, (self.q.entries - 1) << 16 | self.q.id, 1, self.cq.addr_.v)
        self.admin(NVME_ADMIN_CREATE_SQ, (self.q.entries - 1) << 16 | self.q.id, self.q.id << 16 | 1, self.sq.addr_.v)

    # one admin command, waited for; raises NvmeError
    cdef uint32_t admin(self, uint8_t opcode, uint32_t cdw10, uint32_t cdw11=0, uint64_t prp1=0, uint32_t nsid=0) except? 7:
        cdef nvme_cmd *c = <nvme_cmd *>self.admin_sq.host + self.admin_tail
        cdef nvme_cqe *e = <nvme_cqe *>self.admin_cq.host + self.admin_head
        cdef int _look
        memset(c, 0, sizeof(nvme_cmd))
        c.opcode, c.nsid, c.prp1, c.cdw10, c.cdw11 = opcode, nsid, prp1, cdw10, cdw11
        self.admin_tail = (self.admin_tail + 1) % ADMIN_DEPTH
        dma_writel(self.q.regs, NVME_DOORBELLS, self.admin_tail)
        for _look in range(IDLE):
            self.q.regs.relax(self.q.regs.priv)
            if e.status & 1 == self.admin_phase:
                break
        else:
            raise StateError("the controller does not answer an admin command", argument="controller",
                             value=self.controller)
        self.admin_head = (self.admin_head + 1) % ADMIN_DEPTH
        self.admin_phase ^= self.admin_head == 0
        dma_writel(self.q.regs, NVME_DOORBELLS + NVME_STRIDE, self.admin_head)
        if e.status >> 1:
            raise NvmeError(f"admin opcode {opcode:#x}: {status_name(e.status >> 1)}", status=e.status >> 1,
                            status_name=status_name(e.status >> 1), opcode=opcode, lba=0, blocks=0)
        return e.result

    cdef bytes identify(self, uint32_t cns, uint32_t nsid):
        cdef uint64_t at = self.large.addr_.v  # nothing is in flight yet
        self.admin(NVME_ADMIN_IDENTIFY, cns, 0, at, nsid)
        return self.large.host[:NVME_PAGE]

    def _learn(self):
        ctrl, ns = self.identify(1, 0), self.identify(0, 1)
        self.identity = dict(model=ctrl[24:64].decode().strip(), serial=ctrl[4:24].decode().strip(), mdts=ctrl[77],
                             sgls=int.from_bytes(ctrl[536:540], "little"), oncs=int.from_bytes(ctrl[520:522], "little"))
        self.blocks = int.from_bytes(ns[0:8], "little")
        self.metadata_size, self.block_size = int.from_bytes(ns[128:130], "little"), 1 << ns[130]
        self.q.can_sgl = bool(self.identity["sgls"] & 3)
        if self.q.form == FORM_SGL and not self.q.can_sgl:
            raise DmaValueError("the controller takes no SGL", argument="form", value="sgl")
        most = NVME_PAGE << self.identity["mdts"] if self.identity["mdts"] else 8 << 20
        self.max_bytes = min(8 << 20, most, self.device.opt_mapping_size)
        self.limits = QueueLimits.of(self.device, min(self.max_bytes // NVME_PAGE + 1, 256))

    # ---- requests

    def submit(self, requests):
        """Hand over a Bio, a Request, or an iterable of them; an Io, which may be done later. Bios are split as the block
        layer splits them; a Request must fit one command already."""
        cdef Io io = Io.__new__(Io, self)
        cdef io_req *r
        cdef uint32_t i
        cdef Mappable part
        self.must_be_up()
        whole = [requests] if isinstance(requests, Mappable) else requests
        parts = [p for request in whole for p in self._parts(request)]
        io.requests = parts
        io.list_.n = len(parts)
        io.list_.reqs = <io_req *>calloc(max(1, io.list_.n), sizeof(io_req))
        if io.list_.reqs == NULL:
            raise MemoryError("no memory for the commands")
        for i in range(io.list_.n):
            part = parts[i]
            r = &io.list_.reqs[i]
            r.parent, r.data = &io.list_, &part.rq
            r.lba, r.blocks = part.sector * 512 // self.block_size, part.rq.total // self.block_size
            r.opcode = NVME_WRITE if part.op == "write" else NVME_READ
            if part.integrity is not None:
                r.meta = &(<Mappable>part.integrity).rq
        return self.enqueue(io)

    cdef int must_be_up(self) except -1:
        if not self.up or self.dead:
            raise StateError("the controller is dead" if self.up else "it was closed", argument="self", value=self)
        return 0

    cdef Io enqueue(self, Io io):
        self.must_be_up()
        skip_issued(&self.q)
        self.live = [other for other in self.live if not other.done]
        if io.list_.n:
            self.live.append(io)
            if self.q.first == NULL:
                self.q.first = &io.list_
            else:
                self.q.last.after = &io.list_
            self.q.last = &io.list_
            issue_more(&self.q)
        return io

    def _parts(self, request):
        if not isinstance(request, (Bio, Request)):
            raise AddressTypeError("a Bio or a Request is wanted", argument="requests", value=request)
        unit, metas = self.block_size, 0 if request.integrity is None else request.integrity.total
        if request.total % unit or request.sector * 512 % unit or not request.total:
            raise DmaValueError(f"whole blocks of {unit} bytes", argument="requests", value=request)
        if metas != request.total // unit * self.metadata_size:
            raise DmaValueError(f"integrity of {self.metadata_size} bytes for each block", argument="requests",
                                value=request)
        if isinstance(request, Request):
            if request.total > MOST_BLOCKS * unit:
                raise DmaValueError(f"at most {MOST_BLOCKS} blocks: one command", argument="requests", value=request)
            return [request]
        return request.split(self.limits, max_bytes=self.max_bytes, block_size=unit)

    def run(self, requests):
        """Submit and wait: the Io, done. Raises its first error."""
        io = self.submit(requests)
        io.wait()
        return io

    def poll(self):
        """Let the controller work once, take what completed and issue what waits; completions taken. Never waits."""
        cdef uint32_t got
        self.must_be_up()
        with nogil:
            self.q.regs.relax(self.q.regs.priv)
            got = reap(&self.q)
            issue_more(&self.q)
        return got

    def repeat(self, Io io not None, long times=1):
        """Run a finished Io's commands again, ``times`` times over, without making them anew."""
        cdef long _round
        self.must_be_up()
        for _round in range(times):
            if not io.done or io.driver is not self:
                raise StateError("an Io of this driver's that is done", argument="io", value=io)
            PyErr_CheckSignals()
            io.list_.next = io.list_.done = 0
            io.list_.after = NULL
            self.enqueue(io)
            self.drive(io)

    cdef int drive(self, Io io) except -1:
        cdef int rc = 0, attempts = 0
        while not io.done:
            self.must_be_up()
            with nogil:
                rc = drive(&self.q, &io.list_)
            if rc:
                attempts += 1
                self.recover(attempts > self.q.tries)
        skip_issued(&self.q)
        return 0

    # the controller died: start it anew, and try what was in flight again (nvme_reset_work)
    cdef recover(self, bint give_up):
        cdef uint32_t i
        cdef uint32_t tries = self.q.tries
        self.q.resets += 1
        dma_writel(self.q.regs, NVME_CC, 0)
        self.wait_ready(0)
        if give_up:
            self.q.tries = 0
        for i in range(self.queue_depth):
            if self.q.slots[i].req != NULL:
                retire(&self.q, i, INTERNAL)
        self.q.tries = tries
        try:
            self.start()
        except DmaError:
            if give_up:
                self.bury()

    # nothing brings it back: whatever waits has failed (nvme_mark_namespaces_dead)
    cdef bury(self):
        self.dead = True
        while self.q.nagain:
            self.q.nagain -= 1
            finish(self.q.again[self.q.nagain], INTERNAL, 0)
        skip_issued(&self.q)
        while self.q.first != NULL:
            finish(&self.q.first.reqs[self.q.first.next], INTERNAL, 0)
            self.q.first.next += 1
            skip_issued(&self.q)

    # one command that is no read or write
    cdef Io one(self, uint8_t opcode, uint64_t lba, uint32_t blocks, Bio data):
        cdef Io io = Io.__new__(Io, self)
        io.requests, io.list_.n = [data], 1
        io.list_.reqs = <io_req *>calloc(1, sizeof(io_req))
        if io.list_.reqs == NULL:
            raise MemoryError("no memory for the command")
        io.list_.reqs[0].parent, io.list_.reqs[0].opcode = &io.list_, opcode
        io.list_.reqs[0].lba, io.list_.reqs[0].blocks = lba, blocks
        if data is not None:
            io.list_.reqs[0].data = &data.rq
        return self.enqueue(io)

    def command(self, opcode, lba=0, blocks=1):
        """One I/O command without data: NVMe opcode, first block, blocks (1 to 65536). Raises NvmeError."""
        self.one(_number(opcode, "opcode", 0, 255), _number(lba, "lba", 0, 2**64 - 1),
                 _number(blocks, "blocks", 1, MOST_BLOCKS), None).wait()

    def flush(self):
        """Make what was written durable (Flush)."""
        self.command(NVME_FLUSH)

    def write_zeroes(self, lba, blocks):
        """Blocks become zeros without a transfer (Write Zeroes): 1 to 65536 of them."""
        self.command(NVME_WRITE_ZEROES, lba, blocks)

    def deallocate(self, ranges):
        """Blocks that hold nothing any more (Dataset Management): up to 256 (lba, blocks); they read as zeros."""
        ranges = [(_number(lba, "lba", 0, 2**64 - 1), _number(blocks, "blocks", 0, 2**32 - 1)) for lba, blocks in ranges]
        if not 1 <= len(ranges) <= 256:
            raise DmaValueError("1 to 256 ranges", argument="ranges", value=len(ranges))
        with self.device.alloc_coherent(NVME_PAGE) as page:
            with memoryview(page) as view:
                for i, (lba, blocks) in enumerate(ranges):
                    view[16 * i + 4 : 16 * i + 16] = blocks.to_bytes(4, "little") + lba.to_bytes(8, "little")
            request = Bio([(page.phys, 16 * len(ranges))], op="write")
            # cdw10: ranges, less one; cdw11: deallocate
            self.one(NVME_DSM, (len(ranges) - 1) | 4 << 32, 1, request).wait()

    # ---- what it did

    @property
    def in_flight(self):
        """Commands that the controller has."""
        return self.q.inflight

    @property
    def told(self):
        """How the last request was mapped: dict of ``case``, ``layout``, ``segments`` and the ``form`` rule (see
        descriptors.FORM_RULES)."""
        layout = rules.LAYOUTS[self.q.layout]
        return dict(case=rules.case_of(layout, self.q.rules, self.q.nsegs), layout=layout, segments=self.q.nsegs,
                    form=FORM_RULES[self.q.why][0])

    def counters(self):
        """Commands issued, by form of their data, retries, resets of the controller, descriptor pages taken,
        commands whose descriptors stood in themselves, and pieces of the descriptor pools that nobody holds."""
        return dict(commands=self.q.commands, prp=self.q.prps, sgl=self.q.sgls, retries=self.q.retries,
                    resets=self.q.resets, list_pages=self.q.list_pages, inline=self.q.inlined,
                    pieces_free=self.q.small.left + self.q.large.left)

    def close(self):
        """Stop the controller, unmap everything and give the memory back. StateError while requests are in flight."""
        if not self.up:
            return
        if any(not io.done for io in self.live):
            raise StateError("requests are in flight: wait for them", argument="self", value=self)
        if not self.dead:
            self.admin(NVME_ADMIN_DELETE_SQ, self.q.id)
            self.admin(NVME_ADMIN_DELETE_CQ, self.q.id)
        self.stop()

    # take the memory away from the controller: it must not write into what is somebody else's then
    cdef void silence(self) noexcept:
        cdef uint32_t i
        self.up = False
        dma_writel(self.q.regs, NVME_CC, 0)
        for i in range(self.queue_depth):
            if self.q.slots[i].req != NULL:
                let_go(&self.q, &self.q.slots[i], self.q.slots[i].req)
                self.q.slots[i].req = NULL

    cdef stop(self):
        self.silence()
        for memory in (self.admin_sq, self.admin_cq, self.sq, self.cq, self.small, self.large):
            memory.free()

    def __enter__(self):
        self.must_be_up()
        return self

    def __exit__(self, kind, error, traceback):
        if self.up:  # after an error what is in flight is given up
            at_end(error, self.close if error is None else self.stop)

    def __del__(self):
        if self.up:  # while all that it reaches is whole
            self.silence()

    def __dealloc__(self):
        free(self.q.slots)
        free(self.q.cids)
        free(self.q.again)
        free(self.q.small.free_)
        free(self.q.large.free_)

    def __repr__(self):
        return f"Nvme({self.blocks} blocks of {self.block_size}, depth {self.queue_depth}{'' if self.up else ', closed'})"
