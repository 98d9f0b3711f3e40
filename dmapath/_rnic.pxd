# cython: language_level=3
"""What the simulated HCA and its driver both know."""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from "rnic_spec.h" nogil:
    enum:
        RNIC_PAGE, RNIC_SGES, RNIC_INLINE, RNIC_STRIDE, RNIC_MAX_MESSAGE
        RNIC_COMMAND, RNIC_GO, RNIC_SQ_BELLS, RNIC_RQ_BELLS, RNIC_CQ_BELLS
        RNIC_CREATE_CQ, RNIC_DESTROY_CQ, RNIC_CREATE_QP, RNIC_MODIFY_QP, RNIC_DESTROY_QP, RNIC_CREATE_MKEY
        RNIC_DESTROY_MKEY, RNIC_MKEY_FREE
        RNIC_RESET, RNIC_INIT, RNIC_RTR, RNIC_RTS, RNIC_ERROR
        RNIC_SEND, RNIC_SEND_INV, RNIC_WRITE, RNIC_WRITE_IMM, RNIC_READ, RNIC_CMP_SWP, RNIC_FETCH_ADD, RNIC_LOCAL_INV
        RNIC_REG_MR
        RNIC_SIGNALED, RNIC_INLINED, RNIC_IMM
        RNIC_WC_RECV, RNIC_WC_HAS_IMM, RNIC_WC_INVALIDATED
    struct cmd_cq:
        uint64_t addr
        uint32_t entries
    struct cmd_qp:
        uint64_t sq, rq
        uint32_t sq_entries, rq_entries, pd, send_cq, recv_cq
    struct cmd_modify:
        uint32_t state, remote, access, rnr_retry
    struct cmd_mkey:
        uint64_t iova, length, mtt
        uint32_t pd, access, pages, flags
    struct rnic_command:
        uint32_t op, id
        cmd_cq cq
        cmd_qp qp
        cmd_modify modify
        cmd_mkey mkey
        int32_t status
        uint32_t result
    struct rnic_sge:
        uint64_t addr
        uint32_t len, key
    struct rnic_wqe:
        uint64_t id
        uint8_t op, flags, nsge
        uint32_t imm
        uint64_t remote_addr, compare, swap
        uint32_t rkey, inline_len
        rnic_sge sge[12]
        uint8_t data[192]
    struct rnic_cqe:
        uint64_t id
        uint32_t len, qpn, imm
        uint8_t status, op, flags, owner
