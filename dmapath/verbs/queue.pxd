# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t

from dmapath.verbs.ibv cimport (
    ibv_cq, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_state, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc,
    ibv_wr_opcode,
)
from dmapath.verbs.resources cimport Context, Pd


cdef class Cq:
    cdef ibv_cq *c
    cdef object owner
    cdef readonly Context context
    cdef readonly int cqe
    cdef ibv_wc *wc
    cdef dict qps      # number -> weak reference
    cdef Qp last       # of the completion before, most often of the next one too
    cdef ibv_cq *ptr(self) except NULL
    cdef int fetch(self, ibv_cq *cq, int n, uint64_t end) except -1
    cdef Qp owner_of(self, uint32_t qp_num)
    cdef int check_room(self, long n) except -1
    cdef int dispatch(self, uint64_t end) except -1
    cdef object __weakref__


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
    cdef bint own_cq
    cdef readonly uint32_t depth, recv_depth, max_sge, max_inline
    # rings: what is outstanding stands where it was built until it completes
    cdef ibv_send_wr *wr
    cdef ibv_sge *sge
    cdef uint64_t *request   # sequence number of the first work request of each one's request
    cdef ibv_recv_wr *rwr
    cdef ibv_sge *rsge
    cdef uint64_t head, tail, rhead, rtail
    cdef readonly object remote, info
    cdef dict how            # of the last connect
    cdef dict failures       # first sequence number of a request -> its failed Completion
    cdef object arrivals     # Completions of receives that somebody else's wait met
    cdef ibv_qp *ptr(self) except NULL
    cdef ibv_qp *ready(self, ibv_qp_state least) except NULL
    cdef object __weakref__
    cdef _adopt(self, of, Cq cq, Cq recv_cq, ibv_qp_init_attr *init)
    cdef _create(self, ibv_pd *pd, ibv_qp_init_attr *init)
    cdef _modify(self, ibv_qp_attr *attr, ibv_qp_state state, int mask, str argument=*, value=*)
    cdef _init(self, unsigned int access)
    cdef _ready_to_receive(self, remote, mtu, min_rnr_timer)
    cdef _ready_to_send(self, timeout, retry_cnt, rnr_retry)
    cdef int room(self, uint64_t n) except -1
    cdef ibv_send_wr *take(self, ibv_wr_opcode opcode, uint64_t first) noexcept nogil
    cdef int submit(self, ibv_qp *qp, uint64_t first) except -1
    cdef bint retire(self, const ibv_wc *wc) noexcept nogil
    cdef object describe(self, const ibv_wc *wc)
