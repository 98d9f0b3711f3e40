# cython: language_level=3
"""Queue pairs and completions over libibverbs: opened here, or the user's own pyverbs objects. No GIL on the data path.

Queues are rings: work requests and their entries are built where they stay until they complete, so that a completion with
an error can name its request, and a region that is still named by one is not deregistered.
"""
import json
import weakref
from collections import deque
from dataclasses import dataclass

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EIO, ETIMEDOUT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dmapath._clock cimport end_of, now_ns
from dmapath.verbs.bridge cimport as_cq, as_qp, pointer
from dmapath.verbs.ibv cimport (
    IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_CAP, IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC,
    IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT,
    IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_ERR, IBV_QPS_INIT, IBV_QPS_RESET,
    IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC, IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WC_SUCCESS, IBV_WC_WITH_IMM,
    IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ,
    IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, ibv_bind_mw, ibv_context, ibv_cq,
    ibv_create_cq, ibv_create_qp, ibv_destroy_cq, ibv_destroy_qp, ibv_inc_rkey, ibv_modify_qp, ibv_mr, ibv_mtu, ibv_mw_bind,
    ibv_pd, ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_state, ibv_query_qp,
    ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status, ibv_wc_status_str, ibv_wr_opcode, wc_imm, wr_atomic, wr_bind,
    wr_imm, wr_remote, wr_remote_addr, wr_rkey,
)
from dmapath.verbs.resources cimport Context, Mr, Mw, Pd, failed

from dmapath import rdma
from dmapath.addr import as_dma, as_integer, as_length, as_seconds
from dmapath.errors import (
    at_end,
    AddressTypeError, DmaValueError, NoMemoryError, NotSupportedError, StateError, VerbsError,
)
from dmapath.mr import LOCAL_WRITE, MW_BIND, REMOTE_ATOMIC, REMOTE_WRITE
from dmapath.rdma import REMOTE_ALL, as_key, cut, entries_of
from dmapath.verbs.bridge import is_pyverbs
from dmapath.verbs.resources import give_back

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    POLL = 256  # completions that one look takes at most
    SLICE_NS = 20000000  # how long a wait goes on before Ctrl-C is looked for
cdef uint64_t RECV_BIT = 1ULL << 63  # in a wr_id: a receive's

OPCODES = {"write": IBV_WR_RDMA_WRITE, "write_imm": IBV_WR_RDMA_WRITE_WITH_IMM, "read": IBV_WR_RDMA_READ,
           "send": IBV_WR_SEND, "send_imm": IBV_WR_SEND_WITH_IMM}
_NAMES = {**{number: name for name, number in OPCODES.items()}, IBV_WR_ATOMIC_CMP_AND_SWP: "cmp_swp",
          IBV_WR_ATOMIC_FETCH_AND_ADD: "fetch_add", IBV_WR_LOCAL_INV: "local_inv", IBV_WR_BIND_MW: "bind_mw"}
#: Opcodes of completions (enum ibv_wc_opcode).
_WC_NAMES = {0: "send", 1: "write", 2: "read", 3: "cmp_swp", 4: "fetch_add", 5: "bind_mw", 6: "local_inv", 128: "recv",
             129: "recv_write_imm"}
_QP_RIGHTS = LOCAL_WRITE | REMOTE_ALL | MW_BIND
STATES = ("reset", "init", "rtr", "rts", "sqd", "sqe", "error", "unknown")


# poll until something comes, giving the processor away now and then; for 20 ms at most, or until the end
cdef int spin(ibv_cq *cq, int n, ibv_wc *wc, uint64_t end) noexcept nogil:
    cdef uint64_t stop = now_ns() + SLICE_NS
    cdef int got, spins = 0
    stop = stop if stop < end else end
    while True:
        got = ibv_poll_cq(cq, n, wc)
        if got:
            return got
        spins += 1
        if spins & 15 == 0:
            sched_yield()
            if now_ns() > stop:
                return 0


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Cq:
    """A completion queue for ``cqe`` completions, or a pyverbs CQ that stays its owner's (give its ``context``).

    Queue pairs that could together overflow it are refused when they are made, unless they ask for ``overcommit``. An
    overflow breaks the queue (``Context.events`` says "CQ error"): close its queue pairs and it, and make them anew. One
    thread at a time polls it, or waits on a queue pair that uses it.
    """

    def __cinit__(self, of, cqe=256, *, Context context=None):
        cdef ibv_context *c
        cdef int entries
        self.qps = {}
        self.wc = <ibv_wc *>calloc(POLL, sizeof(ibv_wc))
        if self.wc == NULL:
            raise MemoryError("no memory for completions")
        if isinstance(of, Context):
            self.context = of
            c = self.context.ptr()
            entries = self.context.limit(cqe, "cqe", "max_cqe")
            self.c = ibv_create_cq(c, entries, NULL, NULL, 0)
            if self.c == NULL:
                raise failed("ibv_create_cq", errno, "cqe", cqe)
            self.context.children += 1
            self.context.made.add(self)
        elif is_pyverbs(of):
            if context is None:
                raise DmaValueError("the Context of a pyverbs CQ must be given", argument="context", value=context)
            self.c = as_cq(of)
            self.owner, self.context = of, context
        else:
            raise AddressTypeError("a Context or a pyverbs CQ is wanted", argument="of", value=of)
        self.cqe = self.c.cqe

    cdef ibv_cq *ptr(self) except NULL:
        self.context.ptr()
        if self.owner is not None:
            return <ibv_cq *>pointer(self.owner, "cq")
        if self.c == NULL:
            raise StateError("the completion queue was closed", argument="cq", value=self)
        return self.c

    # refuse what may overflow it: n more completions besides those that its queue pairs may ask for
    cdef int check_room(self, long n) except -1:
        cdef Qp qp
        for ref in self.qps.values():
            qp = ref()
            if qp is not None and qp.c != NULL:
                n += (qp.depth if qp.send_cq is self else 0) + (qp.recv_depth if qp.recv_cq is self else 0)
        if n > self.cqe:
            raise DmaValueError(f"a completion queue that cannot overflow: {n} work requests may be outstanding on its "
                                f"queue pairs, and it has {self.cqe} entries (overcommit=True allows it)", argument="cq",
                                value=self.cqe)
        return 0

    # completions into self.wc: as many as there are, at most n; waits for the first until `end` (now_ns; 0: not at all)
    cdef int fetch(self, ibv_cq *cq, int n, uint64_t end) except -1:
        cdef int got
        cdef ibv_wc *wc = self.wc
        n = n if n < POLL else POLL
        got = ibv_poll_cq(cq, n, wc)
        while got == 0 and end:
            with nogil:
                got = spin(cq, n, wc, end)
            if got or now_ns() > end:
                break
            PyErr_CheckSignals()
        if got < 0:
            raise failed("ibv_poll_cq", EIO, "cq", self, "the queue has overflowed or the device is gone")
        return got

    cdef Qp owner_of(self, uint32_t qp_num):
        if self.last is None or self.last.c == NULL or self.last.c.qp_num != qp_num:
            ref = self.qps.get(qp_num)
            self.last = ref() if ref is not None else None
        return self.last

    # take what is there, wait for the first until `end`, and leave it with the queue pairs it belongs to; how many came
    cdef int dispatch(self, uint64_t end) except -1:
        cdef int i, got = self.fetch(self.ptr(), POLL, end)
        cdef Qp qp
        for i in range(got):
            qp = self.owner_of(self.wc[i].qp_num)
            if qp is None or not qp.retire(&self.wc[i]):
                continue
            if self.wc[i].wr_id & RECV_BIT:
                qp.arrivals.append(qp.describe(&self.wc[i]))
            elif self.wc[i].status != IBV_WC_SUCCESS:
                done = qp.describe(&self.wc[i])
                qp.failures.setdefault(done.request, done)
        return got

    def poll(self, int n=64, timeout=0.0):
        """Completions in order: list of Completion, at most n; waits ``timeout`` seconds in all for the first. Failed ones
        are in the list too (``ok``)."""
        cdef ibv_cq *cq = self.ptr()
        cdef int i, got, most = as_integer(n, "n", least=1, last=2**31 - 1)
        cdef double seconds = as_seconds(timeout)
        cdef uint64_t end = end_of(seconds) if seconds > 0 else 0
        cdef Qp qp
        out = []
        while True:
            got = self.fetch(cq, most, end)
            for i in range(got):
                qp = self.owner_of(self.wc[i].qp_num)
                if qp is None:
                    out.append(Completion(self.wc[i].wr_id, self.wc[i].status, "unknown", self.wc[i].byte_len, None,
                                          self.wc[i].qp_num, None))
                elif qp.retire(&self.wc[i]):
                    out.append(qp.describe(&self.wc[i]))
            if out or got == 0:  # what came may have been of before a reset, and is nobody's
                return out

    def drain(self, n, timeout=10.0):
        """Wait for ``n`` completions; returns how many came. One call, whatever n is: the fast way. Raises CompletionError
        at the first that failed, and VerbsError (ETIMEDOUT) when not all came within ``timeout`` seconds."""
        cdef ibv_cq *cq = self.ptr()
        cdef int done = 0, got, i, most = as_integer(n, "n", last=2**31 - 1)
        cdef uint64_t end = end_of(as_seconds(timeout))
        cdef Qp qp
        while done < most:
            got = self.fetch(cq, most - done, end)
            if got == 0:
                raise VerbsError(f"{done} of {n} completions came within {timeout} s", errno=ETIMEDOUT, argument="n",
                                 value=n)
            for i in range(got):
                qp = self.owner_of(self.wc[i].qp_num)
                if qp is None or not qp.retire(&self.wc[i]):
                    continue
                done += 1
                if self.wc[i].status != IBV_WC_SUCCESS:
                    raise qp.describe(&self.wc[i]).error()
        return done

    def close(self):
        """Destroy it. VerbsError (EBUSY) while a queue pair uses it."""
        cdef int rc
        if self.owner is None and self.c != NULL:
            rc = ibv_destroy_cq(self.ptr())
            if rc:
                raise failed("ibv_destroy_cq", rc, "cq", self, "a queue pair still uses it")
            self.c = NULL
            self.context.children -= 1

    def abandon(self):
        """As ``close``, but queue pairs that use it are closed before; the refusal is raised all the same, afterwards."""
        give_back(self.close, [ref() for ref in self.qps.values()])

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.abandon)

    def __dealloc__(self):
        if self.owner is None and self.c != NULL and self.context.alive():
            ibv_destroy_cq(self.c)
            self.context.children -= 1
        free(self.wc)


class Completion(rdma.Completion):
    """A completion of a real queue."""

    @property
    def status_name(self):
        """In libibverbs' words."""
        return ibv_wc_status_str(<ibv_wc_status><int>self.status).decode()


@dataclass(frozen=True)
class QpInfo:
    """What one side tells the other to connect: queue pair, first packet number, GID, LID, path MTU in bytes."""

    qp_num: int
    psn: int
    gid: bytes
    lid: int
    mtu: int

    def __post_init__(self):
        for name, most in (("qp_num", 0xffffff), ("psn", 0xffffff), ("lid", 0xffff), ("mtu", 4096)):
            as_integer(getattr(self, name), name, last=most)
        if not isinstance(self.gid, bytes) or len(self.gid) != 16:
            raise DmaValueError("16 bytes", argument="gid", value=self.gid)

    def to_json(self):
        """One line of text for any exchange (a socket, a file)."""
        return json.dumps({"qp_num": self.qp_num, "psn": self.psn, "gid": self.gid.hex(), "lid": self.lid, "mtu": self.mtu})

    @classmethod
    def from_json(cls, text):
        """What to_json gave on the other side. DmaValueError where it is something else."""
        try:
            d = json.loads(text)
            return cls(int(d["qp_num"]), int(d["psn"]), bytes.fromhex(d["gid"]), int(d["lid"]), int(d["mtu"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise DmaValueError("what QpInfo.to_json gives", argument="text", value=text) from None


cdef fill64(uint64_t *to, uint32_t n, value, name):
    cdef const unsigned long long[::1] view
    cdef uint32_t i
    cdef uint64_t one
    if hasattr(value, "__index__") and not hasattr(value, "__len__"):
        one = as_integer(value, name)
        for i in range(n):
            to[i] = one
        return
    view = column(value, n, name, 8)
    for i in range(n):
        to[i] = view[i]


cdef fill32(uint32_t *to, uint32_t n, value, name):
    cdef const unsigned int[::1] view
    cdef uint32_t i, one
    if hasattr(value, "__index__") and not hasattr(value, "__len__"):
        one = as_integer(value, name, last=2**32 - 1)
        for i in range(n):
            to[i] = one
        return
    view = column(value, n, name, 4)
    for i in range(n):
        to[i] = view[i]


cdef column(value, uint32_t n, name, size):
    try:
        view = memoryview(value)
    except TypeError:
        raise AddressTypeError(f"an integer, or a buffer of {n} unsigned integers of {size} bytes", argument=name,
                               value=value) from None
    if view.ndim != 1 or view.shape[0] != n or view.itemsize != size or view.format.lstrip("@=<") not in ("I", "L", "Q"):
        raise DmaValueError(f"an integer, or a buffer of {n} unsigned integers of {size} bytes", argument=name, value=view)
    return view.cast("B").cast("Q" if size == 8 else "I")


cdef class Batch:
    """Work requests of one entry each, in columns, made once and posted as often as wanted by ``Qp.run`` or ``post_batch``.

    Each column is an integer for all or a buffer of ``n``: ``addr`` and ``remote_addr`` of 64-bit, ``length``, ``lkey`` and
    ``rkey`` of 32-bit unsigned integers (array.array("Q") and ("I"), NumPy's uint64 and uint32). Lengths are bytes.
    """

    def __cinit__(self, n, *, addr, lkey, length, remote_addr=0, rkey=0):
        self.n = as_length(n, "n", last=2**24)
        self.addr = <uint64_t *>calloc(self.n, 2 * sizeof(uint64_t) + 3 * sizeof(uint32_t))
        if self.addr == NULL:
            raise MemoryError("no memory for a batch")
        self.remote = self.addr + self.n
        self.length = <uint32_t *>(self.remote + self.n)
        self.lkey = self.length + self.n
        self.rkey = self.lkey + self.n
        fill64(self.addr, self.n, addr, "addr")
        fill64(self.remote, self.n, remote_addr, "remote_addr")
        fill32(self.length, self.n, length, "length")
        fill32(self.lkey, self.n, lkey, "lkey")
        fill32(self.rkey, self.n, rkey, "rkey")

    def __dealloc__(self):
        free(self.addr)

    def __len__(self):
        return self.n


cdef ibv_wr_opcode opcode_of(name) except *:
    if name not in OPCODES:
        raise DmaValueError("write, read, write_imm, send or send_imm", argument="opcode", value=name)
    return <ibv_wr_opcode><int>OPCODES[name]


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Qp:
    """A reliable connected queue pair: created in a Pd, or a pyverbs QP that stays its owner's (``Qp(pd, cq, of=qp)``).

    Work posted here is not to be mixed with work posted through pyverbs on the same queue pair: completions are matched to
    the requests of this object. One thread at a time uses a queue pair; any number of queue pairs run at once.

    Parameters
    ----------
    cq, recv_cq : Cq
        None: one of its own for both.
    max_send_wr, max_recv_wr, max_sge, max_inline : int
        Work requests outstanding, entries in each (None: 16, or as many as the device takes), bytes sent inline.
    overcommit : bool
        Share a completion queue that is too small for everything that may be outstanding.
    """

    def __cinit__(self, Pd pd not None, Cq cq=None, *, Cq recv_cq=None, of=None, max_send_wr=128, max_recv_wr=128,
                  max_sge=None, max_inline=0, bint overcommit=False):
        cdef ibv_qp_init_attr init
        cdef ibv_pd *p = pd.ptr()
        self.pd, self.failures, self.arrivals = pd, {}, deque()
        memset(&init, 0, sizeof(init))
        limit = pd.context.attr
        for name, queue in (("cq", cq), ("recv_cq", recv_cq)):
            if queue is not None and (<Cq>queue).context.ptr() != pd.context.ptr():
                raise DmaValueError("a queue of the protection domain's own device", argument=name, value=queue)
        if of is not None:
            self._adopt(of, cq, recv_cq, &init)
        else:
            init.cap.max_send_wr = pd.context.limit(max_send_wr, "max_send_wr", "max_qp_wr")
            init.cap.max_recv_wr = pd.context.limit(max_recv_wr, "max_recv_wr", "max_qp_wr")
            most = min(16, limit["max_sge"]) if max_sge is None else pd.context.limit(max_sge, "max_sge", "max_sge")
            init.cap.max_send_sge = init.cap.max_recv_sge = most
            init.cap.max_inline_data = as_integer(max_inline, "max_inline", last=2**31 - 1)
            self.depth, self.recv_depth, self.max_sge = max_send_wr, max_recv_wr, most
            self.own_cq = cq is None
            if self.own_cq:
                cq = Cq(pd.context, max_send_wr + max_recv_wr if recv_cq is None else max_send_wr)
            recv_cq = cq if recv_cq is None else recv_cq
            init.send_cq, init.recv_cq = cq.ptr(), recv_cq.ptr()
            init.qp_type = IBV_QPT_RC
        self.send_cq, self.recv_cq = cq, cq if recv_cq is None else recv_cq
        if not overcommit:
            self.send_cq.check_room(self.depth + (self.recv_depth if self.recv_cq is cq else 0))
            if self.recv_cq is not cq:
                self.recv_cq.check_room(self.recv_depth)
        if of is None:
            self._create(p, &init)
        self.max_inline = init.cap.max_inline_data
        self.wr = <ibv_send_wr *>calloc(self.depth, sizeof(ibv_send_wr))
        self.sge = <ibv_sge *>calloc(<size_t>self.depth * self.max_sge, sizeof(ibv_sge))
        self.request = <uint64_t *>calloc(self.depth, sizeof(uint64_t))
        self.rwr = <ibv_recv_wr *>calloc(self.recv_depth + 1, sizeof(ibv_recv_wr))
        self.rsge = <ibv_sge *>calloc(<size_t>(self.recv_depth + 1) * self.max_sge, sizeof(ibv_sge))
        if not (self.wr and self.sge and self.request and self.rwr and self.rsge):
            raise MemoryError("no memory for the queues")
        me = weakref.ref(self)
        self.send_cq.qps[self.c.qp_num] = self.recv_cq.qps[self.c.qp_num] = me
        pd.qps[:] = [*(qp for qp in pd.qps if qp() is not None), me]
        pd.made.add(self)
        index = pd.context.gid_index()
        # any start will do that differs between queue pairs, so that a stray packet of another connection is told apart
        self.info = QpInfo(self.c.qp_num, self.c.qp_num * 7919 & 0xffffff, dict(pd.context.gids()).get(index, bytes(16)),
                           limit["lid"], limit["mtu"])

    cdef _create(self, ibv_pd *pd, ibv_qp_init_attr *init):
        cdef ibv_qp_init_attr tried = init[0]
        cdef ibv_qp *without
        cdef int code
        self.c = ibv_create_qp(pd, init)
        if self.c != NULL:
            return
        code = errno
        if tried.cap.max_inline_data:  # devices do not tell its limit: whether it is the one at fault shows without it
            init[0] = tried
            init.cap.max_inline_data = 0
            without = ibv_create_qp(pd, init)
            if without != NULL:
                ibv_destroy_qp(without)
                raise failed("ibv_create_qp", code, "max_inline", tried.cap.max_inline_data,
                             "more than the device takes with these queues")
        c = tried.cap
        raise failed("ibv_create_qp", code, "max_send_wr", c.max_send_wr,
                     f"with max_recv_wr={c.max_recv_wr}, max_sge={c.max_send_sge}, max_inline={c.max_inline_data}, more "
                     "than the device takes together, or it has no more queue pairs")

    cdef _adopt(self, of, Cq cq, Cq recv_cq, ibv_qp_init_attr *init):
        cdef ibv_qp_attr attr
        cdef int rc
        if cq is None:
            raise DmaValueError("the Cq of a pyverbs QP must be given", argument="cq", value=cq)
        cdef ibv_qp *qp = as_qp(of)
        recv_cq = cq if recv_cq is None else recv_cq
        if qp.send_cq != cq.ptr() or qp.recv_cq != recv_cq.ptr() or qp.pd != self.pd.ptr():
            raise DmaValueError("a QP made with these queues in this protection domain", argument="of", value=of)
        memset(&attr, 0, sizeof(attr))
        rc = ibv_query_qp(qp, &attr, IBV_QP_CAP, init)
        if rc:
            raise failed("ibv_query_qp", rc, "of", of)
        init.cap = attr.cap
        self.c, self.owner = qp, of
        self.depth, self.recv_depth, self.max_sge = attr.cap.max_send_wr, attr.cap.max_recv_wr, attr.cap.max_send_sge

    cdef ibv_qp *ptr(self) except NULL:
        self.pd.context.ptr()
        if self.owner is not None:
            return <ibv_qp *>pointer(self.owner, "qp")
        if self.c == NULL:
            raise StateError("the queue pair was closed", argument="qp", value=self)
        return self.c

    # the same, in a state that posting takes: every state but those before `least`
    cdef ibv_qp *ready(self, ibv_qp_state least) except NULL:
        cdef ibv_qp *qp = self.ptr()
        if qp.state < least:
            raise StateError(f"it is not connected (state {STATES[<int>qp.state]}): connect() comes before", argument="qp",
                             value=self)
        return qp

    def names_key(self, uint32_t key):
        """How many entries of outstanding work requests name a local key; 0 after its end."""
        cdef uint64_t i
        cdef int j, n = 0
        for i in range(self.tail, self.head):
            for j in range(self.wr[i % self.depth].num_sge):
                n += self.sge[i % self.depth * self.max_sge + j].lkey == key
        for i in range(self.rtail, self.rhead):
            for j in range(self.rwr[i % self.recv_depth].num_sge):
                n += self.rsge[i % self.recv_depth * self.max_sge + j].lkey == key
        return n

    # ---- states -----------------------------------------------------------------------------------------------------

    @property
    def state(self):
        """"reset", "init", "rtr", "rts", "error" ... as the device says now."""
        cdef ibv_qp_attr attr
        cdef ibv_qp_init_attr init
        memset(&attr, 0, sizeof(attr))
        cdef int rc = ibv_query_qp(self.ptr(), &attr, IBV_QP_STATE, &init)
        if rc:
            raise failed("ibv_query_qp", rc, "qp", self)
        return STATES[<int>attr.qp_state]

    @property
    def outstanding(self):
        """Work requests posted for sending that have not completed; 0 after its end."""
        return self.head - self.tail

    def connect(self, remote, *, access=REMOTE_ALL | LOCAL_WRITE, timeout=14, retry_cnt=6, rnr_retry=6, min_rnr_timer=26,
                mtu=None):
        """Connect to the other side's QpInfo: reset to init to ready (ibv_modify_qp).

        A packet that nobody acknowledges is sent again ``retry_cnt`` times (0 to 7), every 4.096 us * 2**``timeout`` (1 to
        31; 0: never again, and never an end). A send that meets no posted receive is tried again ``rnr_retry`` times; how
        long after, says the receiver's ``min_rnr_timer`` (a code of 0 to 31). By default both end in about half a second. 7
        is for ever as ``rnr_retry``, and on soft-RoCE as ``retry_cnt`` too. The path MTU is the smaller of both sides', or
        ``mtu`` bytes.
        """
        cdef ibv_qp *qp = self.ptr()
        if not isinstance(remote, QpInfo):
            raise AddressTypeError("a QpInfo is wanted", argument="remote", value=remote)
        how = dict(access=as_integer(access, "access", last=2**32 - 1), timeout=as_integer(timeout, "timeout", last=31),
                   retry_cnt=as_integer(retry_cnt, "retry_cnt", last=7),
                   rnr_retry=as_integer(rnr_retry, "rnr_retry", last=7),
                   min_rnr_timer=as_integer(min_rnr_timer, "min_rnr_timer", last=31), mtu=mtu)
        if access & ~_QP_RIGHTS:
            raise DmaValueError("LOCAL_WRITE, remote rights and MW_BIND", argument="access", value=access)
        path = min(self.info.mtu, remote.mtu) if mtu is None else mtu
        if path not in (256, 512, 1024, 2048, 4096) or path > self.info.mtu:
            raise DmaValueError(f"256, 512, 1024, 2048 or 4096 bytes, and at most this port's {self.info.mtu}",
                                argument="mtu", value=path)
        if qp.state != IBV_QPS_RESET:
            raise StateError(f"it is connected already (state {STATES[<int>qp.state]}): recover() connects it as before, "
                             "and after reset() it can be connected anew", argument="qp", value=self)
        try:
            self._init(access | (MW_BIND if self.pd.context.attr["max_mw"] else 0))
            self._ready_to_receive(remote, path, min_rnr_timer)
            self._ready_to_send(timeout, retry_cnt, rnr_retry)
        except BaseException as e:
            at_end(e, self.reset)
            raise
        self.remote, self.how = remote, how

    cdef _modify(self, ibv_qp_attr *attr, ibv_qp_state state, int mask, str argument="qp", value=None):
        attr.qp_state = state
        cdef int rc = ibv_modify_qp(self.ptr(), attr, mask | IBV_QP_STATE)
        if rc:
            raise failed(f"ibv_modify_qp to {STATES[<int>state]}", rc, argument, self if value is None else value)

    cdef _init(self, unsigned int access):
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        a.port_num, a.qp_access_flags = self.pd.context.port, access
        self._modify(&a, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "access", access)

    cdef _ready_to_receive(self, remote, mtu, min_rnr_timer):
        cdef ibv_qp_attr a
        cdef int i
        ctx = self.pd.context
        memset(&a, 0, sizeof(a))
        a.path_mtu = <ibv_mtu><int>(mtu.bit_length() - 8)
        a.dest_qp_num, a.rq_psn = remote.qp_num, remote.psn
        a.max_dest_rd_atomic, a.min_rnr_timer = min(16, ctx.attr["max_rd_atomic"]), min_rnr_timer
        a.ah_attr.is_global, a.ah_attr.port_num, a.ah_attr.dlid = 1, ctx.port, remote.lid
        a.ah_attr.grh.sgid_index, a.ah_attr.grh.hop_limit = ctx.gid_index(), 64
        for i in range(16):
            a.ah_attr.grh.dgid.raw[i] = remote.gid[i]
        self._modify(&a, IBV_QPS_RTR, IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN
                     | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER, "remote", remote)

    cdef _ready_to_send(self, timeout, retry_cnt, rnr_retry):
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        a.sq_psn, a.timeout, a.retry_cnt, a.rnr_retry = self.info.psn, timeout, retry_cnt, rnr_retry
        a.max_rd_atomic = min(16, self.pd.context.attr["max_rd_atomic"])
        self._modify(&a, IBV_QPS_RTS, IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN
                     | IBV_QP_MAX_QP_RD_ATOMIC)

    def fail(self):
        """Put it into the error state: everything outstanding completes as flushed."""
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        self._modify(&a, IBV_QPS_ERR, 0)

    def reset(self):
        """Drop everything that is posted, on the device and here."""
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        self._modify(&a, IBV_QPS_RESET, 0)
        # sequence numbers go on, so that completions from before are known for what they are
        self.tail, self.rtail = self.head, self.rhead
        self.failures.clear()
        self.arrivals.clear()

    def recover(self):
        """After an error: reset, and connect to the same other side again, which must do the same before either posts.
        Everything outstanding is lost, and receives must be posted anew."""
        self.ptr()
        if self.remote is None:
            raise StateError("it was never connected", argument="qp", value=self)
        self.reset()
        self.connect(self.remote, **self.how)

    # ---- posting ----------------------------------------------------------------------------------------------------

    cdef int room(self, uint64_t n) except -1:
        if self.head - self.tail + n > self.depth:
            raise NoMemoryError(f"the send queue holds {self.depth}, {self.head - self.tail} are outstanding and {n} more "
                                "are wanted: poll completions first", argument="qp", value=self)
        return 0

    # the next slot of the ring, for the request that begins at `first`
    cdef ibv_send_wr *take(self, ibv_wr_opcode opcode, uint64_t first) noexcept nogil:
        cdef uint64_t at = self.head % self.depth
        cdef ibv_send_wr *wr = &self.wr[at]
        wr.wr_id = self.head
        wr.next = NULL
        wr.sg_list = &self.sge[at * self.max_sge]
        wr.num_sge = 0
        wr.opcode = opcode
        wr.send_flags = 0
        self.request[at] = first
        if self.head > first:
            self.wr[(at if at else self.depth) - 1].next = wr
        self.head += 1
        return wr

    # post the slots from `first` to the head; on failure those that were not taken are given back
    cdef int submit(self, ibv_qp *qp, uint64_t first) except -1:
        cdef ibv_send_wr *bad = NULL
        cdef ibv_send_wr *start = &self.wr[first % self.depth]
        cdef int rc
        with nogil:
            rc = ibv_post_send(qp, start, &bad)
        if rc:
            self.head = bad.wr_id if bad != NULL else first
            raise failed("ibv_post_send", abs(rc), "qp", self,
                         f"{self.head - first} of the request's work requests were posted")
        return 0

    def post(self, opcode, segments, remote_addr=0, rkey=0, *, imm=0, inline=False):
        """Post one request over segments and return its id; ``wait`` for it, or poll.

        ``opcode`` is "write", "read", "write_imm", "send" or "send_imm"; ``segments`` a Mapping, an Mr, Segments or
        (address, bytes, lkey). The remote side is one run of bytes from ``remote_addr``. The request becomes as few work
        requests as max_sge and the device's message size allow; the last asks for a completion.
        A send is one message: DmaValueError where it does not fit one work request.
        """
        cdef ibv_qp *qp = self.ready(IBV_QPS_RTS)
        cdef ibv_send_wr *wr = NULL
        cdef ibv_sge *sge
        cdef uint64_t first = self.head, at = as_dma(remote_addr, "remote_addr")
        cdef uint32_t key = as_key(rkey, "rkey"), value = as_integer(imm, "imm", last=2**32 - 1)
        cdef ibv_wr_opcode op = opcode_of(opcode)
        attr = self.pd.context.attr
        most = min(self.max_sge, attr["max_sge_rd"]) if opcode == "read" else self.max_sge
        groups = cut(entries_of(segments), most, attr["max_msg_sz"])
        if len(groups) > 1 and op not in (IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ):
            raise self._too_long(len(groups))
        if inline and (opcode == "read" or sum(n for group in groups for _, n, _ in group) > self.max_inline):
            raise DmaValueError(f"at most {self.max_inline} bytes go inline (max_inline), and none of a read",
                                argument="inline", value=inline)
        self.room(len(groups))
        for group in groups:
            wr = self.take(op, first)
            wr_remote(wr, at, key)
            wr_imm(wr, value)
            wr.send_flags = IBV_SEND_INLINE if inline else 0
            for addr, n, lkey in group:
                sge = &wr.sg_list[wr.num_sge]
                sge.addr, sge.length, sge.lkey = addr, n, lkey
                wr.num_sge += 1
                at += <uint64_t>n
        wr.send_flags |= IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

    def _too_long(self, parts):
        most = self.pd.context.attr["max_msg_sz"]
        return DmaValueError(f"one message of at most {self.max_sge} segments and {most} bytes", argument="segments",
                             value=parts)

    def write(self, segments, remote_addr, rkey):
        """RDMA WRITE: ``post`` and ``wait``."""
        self.wait(self.post("write", segments, remote_addr, rkey))

    def read(self, segments, remote_addr, rkey):
        """RDMA READ: ``post`` and ``wait``."""
        self.wait(self.post("read", segments, remote_addr, rkey))

    def fetch_add(self, segment, remote_addr, rkey, add):
        """Add to 8 remote bytes (8-byte aligned); what they were goes to the segment. Posts, and returns the id."""
        return self._atomic(IBV_WR_ATOMIC_FETCH_AND_ADD, segment, remote_addr, rkey, add, 0)

    def cmp_swp(self, segment, remote_addr, rkey, compare, swap):
        """Swap 8 remote bytes where they equal ``compare``; what they were goes to the segment. Posts, returns the id."""
        return self._atomic(IBV_WR_ATOMIC_CMP_AND_SWP, segment, remote_addr, rkey, compare, swap)

    def _atomic(self, int opcode, segment, remote_addr, rkey, first_value, second_value):
        cdef ibv_qp *qp = self.ready(IBV_QPS_RTS)
        cdef uint64_t first = self.head, at = as_dma(remote_addr, "remote_addr")
        cdef uint64_t one = as_integer(first_value, "compare" if opcode == IBV_WR_ATOMIC_CMP_AND_SWP else "add")
        cdef uint64_t two = as_integer(second_value, "swap")
        cdef uint32_t key = as_key(rkey, "rkey")
        if not self.pd.context.attr["atomic"]:
            raise NotSupportedError("the device has no atomics", argument="opcode", value=_NAMES[opcode])
        if at & 7:
            raise DmaValueError("a multiple of 8 (InfiniBand specification, 9.4.5)", argument="remote_addr", value=at)
        entries = entries_of([segment] if isinstance(segment, tuple) or hasattr(segment, "lkey") and
                             not hasattr(segment, "segment") else segment)
        if len(entries) != 1 or entries[0][1] != 8:
            raise DmaValueError("one segment of 8 bytes", argument="segment", value=entries)
        self.room(1)
        cdef ibv_send_wr *wr = self.take(<ibv_wr_opcode>opcode, first)
        wr_atomic(wr, at, key, one, two)
        wr.sg_list[0].addr, wr.sg_list[0].length, wr.sg_list[0].lkey = entries[0][0], 8, entries[0][2]
        wr.num_sge = 1
        wr.send_flags = IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

    def local_inv(self, rkey):
        """Invalidate a key of this side (a type 2 window's). Posts, and returns the id."""
        cdef ibv_qp *qp = self.ready(IBV_QPS_RTS)
        cdef uint64_t first = self.head
        cdef uint32_t key = as_key(rkey, "rkey")
        self.room(1)
        cdef ibv_send_wr *wr = self.take(IBV_WR_LOCAL_INV, first)
        wr.invalidate_rkey = key
        wr.send_flags = IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

    def bind(self, Mw mw not None, Mr mr not None, offset=0, length=None, *, access=REMOTE_ALL):
        """Bind a window to bytes of a region (which needs MW_BIND access), on a queue pair of the side that owns both; waits
        until it is done. The window's new key is ``mw.rkey``."""
        cdef ibv_mw_bind b
        cdef ibv_qp *q = self.ready(IBV_QPS_RTS)
        cdef ibv_mr *m = mr.ptr()
        cdef ibv_send_wr *wr
        cdef uint64_t first = self.head
        cdef uint32_t rkey
        cdef unsigned int given = as_integer(access, "access", last=2**32 - 1)
        cdef int rc
        mw.ptr()
        addr, n, _ = mr.segment(offset, length)
        if given & ~<unsigned int>REMOTE_ALL:
            raise DmaValueError("remote rights (REMOTE_READ, REMOTE_WRITE, REMOTE_ATOMIC)", argument="access", value=access)
        if mr.pd.ptr() != self.pd.ptr() or mw.pd.ptr() != self.pd.ptr():
            raise DmaValueError("a region and a window of the queue pair's own protection domain",
                                argument="mr" if mr.pd.ptr() != self.pd.ptr() else "mw", value=mr)
        if mr.owner is None and not mr.access & MW_BIND:
            raise DmaValueError("a region with MW_BIND access", argument="mr", value=mr)
        if mr.owner is None and given & (REMOTE_WRITE | REMOTE_ATOMIC) and not mr.access & LOCAL_WRITE:
            raise DmaValueError("rights to write need a region with LOCAL_WRITE", argument="access", value=access)
        self.room(1)
        wr = self.take(IBV_WR_BIND_MW, first)
        if mw.kind == 1:
            memset(&b, 0, sizeof(b))
            b.wr_id, b.send_flags = wr.wr_id, IBV_SEND_SIGNALED
            b.bind_info.mr, b.bind_info.addr, b.bind_info.length, b.bind_info.mw_access_flags = m, addr, n, given
            rc = ibv_bind_mw(q, mw.ptr(), &b)
            if rc:
                self.head = first
                raise failed("ibv_bind_mw", rc, "mw", mw)
            self.wait(first)
            mw.rkey = mw.c.rkey
        else:
            rkey = ibv_inc_rkey(mw.rkey)
            wr_bind(wr, mw.ptr(), rkey, m, addr, n, given)
            wr.send_flags = IBV_SEND_SIGNALED
            self.submit(q, first)
            self.wait(first)
            mw.rkey = rkey
        mr.bind(mw)

    def unbind(self, Mw mw not None):
        """Take a type 2 window's rights away (local invalidate), and wait until it is done. A type 1 window is unbound by
        ``free``, or bound anew."""
        self.ptr()
        mw.ptr()
        if mw.bound is None:
            raise StateError("it is not bound", argument="mw", value=mw)
        if mw.kind == 1:
            raise NotSupportedError("a type 1 window is unbound by free(), or bound anew", argument="mw", value=mw)
        self.wait(self.local_inv(mw.rkey))
        mw.bound = None

    def recv(self, segments):
        """Post a receive of one message into segments; returns its id. StateError before ``connect``."""
        cdef ibv_qp *qp = self.ready(IBV_QPS_INIT)
        cdef ibv_recv_wr *bad = NULL
        cdef uint64_t at = self.rhead % self.recv_depth
        cdef ibv_recv_wr *wr = &self.rwr[at]
        cdef int rc
        entries, *more = cut(entries_of(segments), self.max_sge, self.pd.context.attr["max_msg_sz"])
        if more:
            raise self._too_long(1 + len(more))
        if self.rhead - self.rtail >= self.recv_depth:
            raise NoMemoryError(f"the receive queue is full: all of its {self.recv_depth} are outstanding", argument="qp",
                                value=self)
        wr.wr_id, wr.next, wr.sg_list, wr.num_sge = self.rhead | RECV_BIT, NULL, &self.rsge[at * self.max_sge], len(entries)
        for i, (addr, n, lkey) in enumerate(entries):
            wr.sg_list[<int>i].addr, wr.sg_list[<int>i].length, wr.sg_list[<int>i].lkey = addr, n, lkey
        rc = ibv_post_recv(qp, wr, &bad)
        if rc:
            raise failed("ibv_post_recv", abs(rc), "qp", self)
        self.rhead += 1
        return self.rhead - 1

    def post_batch(self, Batch batch not None, opcode="write", *, bint signal_all=False):
        """Post a batch as one chain, in one call: "write", "read" or "send". The last work request asks for a completion, or
        all do. Returns how many completions will come."""
        cdef ibv_qp *qp = self.ready(IBV_QPS_RTS)
        cdef ibv_wr_opcode op = opcode_of(opcode)
        cdef ibv_send_wr *wr = NULL
        cdef ibv_sge *sge
        cdef uint64_t first = self.head
        cdef uint32_t i
        cdef unsigned int flags = IBV_SEND_SIGNALED if signal_all else 0
        self.room(batch.n)
        with nogil:
            for i in range(batch.n):
                wr = self.take(op, first)
                wr.send_flags = flags
                sge = wr.sg_list
                sge.addr, sge.length, sge.lkey = batch.addr[i], batch.length[i], batch.lkey[i]
                wr.num_sge = 1
                wr_remote(wr, batch.remote[i], batch.rkey[i])
            wr.send_flags = IBV_SEND_SIGNALED
        self.submit(qp, first)
        return batch.n if signal_all else 1

    def run(self, Batch batch not None, opcode="write", *, bint signal_all=False, timeout=10.0):
        """Build, post and complete a batch in one call: ``post_batch`` and ``Cq.drain``. Nothing else may be outstanding."""
        timeout = as_seconds(timeout)
        return self.send_cq.drain(self.post_batch(batch, opcode, signal_all=signal_all), timeout)

    # ---- completions ------------------------------------------------------------------------------------------------

    # take a completed work request, and those before it, off its ring; False: it is from before a reset
    cdef bint retire(self, const ibv_wc *wc) noexcept nogil:
        cdef uint64_t seq = wc.wr_id & ~RECV_BIT
        if wc.wr_id & RECV_BIT:
            if not self.rtail <= seq < self.rhead:
                return False
            self.rtail = seq + 1
            return True
        if not self.tail <= seq < self.head:
            return False
        self.tail = seq + 1
        return True

    cdef object describe(self, const ibv_wc *wc):
        cdef uint64_t seq = wc.wr_id & ~RECV_BIT
        cdef bint received = wc.wr_id & RECV_BIT != 0
        cdef ibv_send_wr *wr = &self.wr[seq % self.depth]
        cdef ibv_recv_wr *rwr = &self.rwr[seq % (self.recv_depth or 1)]
        cdef ibv_sge *sge = rwr.sg_list if received else wr.sg_list
        cdef int i, n = rwr.num_sge if received else wr.num_sge
        cdef uint64_t address = 0, first
        cdef uint32_t key = 0
        first = seq
        if not received:
            first = self.request[seq % self.depth]
        if wc.status == IBV_WC_SUCCESS:
            imm = wc_imm(wc) if wc.wc_flags & IBV_WC_WITH_IMM else None
            return Completion(first, 0, _WC_NAMES.get(wc.opcode, str(wc.opcode)), wc.byte_len, imm, wc.qp_num, None)
        name = "recv" if received else _NAMES.get(<int>wr.opcode, "?")
        if name == "local_inv":
            key = wr.invalidate_rkey
        elif not received and name not in rdma.LOCAL_OPCODES:
            address, key = wr_remote_addr(wr), wr_rkey(wr)
        entries = [(sge[i].addr, sge[i].length, sge[i].lkey) for i in range(n)]
        inline = not received and wr.send_flags & IBV_SEND_INLINE
        written = received or name in ("read", "fetch_add", "cmp_swp")
        failure = rdma.blame(<int>wc.status, name, segment=seq - first, entries=entries, address=address, key=key,
                             unknown=[] if inline else [e for e in entries if not self.pd.covers(e, written)],
                             peer="the other side" if self.remote is None else f"queue pair {self.remote.qp_num} of "
                                  f"{self.remote.gid.hex(':', 2)}")
        return Completion(first, <int>wc.status, name, failure["length"], None, wc.qp_num, failure)

    def wait(self, request, timeout=10.0):
        """Wait until a posted request is complete. Raises CompletionError where it, or one before it, failed, and VerbsError
        (ETIMEDOUT) when it did not within ``timeout`` seconds: it is outstanding then, as before."""
        cdef uint64_t want, last, end
        self.ptr()
        want = last = as_integer(request, "request")
        if want >= self.head:
            raise DmaValueError(f"a request of this queue pair, which has posted {self.head}", argument="request",
                                value=request)
        end = end_of(as_seconds(timeout))
        while last + 1 < self.head and self.request[(last + 1) % self.depth] == want:
            last += 1
        while self.tail <= last:
            if self.send_cq.dispatch(end) == 0 or (self.tail <= last and now_ns() > end):
                raise VerbsError(f"it did not complete within {timeout} s, and is outstanding still{self._patience()}",
                                 errno=ETIMEDOUT, argument="request", value=request)
        for seq in sorted(self.failures):
            if seq <= want:
                raise self.failures[seq].error()

    def _patience(self):
        """Where the device itself may never give a request up, in words."""
        if self.how is None or self.how["timeout"] and self.how["retry_cnt"] < 7:
            return ""
        return f" (timeout={self.how['timeout']}, retry_cnt={self.how['retry_cnt']}: the device may try for ever)"

    def arrived(self, timeout=10.0):
        """The next completion of a receive: a Completion. CompletionError where it failed; VerbsError (ETIMEDOUT) when
        nothing came in ``timeout`` seconds."""
        cdef uint64_t end
        self.ptr()
        end = end_of(as_seconds(timeout))
        while not self.arrivals:
            if self.recv_cq.dispatch(end) == 0 or now_ns() > end:
                if self.arrivals:
                    break
                raise VerbsError(f"nothing was received within {timeout} s", errno=ETIMEDOUT, argument="timeout",
                                 value=timeout)
        done = self.arrivals.popleft()
        if not done.ok:
            raise done.error()
        return done

    def close(self):
        """Destroy it; what was outstanding is lost. A pyverbs QP stays its owner's."""
        cdef int rc
        if self.c == NULL:
            return
        if self.owner is None:
            self.pd.context.ptr()
            rc = ibv_destroy_qp(self.c)
            if rc:
                raise failed("ibv_destroy_qp", rc, "qp", self)
        for cq in (self.send_cq, self.recv_cq):
            (<Cq>cq).qps.pop(self.info.qp_num, None)
        self.c = NULL
        self.tail, self.rtail = self.head, self.rhead
        if self.own_cq and not self.send_cq.qps:  # else another queue pair's user has it too
            self.send_cq.close()

    def abandon(self):
        """As ``close``."""
        self.close()

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.close)

    def __dealloc__(self):
        if self.c != NULL and self.owner is None and self.pd.context.alive():
            ibv_destroy_qp(self.c)
        free(self.wr)
        free(self.sge)
        free(self.request)
        free(self.rwr)
        free(self.rsge)

    def __repr__(self):
        return f"Qp({self.c.qp_num})" if self.c != NULL else "Qp(closed)"


def loopback(Pd pd not None, **options):
    """Two queue pairs of one device, connected to each other: (Qp, Qp)."""
    first = Qp(pd, **options)
    try:
        second = Qp(pd, **options)
        try:
            first.connect(second.info)
            second.connect(first.info)
        except BaseException as e:
            at_end(e, second.close)
            raise
    except BaseException as e:
        at_end(e, first.close)
        raise
    return first, second
