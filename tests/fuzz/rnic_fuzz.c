/* SPDX-License-Identifier: MIT */
/* Two HCAs against any work queue entries, translation tables and commands. Input: one byte of choices, then what the near
 * one's memory holds from address 0 on: 8 work queue entries, 4 receives of the far one, a command, and whatever they name. */
#include "flat.h"
#include "rnic.h"

enum { FIRST = 0x4200, LAST = FIRST + 0x7000 }; /* the registered region, by a good table */
enum { RECVS = 8 * RNIC_STRIDE, COMMAND = 12 * RNIC_STRIDE, CQ = FLAT - 0x2000, PAGE_OF_COMMANDS = FLAT - 0x1000, TABLE = 0x3000 };

static uint32_t command(struct rnic *h, struct flat *m, struct rnic_command c)
{
    memcpy(m->bytes + PAGE_OF_COMMANDS, &c, sizeof(c));
    rnic_write_reg(h, RNIC_COMMAND, 8, PAGE_OF_COMMANDS);
    rnic_write_reg(h, RNIC_GO, 8, 1);
    memcpy(&c, m->bytes + PAGE_OF_COMMANDS, sizeof(c));
    must(c.status == 0, "a good command succeeds");
    return c.result;
}

static void connect_qp(struct rnic *h, struct flat *m, uint32_t qpn)
{
    for (uint32_t state = RNIC_RESET; state <= RNIC_RTS; state++) {
        struct rnic_command c = { .op = RNIC_MODIFY_QP, .id = qpn };
        c.modify.state = state;
        c.modify.remote = 1;
        c.modify.access = 15;
        command(h, m, c);
    }
}

/* Queue pair 1, on a completion queue of its own, connected. */
static void make_qp(struct rnic *h, struct flat *m)
{
    struct rnic_command cq = { .op = RNIC_CREATE_CQ }, qp = { .op = RNIC_CREATE_QP };
    cq.cq.addr = CQ;
    cq.cq.entries = 64;
    qp.qp.send_cq = qp.qp.recv_cq = command(h, m, cq);
    qp.qp.rq = RECVS;
    qp.qp.sq_entries = 8;
    qp.qp.rq_entries = 4;
    qp.qp.pd = 1;
    must(command(h, m, qp) == 1, "a place that is free is given");
    connect_qp(h, m, 1);
}

static uint32_t make_key(struct rnic *h, struct flat *m, uint64_t iova, uint64_t length, uint32_t access, uint32_t pages)
{
    struct rnic_command c = { .op = RNIC_CREATE_MKEY };
    c.mkey.iova = iova;
    c.mkey.length = length;
    c.mkey.mtt = TABLE;
    c.mkey.pd = 1;
    c.mkey.access = access;
    c.mkey.pages = pages;
    return command(h, m, c);
}

static void good_table(struct flat *m)
{
    for (uint64_t page = 0; page < 8; page++) {
        uint64_t at = 0x4000 + page * 4096;
        memcpy(m->bytes + TABLE + page * 8, &at, 8);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct flat m[2];
    struct rnic *h[2];
    if (size < 2 || size > CQ)
        return -1;
    for (int i = 0; i < 2; i++) {
        flat_make(&m[i]);
        h[i] = calloc(1, sizeof(struct rnic));
        h[i]->dev = &m[i].dev;
        memcpy(m[i].bytes, data + 1, size - 1);
    }
    h[0]->peer = h[1];
    h[1]->peer = h[0];
    for (int i = 0; i < 2; i++) {
        make_qp(h[i], &m[i]);
        make_key(h[i], &m[i], 0x10200, 0x7000, 15, 8);
        if (data[0] & 8) /* or the table that the input chose */
            good_table(&m[i]);
    }
    uint8_t *before = malloc(FLAT);
    memcpy(before, m[1].bytes, FLAT);
    rnic_write_reg(h[1], RNIC_RQ_BELLS + 8, 8, data[0] & 4 ? 4 : 0);
    rnic_write_reg(h[0], RNIC_SQ_BELLS + 8, 8, 1 + (data[0] >> 5));
    for (int i = 0; i < 20; i++)
        rnic_work(h[0]);
    if ((data[0] & 12) == 8) { /* without a receive, all that the far side's key and completions do not cover is as it was */
        must(!memcmp(m[1].bytes, before, FIRST), "nothing before the region changes");
        must(!memcmp(m[1].bytes + LAST, before + LAST, CQ - LAST), "nothing behind the region changes");
    }
    free(before);
    for (int i = 0; i < 2; i++) { /* any command, and any register */
        memcpy(m[i].bytes + PAGE_OF_COMMANDS, m[i].bytes + COMMAND, 64);
        rnic_write_reg(h[i], RNIC_GO, 8, 1);
        if (size > COMMAND + 80)
            rnic_write_reg(h[i], (data[COMMAND + 70] | data[COMMAND + 71] << 8) & 0x3fff, 8, data[COMMAND + 72]);
        rnic_work(h[i]);
    }
    for (int i = 0; i < 2; i++) { /* the place of queue pair 1 may have been given away by the command */
        struct rnic_command gone = { .op = RNIC_DESTROY_QP, .id = 1 };
        memcpy(m[i].bytes + PAGE_OF_COMMANDS, &gone, sizeof(gone));
        rnic_write_reg(h[i], RNIC_COMMAND, 8, PAGE_OF_COMMANDS);
        rnic_write_reg(h[i], RNIC_GO, 8, 1);
        make_qp(h[i], &m[i]);
        good_table(&m[i]);
    }
    uint32_t key = make_key(h[1], &m[1], 0, 0x1000, 3, 1);
    struct rnic_wqe good = { .id = 5, .op = RNIC_WRITE, .flags = RNIC_SIGNALED, .nsge = 1, .rkey = key };
    good.sge[0] = (struct rnic_sge){ 0x5000, 16, 0 };
    memset(m[0].bytes + 0x5000, 0xa7, 16);
    must(rnic_execute(h[0], 1, &good) == RNIC_OK, "afterwards a good request succeeds");
    must(m[1].bytes[0x4000] == 0xa7, "and does its work");
    for (int i = 0; i < 2; i++) {
        free(h[i]);
        free(m[i].bytes);
    }
    return 0;
}
