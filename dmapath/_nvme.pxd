# cython: language_level=3
"""What the NVMe driver and the controller both know, from the specification."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "nvme_spec.h" nogil:
    struct nvme_sgl:
        uint64_t addr
        uint32_t len
        uint8_t type
    struct nvme_cmd:
        uint8_t opcode
        uint8_t flags
        uint16_t cid
        uint32_t nsid
        uint64_t mptr
        uint64_t prp1
        uint64_t prp2
        uint32_t cdw10
        uint32_t cdw11
        uint32_t cdw12
    struct nvme_cqe:
        uint32_t result
        uint16_t sq_head
        uint16_t sq_id
        uint16_t cid
        uint16_t status
    enum:
        NVME_PAGE, NVME_DOORBELLS, NVME_STRIDE
        NVME_CAP, NVME_CC, NVME_CSTS, NVME_AQA, NVME_ASQ, NVME_ACQ
        NVME_DNR, NVME_NOT_READY
        NVME_ADMIN_DELETE_SQ, NVME_ADMIN_CREATE_SQ, NVME_ADMIN_DELETE_CQ, NVME_ADMIN_CREATE_CQ
        NVME_ADMIN_IDENTIFY, NVME_ADMIN_SET
        NVME_FLUSH, NVME_WRITE, NVME_READ, NVME_WRITE_ZEROES, NVME_DSM
        NVME_PSDT_METABUF, NVME_PSDT_METASEG
        NVME_SGL_DATA, NVME_SGL_LAST
