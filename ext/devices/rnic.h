/* SPDX-License-Identifier: MIT */
/* An RDMA host channel adapter: memory keys with translation tables in memory, reliable connected queue pairs, completion
 * queues, and a wire to another one (or to itself). It sees memory through struct dma_bus_ops alone. */
#ifndef DMAPATH_DEVICES_RNIC_H
#define DMAPATH_DEVICES_RNIC_H

#include "dmapath/dmapath.h"
#include "rnic_spec.h"

struct rnic_mkey { bool live, valid; uint8_t variant; uint32_t pd, access, pages; uint64_t iova, length, mtt; };
struct rnic_cq { bool live, broken; uint64_t addr, head, tail; uint32_t entries; };
struct rnic_qp {
    bool live;
    uint32_t state, pd, send_cq, recv_cq, sq_entries, rq_entries, remote, access, rnr_retry, rnr_tries;
    uint64_t sq, rq, sq_head, sq_tail, rq_head, rq_tail;
};
struct rnic {
    struct dma_device *dev;
    struct rnic *peer;          /* the other end of the wire; NULL: unplugged */
    uint64_t command;
    struct rnic_mkey mkey[RNIC_MKEYS];
    struct rnic_qp qp[RNIC_QPS];
    struct rnic_cq cq[RNIC_CQS];
    uint32_t keys, qps, cqs;    /* live ones; of QPs, the highest number in use + 1 */
    uint32_t next_key;
    uint64_t requests, bytes, faults, mtt_reads, events;
    uint8_t staging[16384];
};

uint64_t rnic_read_reg(void *, uint64_t offset, unsigned width);
void rnic_write_reg(void *, uint64_t offset, unsigned width, uint64_t value);
/* Carry out what was posted; requests done. */
int rnic_work(void *);
/* One work queue entry of a queue pair, as it lies in memory; its completion status. -1: the receiver is not ready, try again. */
int rnic_execute(struct rnic *, uint32_t qpn, const struct rnic_wqe *);
#endif
