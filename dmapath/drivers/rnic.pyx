# cython: language_level=3
"""The simulated HCA's driver: protection domains, memory regions, queue pairs, completion queues, with the names and the
manners of ``dmapath.verbs``, so that what is written for one runs on the other."""
import weakref
from collections import deque

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from dmapath._clock cimport end_of, now_ns
from dmapath._core cimport lock_acquire, lock_release
from dmapath._rnic cimport (
    RNIC_CMP_SWP, RNIC_COMMAND, RNIC_CQ_BELLS, RNIC_CREATE_CQ, RNIC_CREATE_MKEY, RNIC_CREATE_QP, RNIC_DESTROY_CQ,
    RNIC_DESTROY_MKEY, RNIC_DESTROY_QP, RNIC_ERROR, RNIC_FETCH_ADD, RNIC_GO, RNIC_IMM, RNIC_INIT, RNIC_INLINE, RNIC_INLINED,
    RNIC_LOCAL_INV, RNIC_MAX_MESSAGE, RNIC_MKEY_FREE, RNIC_MODIFY_QP, RNIC_PAGE, RNIC_READ, RNIC_REG_MR, RNIC_RESET,
    RNIC_RQ_BELLS, RNIC_RTR, RNIC_RTS, RNIC_SEND, RNIC_SEND_INV, RNIC_SGES, RNIC_SIGNALED, RNIC_SQ_BELLS, RNIC_STRIDE,
    RNIC_WC_HAS_IMM, RNIC_WC_INVALIDATED, RNIC_WC_RECV, RNIC_WRITE, RNIC_WRITE_IMM, rnic_command, rnic_cqe, rnic_wqe,
)
from dmapath.abi cimport dma_writeq
from dmapath.device cimport Device
from dmapath.mmio cimport registers_of

from dmapath.addr import DmaAddr, as_bits, as_integer, as_length, as_remote, as_seconds
from dmapath.errors import DmaValueError, NoMemoryError, StateError, VerbsError, at_end, error_for
from dmapath.mr import LOCAL_WRITE, MemoryRegion, check_access, dma_blocks, sg_to_pages
from dmapath.rdma import LOCAL_OPCODES, REMOTE_ALL, Completion, blame, cut, entries_of

OPCODES = {"send": RNIC_SEND, "send_imm": RNIC_SEND, "send_inv": RNIC_SEND_INV, "write": RNIC_WRITE,
           "write_imm": RNIC_WRITE_IMM, "read": RNIC_READ}
_NAMES = {RNIC_SEND: "send", RNIC_SEND_INV: "send_inv", RNIC_WRITE: "write", RNIC_WRITE_IMM: "write_imm", RNIC_READ: "read",
          RNIC_CMP_SWP: "cmp_swp", RNIC_FETCH_ADD: "fetch_add", RNIC_LOCAL_INV: "local_inv", RNIC_REG_MR: "reg_mr",
          RNIC_WC_RECV: "recv", RNIC_WC_RECV + 1: "recv_write_imm"}
cdef uint64_t RECV_BIT = 1ULL << 63  # in an id: a receive's


# one command, from its start to its answer: 0 or -errno, and the result in it
cdef int run_command(rnic_port *port, rnic_command *c) noexcept nogil:
    cdef int rc
    lock_acquire(&port.lock)
    c.status = -1
    memcpy(port.page, c, sizeof(rnic_command))
    dma_writeq(port.regs, RNIC_GO, 1)
    c.status, c.result = port.page.status, port.page.result
    lock_release(&port.lock)
    rc = -c.status if c.status >= 0 else -5  # no answer: the page is out of its reach
    return rc


@cython.no_gc_clear  # what is made in it gives itself back through it
cdef class Context:
    """An HCA that is driven: ``hca`` has a capsule "dmapath.mmio.v1" in its attribute ``mmio``; ``device`` is how it reaches
    memory."""

    def __cinit__(self, hca, Device device not None):
        self.port.regs = registers_of(hca, "hca")
        self.hca, self.device, self.next_pd = hca, device, 1
        self.attr = dict(max_sge=RNIC_SGES, max_sge_rd=RNIC_SGES, max_msg_sz=RNIC_MAX_MESSAGE)
        self.page = device.alloc_coherent(RNIC_PAGE)
        self.port.page = <rnic_command *>self.page.host
        dma_writeq(self.port.regs, RNIC_COMMAND, self.page.addr_.v)

    cdef uint32_t command(self, rnic_command *c, what) except? 0xffffffff:
        cdef int rc
        self.must_live()
        with nogil:
            rc = run_command(&self.port, c)
        if rc:
            raise error_for(-rc, f"the HCA refuses to {what}", "hca", self.hca)
        return c.result

    cdef destroy(self, uint32_t op, uint32_t number, what):
        cdef rnic_command c
        memset(&c, 0, sizeof(c))
        c.op, c.id = op, number
        self.command(&c, f"destroy {what}")

    def close(self):
        """Give its memory back. StateError while anything that was made in it lives."""
        if self.children:
            raise StateError(f"{self.children} objects that were made in it live", argument="self", value=self)
        if self.page.live:
            self.page.free()

    cdef int must_live(self) except -1:
        if not self.page.live:
            raise StateError("the context was closed", argument="context", value=self)
        return 0

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)


@cython.no_gc_clear  # keys are given back through it
cdef class Pd:
    """A protection domain: keys and queue pairs of one go together."""

    def __cinit__(self, Context context not None):
        context.must_live()
        self.context, self.number = context, context.next_pd
        context.next_pd += 1


# (address, bytes, key) of a part of `size` bytes at `addr`
cdef tuple part(addr, size, offset, length, key):
    offset = as_length(offset, "offset", least=0)
    length = size - offset if length is None else as_length(length, "length", least=0)
    if offset > size or length > size - offset:
        raise DmaValueError(f"within the region's {size} bytes", argument="offset", value=offset)
    return int(addr) + offset, length, key


@cython.no_gc_clear
cdef class Mr:
    """Bytes [offset, offset + length) of a PhysMemory, registered: pages mapped by the HCA's Device, their addresses in a
    translation table that the HCA reads. ``iova``: the address of its first byte for work requests; default: the offset.

    Raises as ``Device.map`` does (a region must be coherent: no bouncing), DmaValueError (EINVAL) and NoMemoryError.
    """

    def __cinit__(self, Pd pd not None, memory, offset=0, length=None, *, iova=None, access=LOCAL_WRITE):
        cdef rnic_command c
        cdef uint64_t *table
        offset = as_length(offset, "offset", least=0)
        length = len(memory) - offset if length is None else length
        region = MemoryRegion.from_memory(memory, offset, length, iova=iova, access=access)
        self.pd, self.access, self.memory = pd, check_access(access), memory
        self.addr, self.length = DmaAddr(int(region.iova)), region.length
        self.mapping = pd.context.device.map(region)
        try:
            if region.best_page_size(self.mapping.segments, RNIC_PAGE) == 0:
                raise DmaValueError("where in its page the memory begins (ib_umem_find_best_pgsz)", argument="iova",
                                    value=int(region.iova))
            blocks = dma_blocks(self.mapping.segments, region.offset, region.length, int(region.iova), RNIC_PAGE)
            self.table = pd.context.device.alloc_coherent(8 * len(blocks))
            table = <uint64_t *>self.table.host
            for i, at in enumerate(blocks):
                table[i] = at
            memset(&c, 0, sizeof(c))
            c.op, c.mkey.iova, c.mkey.length, c.mkey.mtt = RNIC_CREATE_MKEY, int(self.addr), self.length, self.table.addr_.v
            c.mkey.pd, c.mkey.access, c.mkey.pages = pd.number, access & 15, len(blocks)
            self.lkey = self.rkey = pd.context.command(&c, "create a key")
        except BaseException:
            self.mapping.unmap()
            if self.table is not None:
                self.table.free()
            raise
        self.live = True
        pd.context.children += 1

    def segment(self, offset=0, length=None):
        """(address, bytes, lkey) of a part of it."""
        self.must_live()
        return part(self.addr, self.length, offset, length, self.lkey)

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("deregistered already", argument="self", value=self)
        return 0

    def dereg(self):
        """Take the key back and unmap. StateError when done already."""
        self.must_live()
        self.release()

    def release(self):
        """As ``dereg``, where it is live."""
        if self.live:
            self.live = False
            self.pd.context.children -= 1
            self.pd.context.destroy(RNIC_DESTROY_MKEY, self.lkey, "a key")
            self.mapping.unmap()
            self.table.free()

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.release)

    def __repr__(self):
        return f"Mr({self.length} bytes at {int(self.addr):#x}, key {self.lkey:#x})"


@cython.no_gc_clear
cdef class FastMr:
    """A key without memory, for fast registration: ``Qp.reg_mr`` gives it mapped segments, ``Qp.local_inv`` takes them
    away. It holds at most ``max_pages`` pages (1 to 512)."""

    def __cinit__(self, Pd pd not None, max_pages=256):
        cdef rnic_command c
        self.pd, self.max_pages = pd, as_integer(max_pages, "max_pages", least=1, last=512)
        self.table = pd.context.device.alloc_coherent(8 * self.max_pages)
        self.pages = <uint64_t *>self.table.host
        memset(&c, 0, sizeof(c))
        c.op, c.mkey.pd, c.mkey.pages, c.mkey.flags = RNIC_CREATE_MKEY, pd.number, self.max_pages, RNIC_MKEY_FREE
        try:
            self.key = pd.context.command(&c, "create a key")
        except BaseException:
            self.table.free()
            raise
        self.live = True
        self.addr, self.length = DmaAddr(0), 0
        pd.context.children += 1

    @property
    def lkey(self):
        """Its key, for local use."""
        return self.key

    @property
    def rkey(self):
        """Its key, for the remote side."""
        return self.key

    def segment(self, offset=0, length=None):
        """(address, bytes, lkey) of a part of what it holds now."""
        self.must_live()
        return part(self.addr, self.length, offset, length, self.key)

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("freed already", argument="mr", value=self)
        return 0

    def free(self):
        """Take the key back."""
        if self.live:
            self.live = False
            self.pd.context.children -= 1
            self.pd.context.destroy(RNIC_DESTROY_MKEY, self.key, "a key")
            self.table.free()

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.free)


@cython.no_gc_clear
cdef class Cq:
    """A completion queue of ``cqe`` entries in DMA memory. An overflow breaks it and its queue pairs."""

    def __cinit__(self, Context context not None, cqe=256):
        cdef rnic_command c
        self.context, self.cqe, self.qps = context, as_integer(cqe, "cqe", least=1, last=65536), {}
        self.ring = context.device.alloc_coherent(self.cqe * sizeof(rnic_cqe))
        memset(&c, 0, sizeof(c))
        c.op, c.cq.addr, c.cq.entries = RNIC_CREATE_CQ, self.ring.addr_.v, self.cqe
        try:
            self.number = context.command(&c, "create a completion queue")
        except BaseException:
            self.ring.free()
            raise
        self.live = True
        context.children += 1

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("the completion queue was closed", argument="cq", value=self)
        return 0

    # completions that are there, at most n
    cdef list fetch(self, int n):
        cdef rnic_cqe *e
        cdef list out = []
        cdef Qp qp
        self.must_live()
        while len(out) < n:
            e = <rnic_cqe *>self.ring.host + self.head % self.cqe
            if e.owner != (not (self.head // self.cqe & 1)) or e.qpn == 0:
                break
            self.head += 1
            ref = self.qps.get(e.qpn)
            qp = None if ref is None else ref()
            if qp is not None:
                out.append((qp, qp.seen(e)))
        dma_writeq(self.context.port.regs, RNIC_CQ_BELLS + 8 * self.number, self.head)
        return out

    # the same, waiting for the first of them until `end` (_clock.end_of)
    cdef list wait_for(self, int n, uint64_t end):
        while True:
            got = self.fetch(n)
            if got or (self.context.port.regs.relax(self.context.port.regs.priv) == 0 and now_ns() > end):
                return got

    # leave what comes until `end` with the queue pairs it belongs to; how many came
    cdef int dispatch(self, uint64_t end) except -1:
        cdef Qp qp
        got = self.wait_for(256, end)
        for qp, done in got:
            if done.opcode in ("recv", "recv_write_imm"):
                qp.arrivals.append(done)
            elif not done.ok:
                qp.failures.setdefault(done.request, done)
        return len(got)

    def poll(self, n=64, timeout=0.0):
        """Completions in order: list of Completion, at most n; waits ``timeout`` seconds for the first."""
        return [done for _, done in self.wait_for(as_integer(n, "n", least=1, last=2**31 - 1), end_of(as_seconds(timeout)))]

    def close(self):
        """Destroy it. DmaValueError (EBUSY) while a queue pair uses it."""
        if self.live:
            self.context.destroy(RNIC_DESTROY_CQ, self.number, "a completion queue that queue pairs use")
            self.live = False
            self.context.children -= 1
            self.ring.free()

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)


@cython.no_gc_clear
cdef class Qp:
    """A reliable connected queue pair; ``connect`` it before work. The calls are those of ``dmapath.verbs.Qp``."""

    def __cinit__(self, Pd pd not None, Cq cq=None, *, Cq recv_cq=None, max_send_wr=128, max_recv_wr=128):
        cdef rnic_command c
        self.pd, self.depth = pd, as_integer(max_send_wr, "max_send_wr", least=1, last=16384)
        self.recv_depth = as_integer(max_recv_wr, "max_recv_wr", least=1, last=16384)
        self.own_cq = cq is None
        self.send_cq = Cq(pd.context, self.depth + self.recv_depth) if cq is None else cq
        self.recv_cq = self.send_cq if recv_cq is None else recv_cq
        self.send_cq.must_live()
        self.recv_cq.must_live()
        self.max_sge, self.max_inline = RNIC_SGES, RNIC_INLINE
        self.first, self.failures, self.arrivals = [0] * self.depth, {}, deque()
        self.state = "reset"
        self.sq = pd.context.device.alloc_coherent(self.depth * RNIC_STRIDE)
        self.rq = pd.context.device.alloc_coherent(self.recv_depth * RNIC_STRIDE)
        memset(&c, 0, sizeof(c))
        c.op, c.qp.sq, c.qp.rq, c.qp.sq_entries, c.qp.rq_entries = (
            RNIC_CREATE_QP, self.sq.addr_.v, self.rq.addr_.v, self.depth, self.recv_depth)
        c.qp.pd, c.qp.send_cq, c.qp.recv_cq = pd.number, self.send_cq.number, self.recv_cq.number
        try:
            self.qp_num = pd.context.command(&c, "create a queue pair")
        except BaseException:
            self.sq.free()
            self.rq.free()
            raise
        self.live = True
        pd.context.children += 1
        for queue in (self.send_cq, self.recv_cq):
            (<Cq>queue).qps[self.qp_num] = weakref.ref(self)

    cdef int must_live(self) except -1:
        if not self.live:
            raise StateError("the queue pair was closed", argument="qp", value=self)
        return 0

    cdef to_state(self, uint32_t state, uint32_t remote, uint32_t access, uint32_t rnr_retry, str name):
        cdef rnic_command c
        self.must_live()
        memset(&c, 0, sizeof(c))
        c.op, c.id, c.modify.state, c.modify.remote = RNIC_MODIFY_QP, self.qp_num, state, remote
        c.modify.access, c.modify.rnr_retry = access, rnr_retry
        self.pd.context.command(&c, f"bring a queue pair from {self.state} to {name}")
        self.state = name

    def connect(self, remote, *, access=REMOTE_ALL | LOCAL_WRITE, rnr_retry=7):
        """Connect to the queue pair numbered ``remote`` at the other end of the wire; what it may ask for is ``access``.
        ``rnr_retry``: how often a send is tried while nothing is posted to receive it; 7: for ever."""
        remote, access = as_bits(remote, "remote", 24), as_bits(access, "access", 32)
        rnr_retry = as_bits(rnr_retry, "rnr_retry", 3)
        self.must_live()
        self.how = dict(access=access, rnr_retry=rnr_retry)
        self.remote = remote
        self.to_state(RNIC_INIT, 0, access, 0, "init")
        self.to_state(RNIC_RTR, remote, 0, 0, "rtr")
        self.to_state(RNIC_RTS, 0, 0, rnr_retry, "rts")

    def fail(self):
        """Bring it into the error state: what is outstanding is flushed."""
        self.to_state(RNIC_ERROR, 0, 0, 0, "error")

    def reset(self):
        """Forget everything that was posted; ``connect`` again."""
        self.to_state(RNIC_RESET, 0, 0, 0, "reset")
        self.head = self.tail = self.rhead = self.rtail = 0
        self.failures.clear()
        self.arrivals.clear()

    def recover(self):
        """Reset it and connect it as before."""
        self.must_live()
        while self.send_cq.poll(256) or (self.recv_cq is not self.send_cq and self.recv_cq.poll(256)):
            pass  # completions of before must not be taken for those to come
        self.reset()
        if self.remote is not None:
            self.connect(self.remote, **self.how)

    @property
    def outstanding(self):
        """Work requests posted to send and not complete."""
        self.must_live()
        return self.head - self.tail

    def _room(self, n):
        self.must_live()
        if self.head - self.tail + n > self.depth:
            raise NoMemoryError(f"the send queue holds {self.depth}, {self.head - self.tail} are outstanding and {n} more "
                                "are wanted: poll completions first", argument="qp", value=self)

    cdef rnic_wqe *take(self, uint32_t op, uint64_t first) except NULL:
        cdef uint64_t at = self.head % self.depth
        cdef rnic_wqe *w = <rnic_wqe *>self.sq.host + at
        if self.state == "reset":
            raise StateError("the queue pair is not connected", argument="qp", value=self)
        memset(w, 0, sizeof(rnic_wqe))
        w.id, w.op = self.head, <uint8_t>op
        self.first[at] = first
        self.head += 1
        return w

    cdef submit(self):
        dma_writeq(self.pd.context.port.regs, RNIC_SQ_BELLS + 8 * self.qp_num, self.head)

    def post(self, opcode, segments, remote_addr=0, rkey=0, *, imm=0, inline=False):
        """Post one request over segments and return its id; ``wait`` for it, or poll.

        ``opcode`` is "write", "read", "write_imm", "send", "send_imm" or "send_inv" (``imm`` is the key that the receiver
        loses); ``segments`` a Mapping, an Mr, Segments or (address, bytes, lkey), where key 0 means bus addresses. The
        request becomes as few work requests as fit; the last asks for a completion.
        """
        cdef rnic_wqe *w = NULL
        cdef uint64_t first = self.head, at = as_remote(remote_addr)
        cdef uint32_t i, key_there = as_bits(rkey, "rkey", 32), now = as_bits(imm, "imm", 32)
        self.must_live()
        if opcode not in OPCODES:
            raise DmaValueError(f"one of {', '.join(OPCODES)}", argument="opcode", value=opcode)
        if inline:
            data = b"".join(bytes(s) for s in segments) if not isinstance(segments, (bytes, bytearray)) else bytes(segments)
            if len(data) > RNIC_INLINE or opcode == "read":
                raise DmaValueError(f"at most {RNIC_INLINE} bytes go inline, and none of a read", argument="inline",
                                    value=len(data))
            groups = [[]]
        else:
            groups = cut(entries_of(segments, keyless=True), RNIC_SGES, RNIC_MAX_MESSAGE)
        if len(groups) > 1 and opcode not in ("write", "read"):
            raise DmaValueError(f"one message of at most {RNIC_SGES} segments and {RNIC_MAX_MESSAGE} bytes",
                                argument="segments", value=len(groups))
        self._room(len(groups))
        for group in groups:
            w = self.take(OPCODES[opcode], first)
            w.remote_addr, w.rkey, w.imm = at, key_there, now
            if opcode == "send_imm":
                w.flags |= RNIC_IMM
            if inline:
                w.flags |= RNIC_INLINED
                w.inline_len = len(data)
                memcpy(w.data, <const char *>data, len(data))
            for i, (addr, n, key) in enumerate(group):
                w.sge[i].addr, w.sge[i].len, w.sge[i].key = addr, n, key
                w.nsge += 1
                at += <uint64_t>n
        w.flags |= RNIC_SIGNALED
        self.submit()
        return first

    def write(self, segments, remote_addr, rkey):
        """RDMA WRITE: ``post`` and ``wait``."""
        self.wait(self.post("write", segments, remote_addr, rkey))

    def read(self, segments, remote_addr, rkey):
        """RDMA READ: ``post`` and ``wait``."""
        self.wait(self.post("read", segments, remote_addr, rkey))

    def _atomic(self, op, segment, remote_addr, rkey, compare, swap, argument="swap"):
        cdef rnic_wqe *w
        cdef uint64_t at = as_remote(remote_addr), c = as_bits(compare, "compare", 64)
        cdef uint64_t s = as_bits(swap, argument, 64)
        cdef uint32_t key_there = as_bits(rkey, "rkey", 32)
        ((addr, n, key),) = entries_of([segment] if isinstance(segment, tuple) else segment, keyless=True)
        self._room(1)
        w = self.take(op, self.head)
        w.remote_addr, w.rkey, w.compare, w.swap = at, key_there, c, s
        w.sge[0].addr, w.sge[0].len, w.sge[0].key, w.nsge = addr, n, key, 1
        w.flags = RNIC_SIGNALED
        self.submit()
        return self.head - 1

    def fetch_add(self, segment, remote_addr, rkey, add):
        """Add to 8 remote bytes (8-byte aligned); what they were goes to the segment. Posts, and returns the id."""
        return self._atomic(RNIC_FETCH_ADD, segment, remote_addr, rkey, 0, add, "add")

    def cmp_swp(self, segment, remote_addr, rkey, compare, swap):
        """Swap 8 remote bytes where they equal ``compare``; what they were goes to the segment. Posts, returns the id."""
        return self._atomic(RNIC_CMP_SWP, segment, remote_addr, rkey, compare, swap)

    def reg_mr(self, FastMr mr not None, segments, *, access=LOCAL_WRITE, sg_offset=0):
        """Fast registration: the key names mapped segments from this work request on, under a fresh low byte. Posts, and
        returns (id, segments taken): fewer than given where a gap or the capacity ends it (ib_map_mr_sg)."""
        cdef rnic_wqe *w
        cdef uint32_t rights = as_bits(access, "access", 32)
        mr.must_live()
        self.must_live()
        taken, addr, length, pages, _ = sg_to_pages(list(segments), page_size=RNIC_PAGE, sg_offset=sg_offset,
                                                    max_pages=mr.max_pages)
        if not taken:
            raise DmaValueError(f"one segment at least within {mr.max_pages} pages", argument="segments", value=segments)
        self._room(1)
        for i, page in enumerate(pages):
            mr.pages[i] = page
        w = self.take(RNIC_REG_MR, self.head)
        mr.key = (mr.key & ~255) | ((mr.key + 1) & 255)  # ib_inc_rkey: old uses of the key must fail
        mr.addr, mr.length = addr, length
        w.remote_addr, w.compare, w.swap, w.rkey, w.imm = int(addr), length, mr.table.addr_.v, mr.key, rights
        w.flags = RNIC_SIGNALED
        self.submit()
        return self.head - 1, taken

    def local_inv(self, rkey):
        """The key names nothing any more. Posts, and returns the id."""
        cdef rnic_wqe *w
        cdef uint32_t key = as_bits(rkey, "rkey", 32)
        self._room(1)
        w = self.take(RNIC_LOCAL_INV, self.head)
        w.imm, w.flags = key, RNIC_SIGNALED
        self.submit()
        return self.head - 1

    def recv(self, segments):
        """Post one receive; its id. ``arrived`` tells when a message is there."""
        cdef rnic_wqe *w
        cdef uint32_t i
        self.must_live()
        entries, *more = cut(entries_of(segments, keyless=True), RNIC_SGES, RNIC_MAX_MESSAGE)
        if more:
            raise DmaValueError(f"at most {RNIC_SGES} segments", argument="segments", value=len(more) + 1)
        if self.rhead - self.rtail == self.recv_depth:
            raise NoMemoryError(f"the receive queue holds {self.recv_depth}", argument="qp", value=self)
        w = <rnic_wqe *>self.rq.host + self.rhead % self.recv_depth
        memset(w, 0, sizeof(rnic_wqe))
        w.id, w.nsge = self.rhead | RECV_BIT, len(entries)
        for i, (addr, n, key) in enumerate(entries):
            w.sge[i].addr, w.sge[i].len, w.sge[i].key = addr, n, key
        self.rhead += 1
        dma_writeq(self.pd.context.port.regs, RNIC_RQ_BELLS + 8 * self.qp_num, self.rhead)
        return self.rhead - 1

    # a completion of this queue pair, as its users see it
    cdef object seen(self, const rnic_cqe *e):
        cdef uint64_t seq = e.id & ~RECV_BIT, first
        cdef rnic_wqe *w
        name = _NAMES.get(e.op, str(e.op))
        imm = e.imm if e.flags & (RNIC_WC_HAS_IMM | RNIC_WC_INVALIDATED) else None
        if e.status:
            self.state = "error"
        if e.id & RECV_BIT:
            self.rtail = seq + 1
            failure = {**blame(e.status, "recv"), "length": e.len} if e.status else None
            return Completion(seq, e.status, name, e.len, imm, self.qp_num, failure)
        self.tail = seq + 1
        first = self.first[seq % self.depth]
        if not e.status:
            return Completion(first, 0, name, e.len, imm, self.qp_num, None)
        w = <rnic_wqe *>self.sq.host + seq % self.depth
        entries = [] if w.flags & RNIC_INLINED else [(w.sge[i].addr, w.sge[i].len, w.sge[i].key) for i in range(w.nsge)]
        length = w.inline_len if w.flags & RNIC_INLINED else sum(n for _, n, _ in entries)
        key = (w.imm or w.rkey) if name in LOCAL_OPCODES else w.rkey
        failure = blame(e.status, name, segment=seq - first, entries=entries, address=w.remote_addr, key=key)
        return Completion(first, e.status, name, length, None, self.qp_num, {**failure, "length": length})

    def wait(self, request, timeout=10.0):
        """Wait until a posted request is complete. Raises CompletionError where it, or one before it, failed, and VerbsError
        (ETIMEDOUT) when it is not within ``timeout`` seconds."""
        cdef uint64_t want = as_bits(request, "request", 64), last = want, end = end_of(as_seconds(timeout))
        self.must_live()
        if want >= self.head:
            raise DmaValueError("the id of a request that was posted", argument="request", value=request)
        while last + 1 < self.head and self.first[(last + 1) % self.depth] == want:
            last += 1
        while self.tail <= last:
            if self.send_cq.dispatch(end) == 0 or self.tail <= last and now_ns() > end:
                raise VerbsError(f"request {request} did not complete within {timeout} s", errno=110, argument="request",
                                 value=request)
        for seq in sorted(self.failures):
            if seq <= want:
                raise self.failures[seq].error()

    def arrived(self, timeout=10.0):
        """The next completion of a receive: a Completion. CompletionError where it failed; VerbsError (ETIMEDOUT) when
        nothing came in ``timeout`` seconds."""
        cdef uint64_t end = end_of(as_seconds(timeout))
        self.must_live()
        while not self.arrivals:
            if self.recv_cq.dispatch(end) == 0 or not self.arrivals and now_ns() > end:
                raise VerbsError(f"nothing was received within {timeout} s", errno=110, argument="timeout", value=timeout)
        done = self.arrivals.popleft()
        if not done.ok:
            raise done.error()
        return done

    def close(self):
        """Destroy it; what was outstanding is lost."""
        if not self.live:
            return
        self.pd.context.destroy(RNIC_DESTROY_QP, self.qp_num, "a queue pair")
        self.live = False
        self.pd.context.children -= 1
        for queue in (self.send_cq, self.recv_cq):
            (<Cq>queue).qps.pop(self.qp_num, None)
        self.sq.free()
        self.rq.free()
        if self.own_cq:
            self.send_cq.close()

    def __enter__(self):
        self.must_live()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)


def loopback(Pd pd not None, **options):
    """Two connected queue pairs on one HCA whose wire leads back to itself."""
    pd.context.hca.connect(pd.context.hca)
    a, b = Qp(pd, **options), Qp(pd, **options)
    a.connect(b.qp_num)
    b.connect(a.qp_num)
    return a, b
