# cython: language_level=3
"""RDMA objects over libibverbs: opened here, or the user's own pyverbs objects. The data path holds no GIL.

Queues are rings: work requests and their entries are built where they stay until they complete, so that a completion with
an error can name its request, and a region that is still named by one is not deregistered.
"""
import json
import os
import select
import warnings
import weakref
from dataclasses import dataclass

from cpython.buffer cimport PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EBUSY, EIO, ENODEV, ENOMEM, errno
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dmapath.memory cimport PhysMemory
from dmapath.verbs.bridge cimport as_context, as_cq, as_mr, as_pd, as_qp, pointer
from dmapath.verbs.ibv cimport *

from dmapath.addr import DmaAddr, as_length
from dmapath.errors import (
    AddressTypeError, CompletionError, DmaValueError, NoMemoryError, NotSupportedError, StateError, VerbsError, error_for,
)
from dmapath.verbs.bridge import is_pyverbs

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec *)
    int CLOCK_MONOTONIC

LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC = 1, 2, 4, 8
MW_BIND, ZERO_BASED, ON_DEMAND, HUGETLB = 16, 32, 64, 128
#: What a remote side may do, all of it.
REMOTE_ALL = REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC

cdef enum:
    POLL = 256
    SENT = 0
cdef uint64_t RECV_BIT = 1ULL << 63

OPCODES = {"write": IBV_WR_RDMA_WRITE, "write_imm": IBV_WR_RDMA_WRITE_WITH_IMM, "read": IBV_WR_RDMA_READ,
           "send": IBV_WR_SEND, "send_imm": IBV_WR_SEND_WITH_IMM}
_NAMES = {IBV_WR_RDMA_WRITE: "write", IBV_WR_RDMA_WRITE_WITH_IMM: "write_imm", IBV_WR_RDMA_READ: "read",
          IBV_WR_SEND: "send", IBV_WR_SEND_WITH_IMM: "send_imm", IBV_WR_ATOMIC_CMP_AND_SWP: "cmp_swp",
          IBV_WR_ATOMIC_FETCH_AND_ADD: "fetch_add", IBV_WR_LOCAL_INV: "local_inv", IBV_WR_BIND_MW: "bind_mw"}
#: Opcodes of completions (enum ibv_wc_opcode).
_WC_NAMES = {0: "send", 1: "write", 2: "read", 3: "cmp_swp", 4: "fetch_add", 5: "bind_mw", 6: "local_inv", 128: "recv",
             129: "recv_write_imm"}
STATES = ("reset", "init", "rtr", "rts", "sqd", "sqe", "error", "unknown")
STATUS = {"loc_prot": 4, "flush": 5, "bad_resp": 7, "rem_inv_req": 9, "rem_access": 10, "rem_op": 11, "retry": 12,
          "rnr_retry": 13, "success": 0}


cdef double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double>t.tv_sec + t.tv_nsec * 1e-9


cdef failed(str call, int code, str argument="", value=None, str more=""):
    """The exception of a libibverbs call: its name, the errno and what is known about it."""
    if code == EIO or code == ENODEV:
        more = more or "the device was removed, or does not answer"
    return VerbsError(f"{call}: {os.strerror(code)}{'; ' + more if more else ''}", errno=code, argument=argument, value=value)


def memlock():
    """What pinning is held to: (bytes pinned by this process, soft limit of RLIMIT_MEMLOCK or None)."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    pinned = 0
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(("VmPin:", "VmLck:")):
                pinned += int(line.split()[1]) << 10
    return pinned, None if limit == resource.RLIM_INFINITY else limit


def pin_text(size):
    """Why memory of a size was not pinned: the limit and what is pinned, or the kernel's memory."""
    pinned, limit = memlock()
    if limit is not None and pinned + size > limit:
        return f"RLIMIT_MEMLOCK is {limit} bytes, {pinned} are pinned, and {size} more are wanted"
    return f"{size} bytes cannot be pinned, or the device has no more regions ({pinned} bytes are pinned)"


def devices():
    """Names of the RDMA devices of this machine."""
    cdef int n = 0, i
    cdef ibv_device **found = ibv_get_device_list(&n)
    if found == NULL:
        return []
    try:
        return [ibv_get_device_name(found[i]).decode() for i in range(n)]
    finally:
        ibv_free_device_list(found)


cdef class Context:
    """An open RDMA device, by name (None: the first), or a pyverbs Context that stays its owner's.

    ``attr`` has its limits: ``max_mr_size``, ``max_sge``, ``max_sge_rd``, ``max_qp_wr``, ``max_msg_sz`` (bytes of one work
    request), ``odp`` and so on.
    """

    def __cinit__(self, device=None, *, int port=1):
        self.verified = {}
        self.port = port
        if device is None or isinstance(device, str):
            self._open(device)
        elif is_pyverbs(device):
            self.c = as_context(device)
            self.owner = device
        else:
            raise AddressTypeError("a device's name or a pyverbs Context is wanted", argument="device", value=device)
        self.open_ = True
        self._query()

    def _open(self, name):
        cdef int n = 0, i
        cdef ibv_device **found = ibv_get_device_list(&n)
        names = []
        try:
            for i in range(n):
                names.append(ibv_get_device_name(found[i]).decode())
                if name is None or names[-1] == name:
                    self.c = ibv_open_device(found[i])
                    if self.c == NULL:
                        raise failed("ibv_open_device", errno, "device", names[-1])
                    return
        finally:
            if found != NULL:
                ibv_free_device_list(found)
        raise NotSupportedError(f"no such RDMA device here ({', '.join(names) or 'there is none'}): dmapath guest run --rxe has "
                                "soft-RoCE", errno=ENODEV, argument="device", value=name)

    def _query(self):
        cdef ibv_device_attr_ex a
        cdef ibv_port_attr p
        memset(&a, 0, sizeof(a))
        memset(&p, 0, sizeof(p))
        cdef int rc = ibv_query_device_ex(self.c, NULL, &a)
        if rc:
            raise failed("ibv_query_device_ex", abs(rc))
        rc = ibv_query_port(self.c, self.port, &p)
        if rc:
            raise failed("ibv_query_port", abs(rc), "port", self.port)
        o = a.orig_attr
        self.attr = dict(max_mr_size=o.max_mr_size, max_qp_wr=o.max_qp_wr, max_sge=o.max_sge,
                         max_sge_rd=o.max_sge_rd or o.max_sge, max_cqe=o.max_cqe, max_mr=o.max_mr, max_mw=o.max_mw,
                         max_qp=o.max_qp, max_rd_atomic=o.max_qp_rd_atom, atomic=o.atomic_cap != 0,
                         page_size_cap=o.page_size_cap, odp=bool(a.odp_caps.general_caps & IBV_ODP_SUPPORT),
                         max_msg_sz=p.max_msg_sz, mtu=128 << <int>p.active_mtu, port_state=p.state, gids=p.gid_tbl_len,
                         lid=p.lid, ethernet=p.link_layer == 2)

    cdef ibv_context *ptr(self) except NULL:
        if self.owner is not None:
            return <ibv_context *>pointer(self.owner, "context")
        if not self.open_:
            raise StateError("the device was closed", argument="context", value=self)
        return self.c

    @property
    def name(self):
        """The device's name."""
        return self.ptr().device.name.decode()

    @property
    def is_rxe(self):
        """Whether it is soft-RoCE."""
        try:
            with open(f"/sys/class/infiniband/{self.name}/parent"):
                return True
        except OSError:
            return False

    def gids(self):
        """Its GIDs that are set: list of (index, 16 bytes)."""
        cdef ibv_gid g
        out = []
        for i in range(self.attr["gids"]):
            if ibv_query_gid(self.ptr(), self.port, i, &g) == 0 and any(g.raw[k] for k in range(16)):
                out.append((i, bytes([g.raw[k] for k in range(16)])))
        return out

    def gid_index(self):
        """The GID to use: an IPv4 address's (RoCE v2) if there is one, else the last."""
        gids = self.gids()
        mapped = [i for i, gid in gids if gid[:12] == bytes(10) + b"\xff\xff"]
        return (mapped or [i for i, _ in gids] or [0])[-1]

    def events(self):
        """Asynchronous events that wait: names, such as "CQ overrun" or "local catastrophic error"; never blocks."""
        cdef ibv_async_event e
        cdef ibv_context *c = self.ptr()
        out = []
        while select.select([c.async_fd], [], [], 0)[0]:
            if ibv_get_async_event(c, &e):
                break
            out.append(ibv_event_type_str(e.event_type).decode())
            ibv_ack_async_event(&e)
        return out

    def close(self):
        """Close a device that was opened here; the pyverbs owner closes its own."""
        if self.open_ and self.owner is None:
            self.open_ = False
            ibv_close_device(self.c)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.open_ and self.owner is None:
            ibv_close_device(self.c)

    def __repr__(self):
        return f"Context({self.name!r})" if self.open_ else "Context(closed)"


cdef class Pd:
    """A protection domain: of a Context, or a pyverbs PD that stays its owner's."""

    def __cinit__(self, of):
        self.qps = weakref.WeakSet()
        if isinstance(of, Context):
            self.context = of
            self.c = ibv_alloc_pd(self.context.ptr())
            if self.c == NULL:
                raise failed("ibv_alloc_pd", errno)
        elif is_pyverbs(of):
            self.c = as_pd(of)
            self.owner = of
            self.context = Context(of.ctx if hasattr(of, "ctx") else _context_of(of))
        else:
            raise AddressTypeError("a Context or a pyverbs PD is wanted", argument="of", value=of)

    cdef ibv_pd *ptr(self) except NULL:
        if self.owner is not None:
            return <ibv_pd *>pointer(self.owner, "pd")
        if self.c == NULL:
            raise StateError("the protection domain was closed", argument="pd", value=self)
        return self.c

    def close(self):
        """Free it. VerbsError (EBUSY) while regions or queue pairs of it are open."""
        cdef int rc
        if self.owner is None and self.c != NULL:
            rc = ibv_dealloc_pd(self.c)
            if rc:
                raise failed("ibv_dealloc_pd", rc, "pd", self, "regions, windows or queue pairs of it are open")
            self.c = NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.owner is None and self.c != NULL:
            ibv_dealloc_pd(self.c)


def _context_of(obj):
    raise NotSupportedError("this pyverbs does not say which Context a PD is of: give Pd(Context(context)) one of ours",
                            argument="of", value=type(obj).__name__)


cdef class Cq:
    """A completion queue for ``cqe`` completions, or a pyverbs CQ that stays its owner's."""

    def __cinit__(self, of, int cqe=256, *, Context context=None):
        cdef ibv_context *c
        self.qps = {}
        self.wc = <ibv_wc *>calloc(POLL, sizeof(ibv_wc))
        if self.wc == NULL:
            raise MemoryError("no memory for completions")
        if isinstance(of, Context):
            self.context = of
            c = self.context.ptr()
            self.c = ibv_create_cq(c, cqe, NULL, NULL, 0)
            if self.c == NULL:
                raise failed("ibv_create_cq", errno, "cqe", cqe)
        elif is_pyverbs(of):
            self.c = as_cq(of)
            self.owner, self.context = of, context
        else:
            raise AddressTypeError("a Context or a pyverbs CQ is wanted", argument="of", value=of)
        self.cqe = self.c.cqe

    cdef ibv_cq *ptr(self) except NULL:
        if self.owner is not None:
            return <ibv_cq *>pointer(self.owner, "cq")
        if self.c == NULL:
            raise StateError("the completion queue was closed", argument="cq", value=self)
        return self.c

    # completions into self.wc: as many as there are, at most n; with a timeout, waits for the first
    cdef int fetch(self, ibv_cq *cq, int n, double timeout) except -1:
        cdef int got, spins = 0
        cdef double end = 0
        cdef ibv_wc *wc = self.wc
        n = n if n < POLL else POLL
        with nogil:
            while True:
                got = ibv_poll_cq(cq, n, wc)
                if got or timeout <= 0:
                    break
                spins += 1
                if spins & 15 == 0:
                    sched_yield()
                    if end == 0:
                        end = now() + timeout
                    elif now() > end:
                        break
        if got < 0:
            raise failed("ibv_poll_cq", EIO, "cq", self, "the queue has overflowed or the device is gone")
        return got

    cdef Qp owner_of(self, uint32_t qp_num):
        if self.last is None or self.last.c == NULL or self.last.c.qp_num != qp_num:
            ref = self.qps.get(qp_num)
            self.last = ref() if ref is not None else None
        return self.last

    def poll(self, int n=64, timeout=0.0):
        """Completions in order: list of Completion, at most n; waits ``timeout`` seconds for the first. Failed ones are in
        the list too (``ok``)."""
        cdef int i, got = self.fetch(self.ptr(), n, timeout)
        out = []
        for i in range(got):
            done = self._one(&self.wc[i]) if True else None
            if done is not None:
                out.append(done)
        return out

    cdef _one(self, const ibv_wc *wc):
        cdef Qp qp = self.owner_of(wc.qp_num)
        if qp is None:
            return Completion(wc.wr_id, wc.status, "unknown", wc.byte_len, None, wc.qp_num, None)
        return qp.describe(wc) if qp.retire(wc) else None

    def drain(self, int n, double timeout=10.0):
        """Wait until ``n`` work requests that asked for a completion have one; returns how many came. Raises CompletionError
        at the first that failed. One call, whatever n is: the fast way."""
        cdef ibv_cq *cq = self.ptr()
        cdef int done = 0, got, i
        cdef Qp qp
        while done < n:
            got = self.fetch(cq, n - done, timeout)
            if got == 0:
                raise VerbsError(f"{done} of {n} completions came within {timeout} s", errno=110, argument="n", value=n)
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
            rc = ibv_destroy_cq(self.c)
            if rc:
                raise failed("ibv_destroy_cq", rc, "cq", self, "a queue pair still uses it")
            self.c = NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.owner is None and self.c != NULL:
            ibv_destroy_cq(self.c)
        free(self.wc)


@dataclass(frozen=True)
class Completion:
    """One completion: the request's id, its status (0: success), what it was, bytes received, immediate data."""

    request: int
    status: int
    opcode: str
    length: int
    imm: int | None
    qp_num: int
    failure: dict | None

    @property
    def ok(self):
        """Whether it succeeded."""
        return self.status == 0

    @property
    def status_name(self):
        """In libibverbs' words."""
        return ibv_wc_status_str(<ibv_wc_status><int>self.status).decode()

    def error(self):
        """The CompletionError that says what failed, or None."""
        if self.ok:
            return None
        f = dict(self.failure or dict(opcode=self.opcode, segment=0, address=0, key=0, length=0))
        where = "remote " if f["opcode"] in ("write", "write_imm", "read", "cmp_swp", "fetch_add") else "local "
        words = (f"request {self.request} ({f['opcode']}, {f['length']} bytes) of queue pair {self.qp_num}: "
                 f"{self.status_name} ({self.status}), work request {f['segment']} of it, {where}address {f['address']:#x}, "
                 f"key {f['key']:#x}; Qp.recover() brings the queue pair back")
        return CompletionError(words, status=self.status, status_name=self.status_name, request=self.request,
                               qp_num=self.qp_num, **f)


@dataclass(frozen=True)
class QpInfo:
    """What one side tells the other to connect: queue pair, first packet number, GID, LID, path MTU in bytes."""

    qp_num: int
    psn: int
    gid: bytes
    lid: int
    mtu: int

    def to_json(self):
        """One line of text for any exchange (a socket, a file)."""
        return json.dumps({"qp_num": self.qp_num, "psn": self.psn, "gid": self.gid.hex(), "lid": self.lid, "mtu": self.mtu})

    @classmethod
    def from_json(cls, text):
        """What to_json gave on the other side. DmaValueError where it is something else."""
        try:
            d = json.loads(text)
            return cls(int(d["qp_num"]), int(d["psn"]), bytes.fromhex(d["gid"]), int(d["lid"]), int(d["mtu"]))
        except (ValueError, KeyError, TypeError):
            raise DmaValueError("what QpInfo.to_json gives", argument="text", value=text) from None


cdef class Mr:
    """A long-lived memory region: bytes of a PhysMemory's arena or of any buffer, registered until ``dereg``.

    Parameters
    ----------
    pd : Pd
    obj : PhysMemory, buffer, or a pyverbs MR (which stays its owner's)
    offset, length : int
        Bytes; None: to the end.
    access : int
        LOCAL_WRITE | REMOTE_READ ... ON_DEMAND is refused where the device's own self-test fails (dmapath.verbs.probe).
    """

    def __cinit__(self, Pd pd not None, obj, offset=0, length=None, *, unsigned int access=1, bint trust=False):
        cdef char *at
        cdef ibv_pd *p = pd.ptr()
        self.pd, self.pid, self.windows = pd, os.getpid(), []
        if is_pyverbs(obj):
            self.c = as_mr(obj)
            self.owner = obj
            return
        if access & IBV_ACCESS_ON_DEMAND and not trust:
            from dmapath.verbs.probe import require

            require(pd, "odp")
        writes = access & (LOCAL_WRITE | REMOTE_WRITE | REMOTE_ATOMIC | MW_BIND)
        PyObject_GetBuffer(obj, &self.view, PyBUF_CONTIG if writes else PyBUF_CONTIG_RO)
        self.held, self.memory = True, obj
        offset = as_length(offset, "offset", least=0)
        length = as_length(self.view.len - offset if length is None else length, "length")
        if offset + length > self.view.len:
            raise DmaValueError(f"offset + length within {self.view.len} bytes", argument="length", value=length)
        cdef size_t n = length
        self.offset = offset
        at = <char *>self.view.buf + self.offset
        with nogil:
            self.c = ibv_reg_mr(p, at, n, access)
        if self.c == NULL:
            raise failed("ibv_reg_mr", errno, "access" if errno == 22 or errno == 95 else "length",
                         access if errno == 22 or errno == 95 else length, pin_text(n) if errno == ENOMEM else "")

    cdef ibv_mr *ptr(self) except NULL:
        if self.owner is not None:
            return <ibv_mr *>pointer(self.owner, "mr")
        if self.c == NULL:
            raise StateError("deregistered already", argument="mr", value=self)
        if self.pid != os.getpid():
            raise StateError("a region belongs to the process that registered it, and this is a child of it",
                             argument="mr", value=self)
        return self.c

    @property
    def addr(self):
        """DmaAddr of its first byte, as work requests name it."""
        return DmaAddr(<uintptr_t>self.ptr().addr)

    @property
    def length(self):
        """Bytes."""
        return self.ptr().length

    @property
    def lkey(self):
        """The local key."""
        return self.ptr().lkey

    @property
    def rkey(self):
        """The key for the remote side."""
        return self.ptr().rkey

    def segment(self, offset=0, length=None):
        """Bytes of it for a work request: (address, length, lkey)."""
        offset = as_length(offset, "offset", least=0)
        return int(self.addr) + offset, as_length(self.length - offset if length is None else length, "length"), self.lkey

    def rereg(self, access):
        """Change its rights (ibv_rereg_mr). NotSupportedError where the device cannot, as soft-RoCE; it stays usable."""
        cdef int rc = ibv_rereg_mr(self.ptr(), IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, access)
        if rc:
            raise (NotSupportedError if errno == 95 else VerbsError)(
                f"ibv_rereg_mr: {os.strerror(errno)}; the region stays as it was", errno=errno, argument="access", value=access)

    def in_use(self):
        """How many outstanding work requests of its protection domain name it."""
        cdef uint32_t key = self.ptr().lkey
        return sum((<Qp>qp)._names(key) for qp in self.pd.qps)

    def dereg(self):
        """Deregister. StateError while outstanding work requests name it or windows are bound to it."""
        cdef ibv_mr *mr = self.ptr()
        cdef int rc
        if self.owner is not None:
            raise StateError("a pyverbs MR is closed by its owner", argument="mr", value=self)
        used = self.in_use()
        if used:
            raise StateError(f"{used} outstanding work requests name it: poll their completions first", errno=EBUSY,
                             argument="mr", value=self)
        bound = sum(ref() is not None and ref().bound is self for ref in self.windows)
        if bound:
            raise StateError(f"{bound} memory windows are bound to it: invalidate or free them first", errno=EBUSY,
                             argument="mr", value=self)
        with nogil:
            rc = ibv_dereg_mr(mr)
        if rc:
            raise failed("ibv_dereg_mr", rc, "mr", self, "a memory window is bound to it" if rc == EBUSY else "")
        self.c = NULL
        self._let_go()

    def _let_go(self):
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)
        self.memory = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.owner is None and self.c != NULL:
            self.dereg()

    def __dealloc__(self):
        if self.owner is None and self.c != NULL and self.pid == os.getpid():
            ibv_dereg_mr(self.c)
        if self.held:
            PyBuffer_Release(&self.view)

    def __repr__(self):
        return f"Mr({self.c.length} bytes, lkey {self.c.lkey:#x}, rkey {self.c.rkey:#x})" if self.c != NULL else "Mr(closed)"


cdef class Mw:
    """A memory window, type 1 or 2: remote rights over part of a region, given and taken without registering."""

    cdef object __weakref__

    def __cinit__(self, Pd pd not None, int kind=2):
        if kind not in (1, 2):
            raise DmaValueError("1 or 2", argument="kind", value=kind)
        self.pd, self.kind = pd, kind
        self.c = ibv_alloc_mw(pd.ptr(), IBV_MW_TYPE_1 if kind == 1 else IBV_MW_TYPE_2)
        if self.c == NULL:
            if errno == 95:
                raise NotSupportedError("the device has no memory windows of this type (ibv_alloc_mw)", argument="kind",
                                        value=kind)
            raise failed("ibv_alloc_mw", errno, "kind", kind)
        self.rkey = self.c.rkey

    cdef ibv_mw *ptr(self) except NULL:
        if self.c == NULL:
            raise StateError("the window was freed", argument="mw", value=self)
        return self.c

    def bind(self, Qp qp not None, Mr mr not None, offset=0, length=None, *, unsigned int access=REMOTE_ALL):
        """Bind to bytes of a region, on a queue pair of the side that owns it; the new rkey is ``rkey``. Waits until it is
        done."""
        cdef ibv_mw_bind b
        cdef ibv_qp *q = qp.ptr()
        cdef ibv_mr *m = mr.ptr()
        cdef ibv_send_wr *wr
        cdef uint64_t first
        cdef int rc
        addr, n, _ = mr.segment(offset, length)
        qp.room(1)
        first = qp.head
        wr = qp.take(IBV_WR_BIND_MW, first)
        wr.send_flags = IBV_SEND_SIGNALED
        if self.kind == 1:
            memset(&b, 0, sizeof(b))
            b.wr_id, b.send_flags = wr.wr_id, IBV_SEND_SIGNALED
            b.bind_info.mr, b.bind_info.addr, b.bind_info.length, b.bind_info.mw_access_flags = m, addr, n, access
            rc = ibv_bind_mw(q, self.ptr(), &b)
            if rc:
                qp.head -= 1
                raise failed("ibv_bind_mw", rc, "mw", self)
            qp.wait(first)
            self.rkey = self.c.rkey
        else:
            rkey = ibv_inc_rkey(self.rkey)
            wr_bind(wr, self.ptr(), rkey, m, addr, n, access)
            qp.submit(q, first)
            qp.wait(first)
            self.rkey = rkey
        self.bound = mr
        mr.windows.append(weakref.ref(self))

    def unbind(self, Qp qp not None):
        """Take the rights away: local invalidate of a type 2 window; a type 1 window is bound to nothing."""
        if self.bound is None:
            raise StateError("it is not bound", argument="mw", value=self)
        if self.kind == 2:
            qp.wait(qp.local_inv(self.rkey))
        else:
            raise NotSupportedError("a type 1 window is unbound by free(), or bound anew", argument="mw", value=self)
        self.bound = None

    def free(self):
        """Deallocate it; its rkey is void."""
        cdef int rc
        if self.c != NULL:
            rc = ibv_dealloc_mw(self.c)
            if rc:
                raise failed("ibv_dealloc_mw", rc, "mw", self)
            self.c = NULL
            self.bound = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.free()

    def __dealloc__(self):
        if self.c != NULL:
            ibv_dealloc_mw(self.c)


cdef fill64(uint64_t *to, uint32_t n, value, name):
    cdef const unsigned long long[::1] view
    cdef uint32_t i
    cdef uint64_t one
    if hasattr(value, "__index__"):
        one = value
        for i in range(n):
            to[i] = one
        return
    view = value
    if view.shape[0] != n:
        raise DmaValueError(f"{n} entries, as the others", argument=name, value=view.shape[0])
    for i in range(n):
        to[i] = view[i]


cdef fill32(uint32_t *to, uint32_t n, value, name):
    cdef const unsigned int[::1] view
    cdef uint32_t i, one
    if hasattr(value, "__index__"):
        one = value
        for i in range(n):
            to[i] = one
        return
    view = value
    if view.shape[0] != n:
        raise DmaValueError(f"{n} entries, as the others", argument=name, value=view.shape[0])
    for i in range(n):
        to[i] = view[i]


cdef class Batch:
    """Work requests of one entry each, in columns, made once and posted as often as wanted by ``Qp.post_batch``.

    Each column is an integer for all or a buffer of ``n``: ``addr`` and ``remote_addr`` of 64-bit, ``length``, ``lkey`` and
    ``rkey`` of 32-bit unsigned integers (array.array("Q") and ("I"), NumPy's uint64 and uint32). Lengths are bytes.
    """

    def __cinit__(self, n, *, addr, lkey, length, remote_addr=0, rkey=0):
        self.n = as_length(n, "n")
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


cdef list entries_of(segments):
    """(address, length, lkey) of a Mapping, an Mr, segments or triples."""
    if isinstance(segments, Mr):
        return [segments.segment()]
    out = []
    for i, s in enumerate(segments):
        if isinstance(s, tuple):
            addr, n, key = s
            out.append((int(addr), as_length(n, f"segments[{i}].length", least=0), key))
        elif hasattr(s, "lkey"):
            out.append((int(s.addr), s.length, s.lkey))
        else:
            raise AddressTypeError("a Segment or (address, length, lkey) is wanted", argument=f"segments[{i}]", value=s)
    return out


cdef class Qp:
    """A reliable connected queue pair: created in a Pd, or a pyverbs QP that stays its owner's (``Qp(pd, of=qp, cq=...)``).

    Work posted here is not to be mixed with work posted through pyverbs on the same queue pair: completions are matched to
    the requests of this object. One thread at a time posts on a queue pair; any number of queue pairs run at once.

    Parameters
    ----------
    cq, recv_cq : Cq
        None: one of its own for both.
    max_send_wr, max_recv_wr, max_sge, max_inline : int
        Work requests outstanding, entries in each, bytes sent inline; the device may give more.
    """

    def __cinit__(self, Pd pd not None, Cq cq=None, *, Cq recv_cq=None, of=None, max_send_wr=128, max_recv_wr=128, max_sge=16,
                  max_inline=0):
        cdef ibv_qp_init_attr init
        cdef ibv_qp_attr attr
        cdef ibv_pd *p = pd.ptr()
        cdef int rc
        self.pd, self.failed = pd, {}
        memset(&init, 0, sizeof(init))
        if of is not None:
            self.c = as_qp(of)
            self.owner = of
            if cq is None:
                raise DmaValueError("the Cq of a pyverbs QP must be given", argument="cq", value=cq)
            if self.c.send_cq != cq.ptr() or self.c.recv_cq != (recv_cq or cq).ptr() or self.c.pd != p:
                self.c = NULL
                raise DmaValueError("the queues and the protection domain that the QP was made with", argument="of", value=of)
            rc = ibv_query_qp(self.c, &attr, IBV_QP_CAP, &init)
            if rc:
                raise failed("ibv_query_qp", rc)
            init.cap = attr.cap
        else:
            limit = pd.context.attr
            for name, value, most in (("max_send_wr", max_send_wr, limit["max_qp_wr"]),
                                      ("max_recv_wr", max_recv_wr, limit["max_qp_wr"]), ("max_sge", max_sge, 1 << 16)):
                if not 0 < value <= most:
                    raise DmaValueError(f"1 to {most}, the device's limit", argument=name, value=value)
            if cq is None:
                cq = Cq(pd.context, max_send_wr + max_recv_wr)
            init.send_cq, init.recv_cq = cq.ptr(), (recv_cq or cq).ptr()
            init.qp_type = IBV_QPT_RC
            init.cap.max_send_wr, init.cap.max_recv_wr = max_send_wr, max_recv_wr
            init.cap.max_send_sge = init.cap.max_recv_sge = min(max_sge, limit["max_sge"])
            init.cap.max_inline_data = max_inline
            self.c = ibv_create_qp(p, &init)
            if self.c == NULL:
                raise failed("ibv_create_qp", errno, "max_send_wr", max_send_wr)
        self.send_cq, self.recv_cq = cq, recv_cq or cq
        self.depth, self.recv_depth = init.cap.max_send_wr, init.cap.max_recv_wr
        self.max_sge, self.max_inline = init.cap.max_send_sge, init.cap.max_inline_data
        self.wr = <ibv_send_wr *>calloc(self.depth, sizeof(ibv_send_wr))
        self.sge = <ibv_sge *>calloc(<size_t>self.depth * self.max_sge + 1, sizeof(ibv_sge))
        self.request = <uint64_t *>calloc(self.depth, sizeof(uint64_t))
        self.rwr = <ibv_recv_wr *>calloc(self.recv_depth + 1, sizeof(ibv_recv_wr))
        self.rsge = <ibv_sge *>calloc(<size_t>self.recv_depth * self.max_sge + 1, sizeof(ibv_sge))
        if not (self.wr and self.sge and self.request and self.rwr and self.rsge):
            raise MemoryError("no memory for the queues")
        self.send_cq.qps[self.c.qp_num] = self.recv_cq.qps[self.c.qp_num] = weakref.ref(self)
        pd.qps.add(self)
        ctx = pd.context
        index = ctx.gid_index()
        gids = dict(ctx.gids())
        self.info = QpInfo(self.c.qp_num, self.c.qp_num * 7919 & 0xffffff, gids.get(index, bytes(16)), ctx.attr["lid"],
                           ctx.attr["mtu"])

    cdef ibv_qp *ptr(self) except NULL:
        if self.owner is not None:
            return <ibv_qp *>pointer(self.owner, "qp")
        if self.c == NULL:
            raise StateError("the queue pair was closed", argument="qp", value=self)
        return self.c

    def _names(self, uint32_t key):
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
        """Work requests posted for sending that have not completed."""
        return self.head - self.tail

    def connect(self, remote, *, access=REMOTE_ALL | LOCAL_WRITE, timeout=14, retry_cnt=7, rnr_retry=7, min_rnr_timer=12,
                mtu=None):
        """Connect to the other side's QpInfo: reset to init to ready (ibv_modify_qp).

        ``timeout`` is 4.096 us * 2**timeout; ``rnr_retry`` 7 waits for a receiver for ever. The path MTU is the smaller of
        both sides', or ``mtu`` bytes.
        """
        if not isinstance(remote, QpInfo):
            raise AddressTypeError("a QpInfo is wanted", argument="remote", value=remote)
        self.remote = remote
        self.connect_how = dict(access=access, timeout=timeout, retry_cnt=retry_cnt, rnr_retry=rnr_retry,
                                min_rnr_timer=min_rnr_timer, mtu=mtu)
        self._init(access | (MW_BIND if self.pd.context.attr["max_mw"] else 0))
        self._ready(remote, mtu or min(self.info.mtu, remote.mtu), timeout, retry_cnt, rnr_retry, min_rnr_timer)

    def _modify(self, words, state, mask_):
        raise NotImplementedError

    def _init(self, access):
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        a.qp_state, a.port_num, a.qp_access_flags = IBV_QPS_INIT, self.pd.context.port, access
        cdef int rc = ibv_modify_qp(self.ptr(), &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
        if rc:
            raise failed("ibv_modify_qp to init", rc, "qp", self)

    def _ready(self, remote, mtu, timeout, retry_cnt, rnr_retry, min_rnr_timer):
        cdef ibv_qp_attr a
        cdef int rc, i
        ctx = self.pd.context
        memset(&a, 0, sizeof(a))
        if mtu not in (256, 512, 1024, 2048, 4096):
            raise DmaValueError("256, 512, 1024, 2048 or 4096 bytes", argument="mtu", value=mtu)
        a.qp_state, a.path_mtu = IBV_QPS_RTR, <ibv_mtu><int>(mtu.bit_length() - 8)
        a.dest_qp_num, a.rq_psn = remote.qp_num, remote.psn
        a.max_dest_rd_atomic, a.min_rnr_timer = min(16, ctx.attr["max_rd_atomic"]), min_rnr_timer
        a.ah_attr.is_global, a.ah_attr.port_num, a.ah_attr.dlid = 1, ctx.port, remote.lid
        a.ah_attr.grh.sgid_index, a.ah_attr.grh.hop_limit = ctx.gid_index(), 64
        for i in range(16):
            a.ah_attr.grh.dgid.raw[i] = remote.gid[i]
        rc = ibv_modify_qp(self.ptr(), &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN
                           | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)
        if rc:
            raise failed("ibv_modify_qp to rtr", rc, "remote", remote)
        memset(&a, 0, sizeof(a))
        a.qp_state, a.sq_psn, a.timeout, a.retry_cnt, a.rnr_retry = IBV_QPS_RTS, self.info.psn, timeout, retry_cnt, rnr_retry
        a.max_rd_atomic = min(16, ctx.attr["max_rd_atomic"])
        rc = ibv_modify_qp(self.ptr(), &a, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN
                           | IBV_QP_MAX_QP_RD_ATOMIC)
        if rc:
            raise failed("ibv_modify_qp to rts", rc, "qp", self)

    def reset(self):
        """Drop everything that is posted, on the device and here."""
        cdef ibv_qp_attr a
        memset(&a, 0, sizeof(a))
        a.qp_state = IBV_QPS_RESET
        cdef int rc = ibv_modify_qp(self.ptr(), &a, IBV_QP_STATE)
        if rc:
            raise failed("ibv_modify_qp to reset", rc, "qp", self)
        # sequence numbers go on, so that completions from before are known for what they are
        self.tail, self.rtail = self.head, self.rhead
        self.failed.clear()

    def recover(self):
        """After an error: reset, and connect to the same other side again, which must do the same before either posts.
        Everything outstanding is lost, and receives must be posted anew."""
        if self.remote is None:
            raise StateError("it was never connected", argument="qp", value=self)
        self.reset()
        self.connect(self.remote, **self.connect_how)

    # ---- posting ----------------------------------------------------------------------------------------------------

    cdef int room(self, uint64_t n) except -1:
        if self.head - self.tail + n > self.depth:
            raise NoMemoryError(f"the send queue holds {self.depth}, {self.head - self.tail} are outstanding and {n} more are "
                                "wanted: poll completions first", argument="qp", value=self)
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
            self.wr[(self.head - 1) % self.depth].next = wr
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
            raise failed("ibv_post_send", abs(rc), "qp", self, f"{self.head - first} of the request's work requests were posted")
        return 0

    def post(self, opcode, segments, remote_addr=0, rkey=0, *, imm=0, inline=False):
        """Post one request over segments and return its id; ``wait`` for it, or poll.

        ``opcode`` is "write", "read", "write_imm", "send" or "send_imm"; ``segments`` a Mapping, an Mr, Segments or
        (address, length, lkey). The remote side is one run of bytes from ``remote_addr``. The request becomes as few work
        requests as max_sge and the device's message size allow, all of them posted or none; the last asks for a completion.
        A send is one message: DmaValueError where it does not fit one work request.
        """
        cdef ibv_qp *qp = self.ptr()
        cdef ibv_send_wr *wr
        cdef ibv_sge *sge
        cdef uint64_t first = self.head, at = int(remote_addr)
        cdef uint32_t key = rkey
        if opcode not in OPCODES:
            raise DmaValueError("write, read, write_imm, send or send_imm", argument="opcode", value=opcode)
        cdef ibv_wr_opcode op = <ibv_wr_opcode><int>OPCODES[opcode]
        attr = self.pd.context.attr
        most = min(self.max_sge, attr["max_sge_rd"]) if opcode == "read" else self.max_sge
        groups = cut(entries_of(segments), most, attr["max_msg_sz"])
        if len(groups) > 1 and op not in (IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ):
            raise DmaValueError(f"one message of at most {self.max_sge} segments and {attr['max_msg_sz']} bytes",
                                argument="segments", value=len(groups))
        self.room(len(groups))
        for group in groups:
            wr = self.take(op, first)
            wr_remote(wr, at, key)
            if imm:
                wr_imm(wr, imm)
            if inline:
                wr.send_flags = IBV_SEND_INLINE
            for addr, n, lkey in group:
                sge = &wr.sg_list[wr.num_sge]
                sge.addr, sge.length, sge.lkey = addr, n, lkey
                wr.num_sge += 1
                at += <uint64_t>n
        wr.send_flags |= IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

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
        cdef ibv_qp *qp = self.ptr()
        cdef uint64_t first = self.head
        if not self.pd.context.attr["atomic"]:
            raise NotSupportedError("the device has no atomics", argument="opcode", value=_NAMES[opcode])
        if int(remote_addr) & 7:
            raise DmaValueError("a multiple of 8 (InfiniBand specification, 9.4.5)", argument="remote_addr", value=remote_addr)
        ((addr, n, lkey),) = entries_of([segment] if not isinstance(segment, (list, Mr)) else segment)
        if n != 8:
            raise DmaValueError("8 bytes", argument="segment", value=n)
        self.room(1)
        cdef ibv_send_wr *wr = self.take(<ibv_wr_opcode>opcode, first)
        wr_atomic(wr, int(remote_addr), rkey, first_value, second_value)
        wr.sg_list[0].addr, wr.sg_list[0].length, wr.sg_list[0].lkey = addr, 8, lkey
        wr.num_sge = 1
        wr.send_flags = IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

    def local_inv(self, rkey):
        """Invalidate a key of this side (a type 2 window's). Posts, and returns the id."""
        cdef ibv_qp *qp = self.ptr()
        cdef uint64_t first = self.head
        self.room(1)
        cdef ibv_send_wr *wr = self.take(IBV_WR_LOCAL_INV, first)
        wr.invalidate_rkey = rkey
        wr.send_flags = IBV_SEND_SIGNALED
        self.submit(qp, first)
        return first

    def recv(self, segments):
        """Post a receive of one message into segments; returns its id."""
        cdef ibv_qp *qp = self.ptr()
        cdef ibv_recv_wr *bad = NULL
        cdef uint64_t at = self.rhead % self.recv_depth
        cdef ibv_recv_wr *wr = &self.rwr[at]
        cdef int rc
        entries = [e for e in entries_of(segments) if e[1]]
        if len(entries) > self.max_sge:
            raise DmaValueError(f"at most {self.max_sge} segments", argument="segments", value=len(entries))
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
        cdef ibv_qp *qp = self.ptr()
        cdef ibv_wr_opcode op = <ibv_wr_opcode><int>OPCODES[opcode]
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
        cdef ibv_recv_wr *rwr = &self.rwr[seq % self.recv_depth]
        cdef ibv_sge *sge = rwr.sg_list if received else wr.sg_list
        cdef int i, n = rwr.num_sge if received else wr.num_sge
        imm = wc_imm(wc) if wc.status == IBV_WC_SUCCESS and wc.wc_flags & IBV_WC_WITH_IMM else None
        first = seq if received else self.request[seq % self.depth]
        if wc.status == IBV_WC_SUCCESS:
            return Completion(first, 0, _WC_NAMES.get(wc.opcode, str(wc.opcode)), wc.byte_len, imm, wc.qp_num, None)
        name = "recv" if received else _NAMES.get(<int>wr.opcode, "?")
        length = sum(sge[i].length for i in range(n))
        if name in ("recv", "send", "send_imm", "local_inv", "bind_mw"):
            address, key = (sge[0].addr, sge[0].lkey) if n else (0, wr.invalidate_rkey if name == "local_inv" else 0)
        else:
            address, key = remote_of(wr), rkey_of(wr)
        return Completion(first, <int>wc.status, name, length, None, wc.qp_num,
                          dict(opcode=name, segment=seq - first, address=address, key=key, length=length))

    def wait(self, request, timeout=10.0):
        """Wait until a posted request is complete. Raises CompletionError where it, or one before it, failed, and VerbsError
        (ETIMEDOUT) when nothing came in ``timeout`` seconds."""
        cdef uint64_t want = request
        cdef uint64_t last = want
        while last + 1 < self.head and self.request[(last + 1) % self.depth] == want:
            last += 1
        cdef Qp qp
        cdef int got, i
        error = None
        while self.tail <= last:
            got = self.send_cq.fetch(self.send_cq.ptr(), 16, timeout)
            if got == 0:
                raise VerbsError(f"request {request} did not complete within {timeout} s", errno=110, argument="request",
                                 value=request)
            for i in range(got):
                qp = self.send_cq.owner_of(self.send_cq.wc[i].qp_num)
                if qp is not None and qp.retire(&self.send_cq.wc[i]):
                    done = qp.describe(&self.send_cq.wc[i])
                    if not done.ok and qp is self and error is None:
                        error = done.error()
                    elif self.send_cq.wc[i].wr_id & RECV_BIT or qp is not self:
                        qp.failed.setdefault("arrived", []).append(done)
            if error is not None:
                raise error

    def arrived(self, timeout=10.0):
        """The next completion of a receive: a Completion. CompletionError where it failed; VerbsError (ETIMEDOUT)."""
        kept = self.failed.get("arrived")
        if kept:
            done = kept.pop(0)
        else:
            for _ in range(1000):
                found = self.recv_cq.poll(1, timeout)
                if not found:
                    raise VerbsError(f"nothing was received within {timeout} s", errno=110, argument="timeout", value=timeout)
                done = found[0]
                if done.qp_num == self.c.qp_num and done.opcode.startswith("recv"):
                    break
        if not done.ok:
            raise done.error()
        return done

    def close(self):
        """Destroy it; what was outstanding is lost."""
        cdef int rc
        if self.c != NULL:
            self.send_cq.qps.pop(self.c.qp_num, None)
            self.recv_cq.qps.pop(self.c.qp_num, None)
            if self.owner is None:
                rc = ibv_destroy_qp(self.c)
                if rc:
                    raise failed("ibv_destroy_qp", rc, "qp", self)
            self.c = NULL
            self.tail, self.rtail = self.head, self.rhead

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.c != NULL and self.owner is None:
            ibv_destroy_qp(self.c)
        free(self.wr)
        free(self.sge)
        free(self.request)
        free(self.rwr)
        free(self.rsge)

    def __repr__(self):
        return f"Qp({self.c.qp_num})" if self.c != NULL else "Qp(closed)"


def cut(entries, max_sge, max_bytes):
    """Entries (address, length, lkey) in groups of one work request each: at most max_sge of them and max_bytes."""
    groups, group, room = [], [], max_bytes
    for addr, n, key in entries:
        while True:
            take = min(n, room)
            if take or not n:
                if n or not entries[1:]:
                    group.append((addr, take, key))
            room -= take
            addr, n = addr + take, n - take
            if not n:
                break
            groups.append(group)
            group, room = [], max_bytes
        if len(group) == max_sge:
            groups.append(group)
            group, room = [], max_bytes
    if group or not groups:
        groups.append(group)
    return groups


def loopback(Pd pd not None, **options):
    """Two queue pairs of one device, connected to each other: (Qp, Qp)."""
    first, second = Qp(pd, **options), Qp(pd, **options)
    first.connect(second.info)
    second.connect(first.info)
    return first, second
