/* SPDX-License-Identifier: MIT */
/* What NVMe drivers and controllers both know: layouts, opcodes and status codes (NVM Express Base 2.0, NVM Command Set 1.0). */
#ifndef DMAPATH_DEVICES_NVME_SPEC_H
#define DMAPATH_DEVICES_NVME_SPEC_H

#include <stdint.h>

#define NVME_PAGE 4096u
#define NVME_STRIDE 4u          /* bytes between doorbells (CAP.DSTRD) */
#define NVME_DOORBELLS 0x1000u
enum { NVME_CAP = 0, NVME_VS = 8, NVME_CC = 0x14, NVME_CSTS = 0x1c, NVME_AQA = 0x24, NVME_ASQ = 0x28, NVME_ACQ = 0x30 };

struct nvme_sgl { uint64_t addr; uint32_t len; uint8_t rsvd[3], type; };
struct nvme_cmd {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr;
    union { struct { uint64_t prp1, prp2; }; struct nvme_sgl sgl; };
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
struct nvme_cqe { uint32_t result, rsvd; uint16_t sq_head, sq_id, cid, status; };
_Static_assert(sizeof(struct nvme_cmd) == 64 && sizeof(struct nvme_cqe) == 16, "as the specification lays them out");

/* Status, as in bits 15:1 of a completion's status word: code, type << 8, do not retry << 14. */
enum nvme_status {
    NVME_OK = 0, NVME_BAD_OPCODE = 0x01, NVME_BAD_FIELD = 0x02, NVME_ID_CONFLICT = 0x03, NVME_DATA_TRANSFER = 0x04,
    NVME_INTERNAL = 0x06, NVME_ABORTED_SQ = 0x08, NVME_BAD_NS = 0x0b, NVME_SGL_SEGMENT = 0x0d, NVME_SGL_COUNT = 0x0e,
    NVME_SGL_LENGTH = 0x0f, NVME_SGL_META_LENGTH = 0x10, NVME_SGL_TYPE = 0x11, NVME_PRP_OFFSET = 0x13,
    NVME_LBA_RANGE = 0x80, NVME_NOT_READY = 0x82,
    NVME_CQ_INVALID = 0x100, NVME_QID = 0x101, NVME_QSIZE = 0x102, NVME_VECTOR = 0x108, NVME_QDELETE = 0x10c,
    NVME_DNR = 0x4000,
};
enum { NVME_ADMIN_DELETE_SQ, NVME_ADMIN_CREATE_SQ, NVME_ADMIN_LOG, NVME_ADMIN_DELETE_CQ = 4, NVME_ADMIN_CREATE_CQ,
       NVME_ADMIN_IDENTIFY, NVME_ADMIN_ABORT = 8, NVME_ADMIN_SET, NVME_ADMIN_GET };
enum { NVME_FLUSH, NVME_WRITE, NVME_READ, NVME_WRITE_ZEROES = 8, NVME_DSM };
enum { NVME_SGL_DATA, NVME_SGL_BUCKET, NVME_SGL_SEG, NVME_SGL_LAST };
enum { NVME_PSDT_METABUF = 0x40, NVME_PSDT_METASEG = 0x80 };
#endif
