/* SPDX-License-Identifier: MIT */
/* What the simulated HCA and its driver both know: registers, commands, work queue entries, completions. The layouts are
 * dmapath's own; meanings, access rights and status codes are those of verbs (InfiniBand Architecture 1.5, chapters 10, 11). */
#ifndef DMAPATH_DEVICES_RNIC_SPEC_H
#define DMAPATH_DEVICES_RNIC_SPEC_H

#include <stdint.h>

#define RNIC_PAGE 4096u
#define RNIC_SGES 12u            /* of a work request */
#define RNIC_INLINE 192u         /* bytes of data within one */
#define RNIC_STRIDE 256u         /* bytes of a work queue entry */
#define RNIC_MAX_MESSAGE (1u << 30)
#define RNIC_MKEYS 8192u
#define RNIC_QPS 256u
#define RNIC_CQS 256u

/* Registers. Doorbells carry a counter that runs on (not an index): entries posted, or completions taken. */
enum { RNIC_COMMAND = 0, RNIC_GO = 8, RNIC_EVENTS = 0x10, RNIC_SQ_BELLS = 0x1000, RNIC_RQ_BELLS = 0x2000, RNIC_CQ_BELLS = 0x3000 };

/* Access rights, as enum ib_access_flags; lkey 0 names bus addresses themselves, for local use (the reserved L_Key). */
enum { RNIC_LOCAL_WRITE = 1, RNIC_REMOTE_WRITE = 2, RNIC_REMOTE_READ = 4, RNIC_REMOTE_ATOMIC = 8 };

enum { RNIC_CREATE_CQ = 1, RNIC_DESTROY_CQ, RNIC_CREATE_QP, RNIC_MODIFY_QP, RNIC_DESTROY_QP, RNIC_CREATE_MKEY, RNIC_DESTROY_MKEY };
enum { RNIC_RESET, RNIC_INIT, RNIC_RTR, RNIC_RTS, RNIC_ERROR = 6 };
enum { RNIC_MKEY_FREE = 1 }; /* for fast registration: holds a place, names nothing yet */

/* A command, in memory: the device writes status (0 or an errno) and result. */
struct rnic_command {
    uint32_t op, id;                /* id: CQ, QP or key */
    union {
        struct { uint64_t addr; uint32_t entries; } cq;
        struct { uint64_t sq, rq; uint32_t sq_entries, rq_entries, pd, send_cq, recv_cq; } qp;
        struct { uint32_t state, remote, access, rnr_retry; } modify;
        struct { uint64_t iova, length, mtt; uint32_t pd, access, pages, flags; } mkey;
        uint8_t room[48];
    };
    int32_t status;
    uint32_t result;
};

enum { RNIC_SEND, RNIC_SEND_INV, RNIC_WRITE, RNIC_WRITE_IMM, RNIC_READ, RNIC_CMP_SWP, RNIC_FETCH_ADD, RNIC_LOCAL_INV, RNIC_REG_MR,
       RNIC_OPS };
enum { RNIC_SIGNALED = 1, RNIC_INLINED = 2, RNIC_IMM = 4 };
struct rnic_sge { uint64_t addr; uint32_t len, key; };
/* A work queue entry. REG_MR: remote_addr is the IOVA, compare the bytes, swap the address of the page list, rkey the key, imm
 * its access rights. LOCAL_INV and SEND_INV: imm is the key. */
struct rnic_wqe {
    uint64_t id;
    uint8_t op, flags, nsge, rsvd;
    uint32_t imm;
    uint64_t remote_addr, compare, swap;
    uint32_t rkey, inline_len;
    uint8_t pad[16];
    union { struct rnic_sge sge[RNIC_SGES]; uint8_t data[RNIC_INLINE]; };
};
_Static_assert(sizeof(struct rnic_wqe) == RNIC_STRIDE && sizeof(struct rnic_command) == 64, "as both sides lay them out");

/* A completion. owner: 1 in odd rounds over the ring, 0 in even ones. */
enum { RNIC_WC_RECV = 128, RNIC_WC_RECV_IMM = 129 };
enum { RNIC_WC_HAS_IMM = 1, RNIC_WC_INVALIDATED = 2 };
struct rnic_cqe { uint64_t id; uint32_t len, qpn, imm; uint8_t status, op, flags, owner; uint64_t rsvd; };
_Static_assert(sizeof(struct rnic_cqe) == 32, "as both sides lay it out");

/* enum ib_wc_status */
enum { RNIC_OK, RNIC_LOC_LEN, RNIC_LOC_QP_OP, RNIC_LOC_PROT = 4, RNIC_FLUSH, RNIC_BAD_RESP = 7, RNIC_REM_INV_REQ = 9,
       RNIC_REM_ACCESS, RNIC_REM_OP, RNIC_RETRY, RNIC_RNR_RETRY };
#endif
