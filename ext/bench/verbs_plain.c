/* SPDX-License-Identifier: MIT */
#include "verbs_plain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* This thread's own time: on one processor the device's kernel thread runs in the midst of a call. */
static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int plain_register(struct ibv_pd *pd, const struct plain_range *r, uint32_t n, unsigned access, uint32_t rounds, uint64_t *reg_ns,
                   uint64_t *dereg_ns)
{
    struct ibv_mr **mr = calloc(n, sizeof(*mr));
    if (!mr)
        return -ENOMEM;
    int rc = 0;
    for (uint32_t k = 0; k < rounds && !rc; k++) {
        uint32_t i;
        uint64_t t0 = now_ns();
        for (i = 0; i < n; i++) {
            mr[i] = ibv_reg_mr(pd, r[i].addr, r[i].len, access);
            if (!mr[i]) {
                rc = errno ? -errno : -EIO;
                break;
            }
        }
        uint64_t t1 = now_ns();
        while (i--) {
            int one = ibv_dereg_mr(mr[i]);
            rc = rc ? rc : -one;
        }
        reg_ns[k] = t1 - t0;
        dereg_ns[k] = now_ns() - t1;
    }
    free(mr);
    return rc;
}

static void build(const struct plain_write *w, struct ibv_send_wr *wr, struct ibv_sge *sge)
{
    memset(wr, 0, sizeof(*wr) * w->batch);
    for (uint32_t i = 0; i < w->batch; i++) {
        sge[i] = (struct ibv_sge){ w->addr, w->len, w->lkey };
        wr[i].wr_id = i;
        wr[i].sg_list = &sge[i];
        wr[i].num_sge = 1;
        wr[i].opcode = IBV_WR_RDMA_WRITE;
        wr[i].wr.rdma.remote_addr = w->remote_addr;
        wr[i].wr.rdma.rkey = w->rkey;
        wr[i].next = &wr[i + 1];
    }
    wr[w->batch - 1].next = NULL;
    wr[w->batch - 1].send_flags = IBV_SEND_SIGNALED;
}

int64_t plain_write_batch(const struct plain_write *w, struct ibv_send_wr *wr, struct ibv_sge *sge)
{
    struct ibv_send_wr *bad;
    struct ibv_wc wc;
    uint64_t start = now_ns();
    int rc;
    build(w, wr, sge);
    rc = ibv_post_send(w->qp, wr, &bad);
    if (rc)
        return -rc;
    do
        rc = ibv_poll_cq(w->cq, 1, &wc);
    while (rc == 0);
    if (rc < 0 || wc.status != IBV_WC_SUCCESS)
        return -EIO;
    return (int64_t)(now_ns() - start);
}

int plain_write_parts(const struct plain_write *w, struct ibv_send_wr *wr, struct ibv_sge *sge, uint64_t wait_ns, uint64_t out[3])
{
    struct timespec pause = { (time_t)(wait_ns / 1000000000u), (long)(wait_ns % 1000000000u) };
    struct ibv_send_wr *bad;
    struct ibv_wc wc;
    uint64_t t0 = cpu_ns(), t1, t2;
    int rc;
    build(w, wr, sge);
    t1 = cpu_ns();
    rc = ibv_post_send(w->qp, wr, &bad);
    t2 = cpu_ns();
    if (rc)
        return -rc;
    out[0] = t1 - t0;
    out[1] = t2 - t1;
    nanosleep(&pause, NULL);
    t0 = cpu_ns();
    rc = ibv_poll_cq(w->cq, 1, &wc);
    out[2] = cpu_ns() - t0;
    return rc == 1 && wc.status == IBV_WC_SUCCESS ? 0 : -EIO;
}
