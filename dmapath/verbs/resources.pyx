# cython: language_level=3
"""What RDMA work needs to exist: an open device, a protection domain, memory regions and windows, over libibverbs; opened
here, or the user's own pyverbs objects."""
import os
import resource
import select
import weakref

cimport cython
from cpython.buffer cimport PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EBUSY, EINVAL, EIO, ENODEV, ENOMEM, EOPNOTSUPP, errno
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from dmapath.verbs.bridge cimport as_context, as_mr, as_pd, field, pointer
from dmapath.verbs.ibv cimport (
    IBV_ACCESS_ON_DEMAND, IBV_MW_TYPE_1, IBV_MW_TYPE_2, IBV_ODP_SUPPORT, IBV_REREG_MR_CHANGE_ACCESS, ibv_ack_async_event,
    ibv_alloc_mw, ibv_alloc_pd, ibv_async_event, ibv_close_device, ibv_context, ibv_dealloc_mw, ibv_dealloc_pd, ibv_dereg_mr,
    ibv_device, ibv_device_attr, ibv_device_attr_ex, ibv_event_type_str, ibv_free_device_list, ibv_get_async_event,
    ibv_get_device_list, ibv_get_device_name, ibv_gid, ibv_mr, ibv_mw, ibv_open_device, ibv_pd, ibv_port_attr,
    ibv_query_device_ex,
    ibv_query_gid, ibv_query_port, ibv_reg_mr, ibv_rereg_mr,
)

from dmapath.addr import DmaAddr, as_integer, as_length, refuse_objects
from dmapath.errors import AddressTypeError, DmaValueError, NotSupportedError, StateError, VerbsError, at_end
from dmapath.mr import LOCAL_WRITE, WRITABLE, check_rights
from dmapath.verbs.bridge import is_pyverbs, pyverbs_mr


cdef unsigned long forks = 0  # how often this process has become a child since the module was loaded


cdef const unsigned long *fork_count() noexcept nogil:
    return &forks


def _in_child():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_in_child)


cdef failed(str call, int code, str argument="", value=None, str more=""):
    """The exception of a libibverbs call: its name, the errno and what is known about it."""
    if code in (EIO, ENODEV):
        more = more or "the device was removed, or does not answer"
    kind = NotSupportedError if code == EOPNOTSUPP else VerbsError
    return kind(f"{os.strerror(code)}{'; ' + more if more else ''} [{call}]", errno=code, argument=argument, value=value)


def give_back(close, children):
    """``close``; where that is refused since something that was made in it is open still, that is closed before. The refusal
    is raised all the same, afterwards: nothing is left, and nobody is spared to hear of it."""
    try:
        close()
    except VerbsError as refused:
        at_end(refused, *(child.abandon for child in children if child is not None), close)
        raise


def memlock():
    """What pinning is held to: (bytes pinned by this process, soft limit of RLIMIT_MEMLOCK in bytes or None)."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    with open("/proc/self/status") as f:
        pinned = sum(int(line.split()[1]) << 10 for line in f if line.startswith("VmPin:"))
    return pinned, None if limit == resource.RLIM_INFINITY else limit


def pin_text(size):
    """Why memory of ``size`` bytes was not pinned: the limit and what is pinned, or the kernel's memory."""
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


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Context:
    """An open RDMA device, by name (None: the first), or a pyverbs Context that stays its owner's.

    ``attr`` has its limits: ``max_mr_size``, ``max_msg_sz`` (bytes), ``max_sge``, ``max_sge_rd``, ``max_qp_wr``, ``mtu``
    (bytes), ``odp`` and so on, as ibv_query_device_ex and ibv_query_port tell them. ``verified`` has what self-tests found
    (``dmapath.verbs.probe``). Raises NotSupportedError (ENODEV) where there is no such device.
    """

    def __cinit__(self, device=None, *, port=1):
        self.verified, self.attr, self.born, self.made = {}, {}, forks, weakref.WeakSet()
        self.port = as_integer(port, "port", least=1, last=255)
        if device is None or isinstance(device, str):
            self._open(device)
        elif is_pyverbs(device):
            self.c = as_context(device)
            self.owner = device
        else:
            raise AddressTypeError("a device's name or a pyverbs Context is wanted", argument="device", value=device)
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
        raise NotSupportedError(f"no such RDMA device here ({', '.join(names) or 'there is none'}): dmapath guest run --rxe "
                                "has soft-RoCE", errno=ENODEV, argument="device", value=name)

    def _query(self):
        cdef ibv_device_attr_ex a
        cdef ibv_device_attr o
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
                         lid=p.lid, ethernet=p.link_layer == 2, firmware=bytes(o.fw_ver).split(b"\0")[0].decode())

    # a number that the device limits, under its name in attr
    cdef limit(self, value, str name, str what):
        return as_integer(value, name, least=1, last=self.attr[what], what=f"the device's {what}")

    cdef ibv_context *ptr(self) except NULL:
        if self.born != forks:
            raise StateError("it belongs to the process that opened it, and this is a child of that: open the device here",
                             argument="context", value="Context")
        if self.owner is not None:
            return <ibv_context *>pointer(self.owner, "context")
        if self.c == NULL:
            raise StateError("the device was closed", argument="context", value=self)
        return self.c

    # whether what was made in it can still be destroyed: not in a child, nor after its owner closed it behind our back
    cdef bint alive(self) noexcept:
        if self.born != forks or self.c == NULL:
            return False
        try:
            return self.owner is None or <ibv_context *>pointer(self.owner, "context") == self.c
        except Exception:
            return False

    @property
    def name(self):
        """The device's name."""
        return self.ptr().device.name.decode()

    @property
    def is_rxe(self):
        """Whether it is soft-RoCE."""
        return os.path.exists(f"/sys/class/infiniband/{self.name}/parent")

    def gids(self):
        """Its GIDs that are set: list of (index, 16 bytes)."""
        cdef ibv_gid g
        cdef ibv_context *c = self.ptr()
        out = []
        for i in range(self.attr["gids"]):
            if ibv_query_gid(c, self.port, i, &g) == 0 and any(g.raw[k] for k in range(16)):
                out.append((i, bytes([g.raw[k] for k in range(16)])))
        return out

    def gid_index(self):
        """The GID to use: an IPv4 address's (RoCE v2) if there is one, else the last."""
        gids = self.gids()
        mapped = [i for i, gid in gids if gid[:12] == bytes(10) + b"\xff\xff"]
        return (mapped or [i for i, _ in gids] or [0])[-1]

    def events(self):
        """Asynchronous events that wait: names, such as "CQ error" or "local catastrophic error"; never blocks."""
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
        """Close a device that was opened here; a pyverbs owner closes its own. VerbsError (EBUSY) while something of it is
        open."""
        cdef int rc
        cdef ibv_context *c
        if self.owner is None and self.c != NULL:
            c = self.ptr()
            if self.children:
                raise failed("ibv_close_device", EBUSY, "context", self, f"{self.children} domains or queues of it are open")
            rc = ibv_close_device(c)
            if rc:
                raise failed("ibv_close_device", errno, "context", self)
            self.c = NULL

    def abandon(self):
        """As ``close``, but what was made in it is closed before; the refusal is raised all the same, afterwards."""
        give_back(self.close, sorted(self.made, key=lambda child: isinstance(child, Pd), reverse=True))

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.abandon)

    def __dealloc__(self):
        if self.c != NULL and self.owner is None and self.born == forks:
            ibv_close_device(self.c)

    def __repr__(self):
        return "Context(closed)" if self.c == NULL else f"Context({self.c.device.name.decode()!r})"


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Pd:
    """A protection domain: of a Context, or a pyverbs PD that stays its owner's.

    ``Pd()`` opens the first device. pyverbs keeps no way from a PD to its Context before 61: give ``context`` then.
    """

    def __cinit__(self, of=None, *, Context context=None):
        self.qps, self.made = [], weakref.WeakSet()
        if of is None:
            of = Context()
        if isinstance(of, Context):
            self.context = of
            self.c = ibv_alloc_pd(self.context.ptr())
            if self.c == NULL:
                raise failed("ibv_alloc_pd", errno)
            self.context.children += 1
            self.context.made.add(self)
        elif is_pyverbs(of):
            self.c = as_pd(of)
            self.owner = of
            if context is None:
                if not hasattr(of, "ctx"):
                    raise DmaValueError("this pyverbs does not tell a PD's Context: pass context=Context(yours)",
                                        argument="context", value=None)
                context = Context(of.ctx)
            if self.c.context != context.ptr():
                raise DmaValueError("the Context that the PD was made in", argument="context", value=context)
            self.context = context
        else:
            raise AddressTypeError("a Context or a pyverbs PD is wanted", argument="of", value=of)

    cdef ibv_pd *ptr(self) except NULL:
        self.context.ptr()
        if self.owner is not None:
            return <ibv_pd *>pointer(self.owner, "pd")
        if self.c == NULL:
            raise StateError("the protection domain was closed", argument="pd", value=self)
        return self.c

    # where its pyverbs owner keeps the pointer, or NULL: it is ours
    cdef uintptr_t *watch(self) noexcept:
        return NULL if self.owner is None else field(self.owner, "pd", <uintptr_t>self.c)

    # whether a region that is known here covers an entry (address, bytes, lkey), with the right to write it where wanted
    cdef bint covers(self, entry, bint write) except -1:
        return any([owner.covers(entry, write) for owner in self.made if hasattr(owner, "covers")])

    def close(self):
        """Free it. VerbsError (EBUSY) while regions, windows or queue pairs of it are open."""
        cdef int rc
        if self.owner is None and self.c != NULL:
            rc = ibv_dealloc_pd(self.ptr())
            if rc:
                raise failed("ibv_dealloc_pd", rc, "pd", self, "regions, windows or queue pairs of it are open")
            self.c = NULL
            self.context.children -= 1

    def abandon(self):
        """As ``close``, but what was made in it is closed before; the refusal is raised all the same, afterwards."""
        give_back(self.close, sorted(self.made, key=lambda child: isinstance(child, Mr)))  # regions last: others name them

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.abandon)

    def __dealloc__(self):
        if self.owner is None and self.c != NULL and self.context is not None and self.context.alive():
            ibv_dealloc_pd(self.c)
            self.context.children -= 1

    def __repr__(self):
        return f"Pd({'closed' if self.owner is None and self.c == NULL else self.context!r})"


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Mr:
    """A long-lived memory region: bytes of a PhysMemory's arena or of any buffer, registered until ``dereg``.

    The buffer is held (it cannot be resized) for as long. One of Python objects is refused: it holds pointers.

    Parameters
    ----------
    pd : Pd
    obj : PhysMemory, buffer, or a pyverbs MR (which stays its owner's)
    offset, length : int
        Bytes; None: to the end.
    access : int
        LOCAL_WRITE | REMOTE_READ ... (enum ibv_access_flags). ON_DEMAND is refused where the device's own self-test fails.

    Raises VerbsError as ibv_reg_mr refuses; for ENOMEM with RLIMIT_MEMLOCK and the bytes pinned.
    """

    def __cinit__(self, Pd pd not None, obj, offset=0, length=None, *, access=LOCAL_WRITE, bint trust=False):
        cdef ibv_pd *p = pd.ptr()
        cdef size_t n
        cdef char *at
        cdef unsigned int given = check_rights(access)
        cdef int code
        self.pd, self.windows, self.access = pd, [], given
        if is_pyverbs(obj):
            self.c = as_mr(obj)
            self.owner = obj
            pd.made.add(self)
            return
        if given & IBV_ACCESS_ON_DEMAND and not trust:
            from dmapath.verbs.probe import require

            require(pd, "odp")
        try:
            PyObject_GetBuffer(obj, &self.view, (PyBUF_CONTIG if given & WRITABLE else PyBUF_CONTIG_RO) | PyBUF_FORMAT)
        except TypeError:
            raise AddressTypeError("a PhysMemory, a buffer or a pyverbs MR", argument="obj", value=obj) from None
        self.held, self.memory = True, obj
        refuse_objects(self.view.format.decode() if self.view.format != NULL else "B", "obj", obj)
        offset = as_length(offset, "offset", least=0)
        length = as_length(self.view.len - offset if length is None else length, "length")
        if offset + length > self.view.len:
            raise DmaValueError(f"offset + length within {self.view.len} bytes", argument="length", value=length)
        n = length
        at = <char *>self.view.buf + <size_t>offset
        with nogil:
            self.c = ibv_reg_mr(p, at, n, given)
            code = errno
        if self.c == NULL:
            if code in (EINVAL, EOPNOTSUPP):
                raise failed("ibv_reg_mr", code, "access", access,
                             "the device does not take these rights, or not so many bytes "
                             f"({length}, of at most {pd.context.attr['max_mr_size']})")
            raise failed("ibv_reg_mr", code, "length", length, pin_text(length) if code == ENOMEM else "")
        pd.made.add(self)

    cdef ibv_mr *ptr(self) except NULL:
        self.pd.context.ptr()
        if self.owner is not None:
            return <ibv_mr *>pointer(self.owner, "mr")
        if self.c == NULL:
            raise StateError("deregistered already", argument="mr", value=self)
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
        cdef ibv_mr *mr = self.ptr()
        offset = as_length(offset, "offset", least=0)
        length = as_length(mr.length - offset if length is None else length, "length")
        if offset + length > mr.length:
            raise DmaValueError(f"offset + length within {mr.length} bytes", argument="length", value=length)
        return <uintptr_t>mr.addr + offset, length, mr.lkey

    def covers(self, entry, write):
        """Whether an entry (address, bytes, lkey) of a work request lies in it, with the right to write it where wanted."""
        addr, n, key = entry
        if self.c == NULL or not self.pd.context.alive() or self.c.lkey != key:
            return False
        at = addr - <uintptr_t>self.c.addr
        inside = 0 <= at and at + n <= self.c.length
        return inside and (not write or self.owner is not None or bool(self.access & LOCAL_WRITE))

    def pyverbs(self):
        """A real pyverbs MR over the same bytes with the same rights, for code that wants one. It is a registration of its
        own, with its own keys (pyverbs cannot adopt one): close it before this region is deregistered. Needs a pyverbs
        PD."""
        return pyverbs_mr(self.pd.owner, int(self.addr), self.length, self.access)

    def rereg(self, access):
        """Change its rights (ibv_rereg_mr). NotSupportedError where the device cannot, as soft-RoCE; it stays as it was."""
        cdef unsigned int wanted = check_rights(access)
        cdef int rc = ibv_rereg_mr(self.ptr(), IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, wanted)
        if rc:
            raise failed("ibv_rereg_mr", errno, "access", access, "the region stays as it was")
        self.access = wanted

    def in_use(self):
        """How many outstanding work requests of its protection domain name it."""
        key = self.ptr().lkey
        return sum([qp().names_key(key) for qp in self.pd.qps if qp() is not None])

    def bind(self, Mw mw not None):
        """Called by Qp.bind: a window over this region is bound."""
        self.ptr()
        mw.bound = self
        self.windows.append(weakref.ref(mw))

    def dereg(self):
        """Deregister. StateError (EBUSY) while outstanding work requests name it or windows are bound to it."""
        self.ptr()
        if self.owner is not None:
            raise StateError("a pyverbs MR is closed by its owner", argument="mr", value=self)
        used = self.in_use()
        if used:
            raise StateError(f"{used} outstanding work requests name it: poll their completions first", errno=EBUSY,
                             argument="mr", value=self)
        self.windows = [ref for ref in self.windows if ref() is not None and ref().bound is self]
        if self.windows:
            raise StateError(f"{len(self.windows)} memory windows are bound to it: invalidate or free them first",
                             errno=EBUSY,
                             argument="mr", value=self)
        self._dereg()

    def _dereg(self):
        cdef ibv_mr *mr = self.ptr()
        cdef int rc
        with nogil:
            rc = ibv_dereg_mr(mr)
        if rc:
            raise failed("ibv_dereg_mr", rc, "mr", self)
        self.c = NULL
        self._let_go()

    def abandon(self):
        """Deregister, whatever names it: windows that are bound to it are freed, and work that is outstanding will fail. The
        refusal is raised all the same, afterwards. A pyverbs MR stays."""
        if self.owner is not None or self.c == NULL:
            return
        try:
            self.dereg()
        except StateError as refused:
            at_end(refused, *(ref().free for ref in self.windows if ref() is not None), self._dereg)
            raise

    def _let_go(self):
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)
        self.memory = None

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.abandon)

    def __dealloc__(self):
        if self.owner is None and self.c != NULL and self.pd.context.alive():
            ibv_dereg_mr(self.c)
        if self.held:
            PyBuffer_Release(&self.view)

    def __repr__(self):
        return f"Mr({self.c.length} bytes, lkey {self.c.lkey:#x}, rkey {self.c.rkey:#x})" if self.c != NULL else "Mr(closed)"


@cython.no_gc_clear  # __dealloc__ needs what it was made in
cdef class Mw:
    """A memory window, type 1 or 2: remote rights over part of a region, given (``Qp.bind``) and taken away without
    registering. ``rkey`` is its key now."""

    def __cinit__(self, Pd pd not None, kind=2):
        if kind not in (1, 2):
            raise DmaValueError("1 or 2", argument="kind", value=kind)
        self.pd, self.kind = pd, kind
        if not pd.context.attr["max_mw"]:
            raise NotSupportedError("the device has no memory windows", argument="kind", value=kind)
        self.c = ibv_alloc_mw(pd.ptr(), IBV_MW_TYPE_1 if kind == 1 else IBV_MW_TYPE_2)
        if self.c == NULL:
            raise failed("ibv_alloc_mw", errno, "kind", kind)
        self.rkey = self.c.rkey
        pd.made.add(self)

    cdef ibv_mw *ptr(self) except NULL:
        self.pd.context.ptr()
        if self.c == NULL:
            raise StateError("the window was freed", argument="mw", value=self)
        return self.c

    def free(self):
        """Deallocate it; its rkey is void."""
        cdef int rc
        if self.c != NULL:
            rc = ibv_dealloc_mw(self.ptr())
            if rc:
                raise failed("ibv_dealloc_mw", rc, "mw", self)
            self.c, self.bound = NULL, None

    def abandon(self):
        """As ``free``."""
        self.free()

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, kind, error, traceback):
        at_end(error, self.free)

    def __dealloc__(self):
        if self.c != NULL and self.pd.context.alive():
            ibv_dealloc_mw(self.c)
