# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t

from dmapath.verbs.ibv cimport (
    ibv_context, ibv_cq, ibv_mr, ibv_mw, ibv_pd, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc, ibv_wr_opcode,
)


cdef class Context:
    cdef ibv_context *c
    cdef object owner
    cdef readonly dict attr
    cdef readonly int port
    cdef readonly dict verified
    cdef bint open_
    cdef ibv_context *ptr(self) except NULL
    cdef object __weakref__


cdef class Pd:
    cdef ibv_pd *c
    cdef object owner
    cdef readonly Context context
    cdef object qps
    cdef ibv_pd *ptr(self) except NULL
    cdef object __weakref__


cdef class Cq:
    cdef ibv_cq *c
    cdef object owner
    cdef readonly Context context
    cdef readonly int cqe
    cdef ibv_wc *wc
    cdef dict qps
    cdef Qp last
    cdef ibv_cq *ptr(self) except NULL
    cdef object __weakref__
    cdef int fetch(self, ibv_cq *cq, int n, double timeout) except -1
    cdef Qp owner_of(self, uint32_t qp_num)


cdef class Mr:
    cdef ibv_mr *c
    cdef object owner, memory, pid
    cdef Py_buffer view
    cdef bint held
    cdef readonly Pd pd
    cdef readonly size_t offset
    cdef list windows
    cdef ibv_mr *ptr(self) except NULL


cdef class Mw:
    cdef ibv_mw *c
    cdef readonly Pd pd
    cdef readonly int kind
    cdef readonly uint32_t rkey
    cdef readonly object bound
    cdef ibv_mw *ptr(self) except NULL


cdef class Batch:
    cdef uint64_t *addr
    cdef uint64_t *remote
    cdef uint32_t *length
    cdef uint32_t *lkey
    cdef uint32_t *rkey
    cdef readonly uint32_t n


cdef class Qp:
    cdef ibv_qp *c
    cdef object owner
    cdef readonly Pd pd
    cdef readonly Cq send_cq, recv_cq
    cdef readonly uint32_t depth, recv_depth, max_sge, max_inline
    cdef ibv_send_wr *wr
    cdef ibv_sge *sge
    cdef uint64_t *request
    cdef ibv_recv_wr *rwr
    cdef ibv_sge *rsge
    cdef uint64_t head, tail, rhead, rtail
    cdef readonly object remote
    cdef dict connect_how
    cdef readonly object info
    cdef dict failed
    cdef ibv_qp *ptr(self) except NULL
    cdef object __weakref__
    cdef int room(self, uint64_t n) except -1
    cdef ibv_send_wr *take(self, ibv_wr_opcode opcode, uint64_t first) noexcept nogil
    cdef int submit(self, ibv_qp *qp, uint64_t first) except -1
    cdef bint retire(self, const ibv_wc *wc) noexcept nogil
    cdef object describe(self, const ibv_wc *wc)
