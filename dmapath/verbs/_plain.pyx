# cython: language_level=3
"""The peers of measurements: plain C loops on libibverbs (ext/bench/verbs_plain.c), without dmapath between two calls."""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from dmapath.memory cimport PhysMemory
from dmapath.verbs.ibv cimport ibv_cq, ibv_pd, ibv_qp, ibv_send_wr, ibv_sge
from dmapath.verbs.queue cimport Qp
from dmapath.verbs.resources cimport Pd, failed

from dmapath.verbs.resources import pin_text

cdef extern from "verbs_plain.h" nogil:
    struct plain_range:
        void *addr
        uint64_t len
    struct plain_write:
        ibv_qp *qp
        ibv_cq *cq
        uint64_t addr, remote_addr
        uint32_t lkey, rkey, len, batch
    int plain_register(ibv_pd *, const plain_range *, uint32_t, unsigned int, uint32_t, uint64_t *, uint64_t *)
    int64_t plain_write_batch(const plain_write *, ibv_send_wr *, ibv_sge *)
    int plain_write_parts(const plain_write *, ibv_send_wr *, ibv_sge *, uint64_t, uint64_t *)


def register(Pd pd not None, PhysMemory memory not None, places, unsigned int access, uint32_t rounds):
    """Median nanoseconds of registering [(offset, bytes)] of an arena one by one with ibv_reg_mr, and of undoing it."""
    cdef uint32_t n = len(places), i
    cdef plain_range *ranges = <plain_range *>calloc(n, sizeof(plain_range))
    cdef uint64_t *ns = <uint64_t *>calloc(2 * rounds, sizeof(uint64_t))
    cdef ibv_pd *p = pd.ptr()
    cdef int rc = -ENOMEM
    try:
        if ranges != NULL and ns != NULL:
            for i in range(n):
                ranges[i].addr, ranges[i].len = memory.arena + <size_t>places[i][0], places[i][1]
            with nogil:
                rc = plain_register(p, ranges, n, access, rounds, ns, ns + rounds)
        if rc:
            total = sum(k for _, k in places)
            raise failed("ibv_reg_mr", -rc, "places", total, pin_text(total) if rc == -ENOMEM else "")
        halves = [sorted([ns[half * rounds + i] for i in range(rounds)])[rounds // 2] for half in (0, 1)]
        return halves[0], halves[1]
    finally:
        free(ranges)
        free(ns)


cdef class Writer:
    """RDMA WRITEs of ``length`` bytes from one address to another, in batches, as a C program does them."""

    cdef plain_write w
    cdef ibv_send_wr *wr
    cdef ibv_sge *sge
    cdef Qp qp

    def __cinit__(self, Qp qp not None, *, addr, lkey, remote_addr, rkey, length, batch):
        self.qp = qp
        self.w.qp, self.w.cq = qp.ptr(), qp.send_cq.ptr()
        self.w.addr, self.w.lkey, self.w.remote_addr, self.w.rkey = addr, lkey, remote_addr, rkey
        self.w.len, self.w.batch = length, batch
        self.wr = <ibv_send_wr *>calloc(batch, sizeof(ibv_send_wr))
        self.sge = <ibv_sge *>calloc(batch, sizeof(ibv_sge))
        if self.wr == NULL or self.sge == NULL:
            raise MemoryError("no memory for work requests")

    def run(self):
        """Build, post and poll one batch; nanoseconds."""
        cdef int64_t ns
        self.w.qp, self.w.cq = self.qp.ptr(), self.qp.send_cq.ptr()
        with nogil:
            ns = plain_write_batch(&self.w, self.wr, self.sge)
        if ns < 0:
            raise failed("a plain RDMA WRITE", <int>-ns)
        return ns

    def parts(self, uint64_t wait_ns):
        """Nanoseconds of this thread's own time for building, posting and polling one batch, with a pause for the device
        before the poll."""
        cdef uint64_t out[3]
        cdef int rc
        with nogil:
            rc = plain_write_parts(&self.w, self.wr, self.sge, wait_ns, out)
        if rc:
            raise failed("a plain RDMA WRITE", -rc)
        return out[0], out[1], out[2]

    def __dealloc__(self):
        free(self.wr)
        free(self.sge)
