# cython: language_level=3
from libc.stdint cimport uint32_t, uint64_t

from dmapath._core cimport lock
from dmapath._rnic cimport rnic_command, rnic_cqe, rnic_wqe
from dmapath.abi cimport dma_mmio
from dmapath.device cimport CoherentBuffer, Device

# how commands reach the HCA: one at a time, through a page that both sides see
cdef struct rnic_port:
    const dma_mmio *regs
    rnic_command *page
    lock lock

cdef int run_command(rnic_port *port, rnic_command *c) noexcept nogil


cdef class Context:
    cdef rnic_port port
    cdef readonly object hca
    cdef readonly Device device
    cdef readonly dict attr
    cdef CoherentBuffer page
    cdef uint32_t next_pd
    cdef readonly int children
    cdef uint32_t command(self, rnic_command *c, what) except? 0xffffffff
    cdef destroy(self, uint32_t op, uint32_t number, what)
    cdef int must_live(self) except -1


cdef class Pd:
    cdef readonly Context context
    cdef readonly uint32_t number


cdef class Mr:
    cdef readonly Pd pd
    cdef readonly object addr, length
    cdef readonly uint32_t lkey, rkey
    cdef readonly int access
    cdef object mapping, memory
    cdef CoherentBuffer table
    cdef bint live
    cdef int must_live(self) except -1


cdef class FastMr:
    cdef readonly Pd pd
    cdef readonly uint32_t key, max_pages
    cdef readonly object addr, length
    cdef CoherentBuffer table
    cdef uint64_t *pages
    cdef bint live
    cdef int must_live(self) except -1


cdef class Cq:
    cdef readonly Context context
    cdef readonly int cqe
    cdef uint32_t number
    cdef CoherentBuffer ring
    cdef uint64_t head
    cdef dict qps
    cdef bint live
    cdef int must_live(self) except -1
    cdef list fetch(self, int n)
    cdef list wait_for(self, int n, uint64_t end)
    cdef int dispatch(self, uint64_t end) except -1


cdef class Qp:
    cdef readonly Pd pd
    cdef readonly Cq send_cq, recv_cq
    cdef readonly uint32_t qp_num, depth, recv_depth
    cdef readonly int max_sge, max_inline
    cdef readonly str state
    cdef CoherentBuffer sq, rq
    cdef uint64_t head, tail, rhead, rtail
    cdef list first             # of each slot: sequence number of the first work request of its request
    cdef object remote, how, arrivals
    cdef dict failures
    cdef bint live, own_cq
    cdef object __weakref__
    cdef rnic_wqe *take(self, uint32_t op, uint64_t first) except NULL
    cdef int must_live(self) except -1
    cdef submit(self)
    cdef to_state(self, uint32_t state, uint32_t remote, uint32_t access, uint32_t rnr_retry, str name)
    cdef object seen(self, const rnic_cqe *e)
