# cython: language_level=3
from libc.stdint cimport uint32_t, uintptr_t

from dmapath.verbs.ibv cimport ibv_context, ibv_mr, ibv_mw, ibv_pd

cdef const unsigned long *fork_count() noexcept nogil
cdef failed(str call, int code, str argument=*, value=*, str more=*)


cdef class Context:
    cdef ibv_context *c
    cdef object owner
    cdef unsigned long born
    cdef readonly dict attr, verified
    cdef readonly int port
    cdef int children  # protection domains and completion queues that were made in it
    cdef object made   # those of them that are alive (weakly)
    cdef limit(self, value, str name, str what)
    cdef bint alive(self) noexcept
    cdef ibv_context *ptr(self) except NULL
    cdef object __weakref__


cdef class Pd:
    cdef ibv_pd *c
    cdef object owner
    cdef readonly Context context
    cdef uintptr_t *watch(self) noexcept
    cdef readonly list qps  # weak references to the queue pairs made in it, which may name its regions in outstanding work
    cdef object made        # everything that was made in it and is alive (weakly)
    cdef bint covers(self, entry, bint write) except -1
    cdef ibv_pd *ptr(self) except NULL
    cdef object __weakref__


cdef class Mr:
    cdef ibv_mr *c
    cdef object owner, memory
    cdef Py_buffer view
    cdef bint held
    cdef readonly Pd pd
    cdef readonly unsigned int access
    cdef list windows
    cdef ibv_mr *ptr(self) except NULL
    cdef object __weakref__


cdef class Mw:
    cdef ibv_mw *c
    cdef readonly Pd pd
    cdef readonly int kind
    cdef public uint32_t rkey
    cdef public object bound
    cdef ibv_mw *ptr(self) except NULL
    cdef object __weakref__
