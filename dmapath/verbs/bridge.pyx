# cython: language_level=3
"""From a pyverbs object to the struct that it holds, or an error: never a guess that could crash.

pyverbs 61 and newer give the pointer as an integer. Older ones keep it behind their object's head, at a place that has not
changed since rdma-core 22; there it is read only from an instance of the right type and size, its target is read through the
kernel (which refuses addresses that are not mapped), and what stands there is compared with the object's own attributes.
pyverbs is looked up at the first call, so nothing here needs it.
"""
import importlib
import os

from cpython.object cimport PyObject
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from dmapath.verbs.ibv cimport ibv_context, ibv_cq, ibv_mr, ibv_pd, ibv_qp

from dmapath.errors import AddressTypeError, NotSupportedError, StateError

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int, const void *, size_t)
    ssize_t read(int, void *, size_t)

# PyObject head, weak references, logger, table of methods; an MR has its PD and its rdma_cm id before the pointer
cdef enum:
    LEADING = 3
    MR_MORE = 2

#: kind -> (module, class, attribute with the pointer as an integer in new pyverbs)
_KINDS = {"context": ("device", "Context", "context"), "pd": ("pd", "PD", "pd"), "cq": ("cq", "CQ", "cq"),
          "qp": ("qp", "QP", "qp"), "mr": ("mr", "MR", "")}
_types = {}
_pipe = None

PACKAGE = "python3-pyverbs"


def pyverbs_problem():
    """Why pyverbs cannot be used here, in one line, or None: it can."""
    try:
        importlib.import_module("pyverbs.device")  # pyverbs alone is imported even where it is broken
    except ImportError as e:
        return f"pyverbs cannot be imported ({e}): apt-get install {PACKAGE}, for the system's Python of the same version"
    return None


def is_pyverbs(obj):
    """Whether an object is of pyverbs, without importing it."""
    return any(k.__module__.startswith("pyverbs.") for k in type(obj).__mro__)


def pyverbs_mr(pd, address, length, access):
    """A pyverbs MR over memory of this process, registered by pyverbs in a PD of its own."""
    if pd is None:
        raise NotSupportedError("a protection domain that is pyverbs' own is wanted: Pd(your_pyverbs_pd)", argument="pd",
                                value=pd)
    return type_of("mr")(pd, length, access, address=address)


cdef type_of(str kind):
    if kind not in _types:
        module, name, _ = _KINDS[kind]
        try:
            _types[kind] = getattr(importlib.import_module(f"pyverbs.{module}"), name)
        except ImportError:
            raise NotSupportedError(pyverbs_problem() or "pyverbs is broken") from None
    return _types[kind]


# copy what an address holds, or False: the kernel reads it, and refuses where nothing is mapped
cdef bint safe_copy(uintptr_t at, void *into, size_t n):
    global _pipe
    if _pipe is None:
        _pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    cdef int to = _pipe[1], back = _pipe[0]
    if write(to, <void *>at, n) != <ssize_t>n:
        while read(back, into, n) > 0:
            pass
        return False
    return read(back, into, n) == <ssize_t>n


cdef inline Py_ssize_t place_of(str kind):
    return sizeof(PyObject) + (LEADING + (MR_MORE if kind == "mr" else 0)) * sizeof(void *)


cdef uintptr_t *field(object obj, str kind, uintptr_t now) noexcept:
    cdef uintptr_t *at = <uintptr_t *>(<char *><PyObject *>obj + place_of(kind))
    if type(obj).__basicsize__ < place_of(kind) + <Py_ssize_t>sizeof(void *) or at[0] != now:
        return NULL
    return at


cdef uintptr_t pointer(object obj, str kind) except 0:
    cdef uintptr_t at
    cdef Py_ssize_t place = place_of(kind)
    wanted = type_of(kind)
    if not isinstance(obj, wanted):
        raise AddressTypeError(f"a pyverbs {wanted.__name__} is wanted", argument=kind, value=type(obj).__name__)
    if kind != "mr" and hasattr(type_of("qp"), "qp"):
        at = getattr(obj, _KINDS[kind][2]) or 0
    elif wanted.__basicsize__ < place + <Py_ssize_t>sizeof(void *):
        raise NotSupportedError(f"unknown pyverbs layout: {wanted.__name__} has {wanted.__basicsize__} bytes",
                                argument=kind, value=wanted.__name__)
    else:
        at = (<uintptr_t *>(<char *><PyObject *>obj + place))[0]
    if at == 0:
        raise StateError("it is closed", argument=kind, value=wanted.__name__)
    return at


cdef int disagree(str kind) except -1:
    raise NotSupportedError("unknown pyverbs layout: what its pointer leads to is not what its attributes say",
                            argument=kind, value=_KINDS[kind][1])


# the pointer, and a copy of what it leads to
cdef uintptr_t look(object obj, str kind, void *into, size_t n) except 0:
    cdef uintptr_t at = pointer(obj, kind)
    memset(into, 0, n)
    if not safe_copy(at, into, n):
        disagree(kind)
    return at


cdef ibv_context *as_context(object obj) except NULL:
    cdef ibv_context seen
    cdef uintptr_t at = look(obj, "context", &seen, sizeof(seen))
    if seen.cmd_fd != obj.cmd_fd:
        disagree("context")
    return <ibv_context *>at


cdef ibv_pd *as_pd(object obj) except NULL:
    cdef ibv_pd seen
    cdef uintptr_t at = look(obj, "pd", &seen, sizeof(seen))
    if seen.handle != obj.handle:
        disagree("pd")
    return <ibv_pd *>at


cdef ibv_cq *as_cq(object obj) except NULL:
    cdef ibv_cq seen
    cdef uintptr_t at = look(obj, "cq", &seen, sizeof(seen))
    if seen.cqe != obj.cqe:
        disagree("cq")
    return <ibv_cq *>at


cdef ibv_qp *as_qp(object obj) except NULL:
    cdef ibv_qp seen
    cdef uintptr_t at = look(obj, "qp", &seen, sizeof(seen))
    if seen.qp_num != obj.qp_num:
        disagree("qp")
    return <ibv_qp *>at


cdef ibv_mr *as_mr(object obj) except NULL:
    cdef ibv_mr seen
    cdef uintptr_t at = look(obj, "mr", &seen, sizeof(seen))
    if seen.lkey != obj.lkey or seen.rkey != obj.rkey or seen.length != obj.length:
        disagree("mr")
    return <ibv_mr *>at
