/* SPDX-License-Identifier: MIT */
/* An NVMe controller (NVM Express Base 2.0, NVM Command Set 1.0): registers, queues, descriptors and media. It sees memory
 * through struct dma_bus_ops alone, has no thread and needs no Python, so a fuzzer reaches it as it is. */
#ifndef DMAPATH_DEVICES_NVME_H
#define DMAPATH_DEVICES_NVME_H

#include "dmapath/dmapath.h"
#include "nvme_spec.h"

#define NVME_QUEUES 17u         /* the admin queue and 16 for I/O */
#define NVME_MQES 1023u         /* entries of a queue, 0's based */
#define NVME_EXTENTS 4096u      /* data descriptors of one command */
#define NVME_WINDOW 256u        /* commands fetched and not completed */
#define NVME_ERRORS 64u         /* entries of the error log */

/* A part of a command's buffer: where on the bus; bucket: bytes that go nowhere. */
struct nvme_extent { uint64_t addr; uint32_t len, bucket; };
struct nvme_list { uint32_t n; uint64_t bytes; struct nvme_extent e[NVME_EXTENTS]; };

/* What went wrong with a command: the status, and the byte and bit of the command that say so. */
struct nvme_error { uint64_t count; uint16_t sq, cid, status, byte, bit; uint64_t lba; uint32_t nsid; };

struct nvme_sq { uint64_t base; uint32_t size, head, tail, cq; bool live; };
struct nvme_cq { uint64_t base; uint32_t size, head, tail, users; bool live, phase; };
struct nvme_pending { struct nvme_cmd cmd; uint16_t sq; };

struct nvme_ctrl {
    struct dma_device *dev;         /* its own place on the bus; NULL: not attached */
    uint8_t *media, *meta;          /* blocks, and their metadata beside them */
    uint64_t blocks;
    uint32_t block_shift, meta_size;
    uint32_t mdts;                  /* pages of 4 KiB that a command may move, as a power of two; 0: no limit */
    bool sgl, metaseg, random;
    uint64_t seed;                  /* of the completion order */

    uint32_t cc, csts, aqa, intms;
    uint64_t asq, acq;
    struct nvme_sq sq[NVME_QUEUES];
    struct nvme_cq cq[NVME_QUEUES];

    struct nvme_pending pend[NVME_WINDOW];
    uint32_t npend;
    uint16_t at_byte, at_bit;       /* field that the command at hand was refused for */

    struct nvme_error log[NVME_ERRORS];
    uint64_t nerrors, bad_doorbells, commands, bytes_in, bytes_out;
    uint32_t fail_n, fail_status;   /* the next fail_n I/O commands complete with a status and do nothing */
    uint8_t features[16][4];
    struct nvme_list list, meta_list; /* of the command at hand */
    uint8_t scratch[4096];
};

void nvme_reset(struct nvme_ctrl *);
uint64_t nvme_read_reg(void *ctrl, uint64_t offset, unsigned width);
void nvme_write_reg(void *ctrl, uint64_t offset, unsigned width, uint64_t value);
/* Fetch what the doorbells announced and complete what there is room to complete; commands done. */
int nvme_work(void *ctrl);

/* Where `bytes` of data of a command lie; a status, and nothing was moved. */
int nvme_data_list(struct nvme_ctrl *, const struct nvme_cmd *, uint64_t bytes, bool to_host, struct nvme_list *);
int nvme_meta_list(struct nvme_ctrl *, const struct nvme_cmd *, uint64_t bytes, bool to_host, struct nvme_list *);
#endif
