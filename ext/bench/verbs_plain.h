/* SPDX-License-Identifier: MIT */
/* What a C program does without dmapath: the peer of its measurements. Times are nanoseconds, of CLOCK_MONOTONIC where nothing else is said. */
#ifndef DMAPATH_VERBS_PLAIN_H
#define DMAPATH_VERBS_PLAIN_H

#include <infiniband/verbs.h>
#include <stdint.h>

struct plain_range { void *addr; uint64_t len; };

/* Register n ranges one by one and deregister them, `rounds` times: ns of each round's two halves. 0 or -errno. */
int plain_register(struct ibv_pd *, const struct plain_range *, uint32_t n, unsigned access, uint32_t rounds, uint64_t *reg_ns,
                   uint64_t *dereg_ns);

/* RDMA WRITEs of one region into another, in batches of which the last asks for a completion. */
struct plain_write {
    struct ibv_qp *qp;
    struct ibv_cq *cq;
    uint64_t addr, remote_addr;
    uint32_t lkey, rkey, len, batch;
};
/* Build, post and poll one batch: ns in all, or -errno (-EIO: a completion failed). The work requests are the caller's room. */
int64_t plain_write_batch(const struct plain_write *, struct ibv_send_wr *, struct ibv_sge *);
/* The three parts apart, in this thread's processor time: ns of building, of posting, and of the one poll that finds the
 * completion after a pause. */
int plain_write_parts(const struct plain_write *, struct ibv_send_wr *, struct ibv_sge *, uint64_t wait_ns, uint64_t out[3]);

#endif
