/* SPDX-License-Identifier: MIT */
/* The NVMe controller against any commands, descriptors and doorbells. Input: one byte of choices, then what memory holds from
 * address 0 on: up to 8 commands for the I/O queue, then one for the admin queue, then whatever they point to. */
#include "flat.h"
#include "nvme.h"

enum { COMMANDS = 8, ADMIN = COMMANDS * 64, QUEUES = FLAT - 0x4000, BLOCKS = 256 };

static void bring_up(struct nvme_ctrl *c)
{
    nvme_write_reg(c, NVME_CC, 4, 0);
    nvme_write_reg(c, NVME_AQA, 4, 15 << 16 | 15);
    nvme_write_reg(c, NVME_ASQ, 8, QUEUES);
    nvme_write_reg(c, NVME_ACQ, 8, QUEUES + 0x1000);
    nvme_write_reg(c, NVME_CC, 4, 1);
    must(nvme_read_reg(c, NVME_CSTS, 4) == 1, "a reset brings it up");
    c->sq[1] = (struct nvme_sq){ QUEUES + 0x2000, 16, 0, 0, 1, true };
    c->cq[1] = (struct nvme_cq){ QUEUES + 0x3000, 16, 0, 0, 1, true, true };
}

static uint16_t one(struct nvme_ctrl *c, struct flat *m, struct nvme_cmd cmd)
{
    memcpy(m->bytes + QUEUES + 0x2000, &cmd, sizeof(cmd));
    nvme_write_reg(c, NVME_DOORBELLS + 8, 4, 1);
    for (int i = 0; i < 100 && c->cq[1].tail == 0; i++)
        nvme_work(c);
    struct nvme_cqe e;
    memcpy(&e, m->bytes + QUEUES + 0x3000, sizeof(e));
    must(e.cid == cmd.cid, "a good command completes");
    return e.status >> 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct flat m;
    if (size < 2 || size > QUEUES)
        return -1;
    flat_make(&m);
    struct nvme_ctrl *c = calloc(1, sizeof(*c));
    unsigned metas = data[0] & 8 ? 8 : 0;
    c->dev = &m.dev;
    c->block_shift = 9;
    c->blocks = BLOCKS;
    c->media = malloc(BLOCKS * 512);
    c->meta_size = metas;
    c->meta = malloc(BLOCKS * 8);
    memset(c->media, 0x5a, BLOCKS * 512);
    memset(c->meta, 0x5a, BLOCKS * 8);
    c->sgl = data[0] & 1;
    c->metaseg = data[0] & 2;
    c->random = data[0] & 4;
    c->mdts = data[0] & 16 ? 2 : 0;
    c->seed = 99;
    memcpy(m.bytes, data + 1, size - 1);
    bring_up(c);
    uint32_t n = 1 + (data[0] >> 5);
    memcpy(m.bytes + QUEUES + 0x2000, m.bytes, n * 64);
    nvme_write_reg(c, NVME_DOORBELLS + 8, 4, n);
    uint64_t before = c->commands;
    for (uint32_t i = 0; i < 64 && c->npend + (c->sq[1].tail != c->sq[1].head); i++)
        nvme_work(c);
    must(c->commands - before == n && !(c->csts & 2), "every command completes, and the controller lives");
    memcpy(m.bytes + QUEUES, m.bytes + ADMIN, 64);
    nvme_write_reg(c, NVME_DOORBELLS, 4, 1);
    nvme_work(c);
    if (size > 600) /* any register */
        nvme_write_reg(c, (data[599] | data[600] << 8) & 0x1fff, 4, data[598]);
    nvme_work(c);

    bring_up(c);
    struct nvme_cmd good = { .opcode = NVME_WRITE, .cid = 77, .nsid = 1, .prp1 = 0x1000, .mptr = 0x2000 };
    good.cdw10 = BLOCKS - 1;
    memset(m.bytes + 0x1000, 0xa7, 512);
    must(one(c, &m, good) == NVME_OK, "afterwards a good command succeeds");
    must(c->media[BLOCKS * 512 - 1] == 0xa7, "and does its work");
    free(c->media);
    free(c->meta);
    free(c);
    free(m.bytes);
    return 0;
}
