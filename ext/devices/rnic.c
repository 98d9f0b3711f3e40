/* SPDX-License-Identifier: MIT */
#include "rnic.h"

enum { NOT_READY = -1 };

static bool bus(struct rnic *h, uint64_t addr, void *buf, uint64_t n, bool to_host)
{
    struct dma_fault fault;
    if (dma_range_wraps(addr, n) || h->dev->bus->access(h->dev, dma_addr(addr), n, buf, to_host, &fault)) {
        h->faults++;
        return false;
    }
    return true;
}

/* ---- memory keys --------------------------------------------------------------------------------------------------------- */

static struct rnic_mkey *mkey_of(struct rnic *h, uint32_t key)
{
    uint32_t i = key >> 8;
    struct rnic_mkey *m = i && i < RNIC_MKEYS ? &h->mkey[i] : NULL;
    return m && m->live && m->variant == (key & 255) ? m : NULL;
}

/* May [addr, addr + n) be used under a key for `access`? (rxe's lookup_mr and mr_check_range.) Nothing is asked of 0 bytes. */
static bool allowed(struct rnic *h, uint32_t pd, uint32_t key, uint64_t addr, uint64_t n, uint32_t access, bool local)
{
    if (!n)
        return true;
    if (local && !key)
        return !dma_range_wraps(addr, n);
    const struct rnic_mkey *m = mkey_of(h, key);
    return m && m->valid && m->pd == pd && (m->access & access) == access && addr >= m->iova && n <= m->length &&
           addr - m->iova <= m->length - n;
}

/* Move bytes under a key that `allowed` let through: page by page of its translation table. */
static bool move_keyed(struct rnic *h, uint32_t key, uint64_t addr, uint8_t *buf, uint64_t n, bool to_host)
{
    if (!n)
        return true;
    if (!key)
        return bus(h, addr, buf, n, to_host);
    const struct rnic_mkey *m = mkey_of(h, key);
    uint64_t at = (m->iova & (RNIC_PAGE - 1)) + (addr - m->iova); /* from the start of the first page */
    uint64_t table[64];
    uint64_t have = 0, first = 0;
    while (n) {
        uint64_t page = at / RNIC_PAGE, off = at % RNIC_PAGE, take = RNIC_PAGE - off < n ? RNIC_PAGE - off : n;
        if (page >= m->pages)
            return false;
        if (page >= first + have) {
            uint64_t want = (off + n + RNIC_PAGE - 1) / RNIC_PAGE;
            first = page;
            have = want < 64 ? want : 64;
            have = have < m->pages - page ? have : m->pages - page;
            h->mtt_reads++;
            if (!bus(h, m->mtt + page * 8, table, have * 8, false))
                return false;
        }
        uint64_t base = table[page - first];
        while (take < n && page + 1 < first + have && table[page + 1 - first] &&
               table[page + 1 - first] == table[page - first] + RNIC_PAGE) {
            uint64_t more = n - take < RNIC_PAGE ? n - take : RNIC_PAGE; /* neighbours are one access */
            take += more;
            page++;
        }
        if (!bus(h, base + off, buf, take, to_host))
            return false;
        buf += take;
        at += take;
        n -= take;
    }
    return true;
}

static bool invalidate(struct rnic *h, uint32_t pd, uint32_t key)
{
    struct rnic_mkey *m = mkey_of(h, key);
    if (!m || m->pd != pd || !m->valid)
        return false;
    m->valid = false;
    return true;
}

/* Do `length` bytes at iova fit a key of so many pages, and does its table of them end below 2^64? */
static bool key_fits(uint64_t iova, uint64_t length, uint64_t mtt, uint32_t pages)
{
    uint64_t last = (iova & (RNIC_PAGE - 1)) + (length - 1); /* from the start of the first page */
    return length && last >= length - 1 && !dma_range_wraps(iova, length) && last / RNIC_PAGE < pages &&
           !dma_range_wraps(mtt, pages * 8ull);
}

/* Fast registration: only the low 8 bits of a key are the consumer's to choose (rxe_reg_fast_mr). */
static bool reg_mr(struct rnic *h, uint32_t pd, const struct rnic_wqe *w)
{
    uint32_t i = w->rkey >> 8;
    struct rnic_mkey *m = i && i < RNIC_MKEYS ? &h->mkey[i] : NULL;
    if (!m || !m->live || m->valid || m->pd != pd || w->imm & ~15u ||
        (w->imm & (RNIC_REMOTE_WRITE | RNIC_REMOTE_ATOMIC) && !(w->imm & RNIC_LOCAL_WRITE)) ||
        !key_fits(w->remote_addr, w->compare, w->swap, m->pages))
        return false;
    m->variant = (uint8_t)w->rkey;
    m->access = w->imm;
    m->iova = w->remote_addr;
    m->length = w->compare;
    m->mtt = w->swap;
    m->valid = true;
    return true;
}

/* ---- a message's local side: gathered from, or scattered to, its entries --------------------------------------------------- */

struct cursor { const struct rnic_sge *sge; const uint8_t *inlined; uint32_t n, i; uint64_t pos; };

static bool move_entries(struct rnic *h, struct cursor *c, uint8_t *buf, uint64_t n, bool to_host)
{
    if (c->inlined) {
        memcpy(buf, c->inlined + c->pos, n);
        c->pos += n;
        return true;
    }
    while (n) {
        const struct rnic_sge *s = &c->sge[c->i];
        uint64_t take = s->len - c->pos < n ? s->len - c->pos : n;
        if (take && !move_keyed(h, s->key, s->addr + c->pos, buf, take, to_host))
            return false;
        buf += take;
        n -= take;
        c->pos += take;
        if (c->pos == s->len) {
            c->i++;
            c->pos = 0;
        }
    }
    return true;
}

/* Bytes of a work request's entries, or a status: count, keys and rights. */
static int check_entries(struct rnic *h, uint32_t pd, const struct rnic_wqe *w, uint32_t access, uint64_t *bytes)
{
    *bytes = 0;
    if (w->flags & RNIC_INLINED) {
        *bytes = w->inline_len;
        return access || w->inline_len > RNIC_INLINE ? RNIC_LOC_QP_OP : RNIC_OK;
    }
    if (w->nsge > RNIC_SGES)
        return RNIC_LOC_QP_OP;
    for (uint32_t i = 0; i < w->nsge; i++) {
        if (!allowed(h, pd, w->sge[i].key, w->sge[i].addr, w->sge[i].len, access, true))
            return RNIC_LOC_PROT;
        *bytes += w->sge[i].len;
    }
    return *bytes > RNIC_MAX_MESSAGE ? RNIC_LOC_LEN : RNIC_OK;
}

static struct cursor cursor_of(const struct rnic_wqe *w)
{
    return (struct cursor){ w->sge, w->flags & RNIC_INLINED ? w->data : NULL, w->nsge, 0, 0 };
}

/* ---- completions ------------------------------------------------------------------------------------------------------------ */

static void complete(struct rnic *h, uint32_t cqn, struct rnic_cqe e)
{
    struct rnic_cq *q = &h->cq[cqn];
    if (!q->live || q->broken)
        return;
    if (q->tail - q->head == q->entries) { /* an overflow breaks the queue, and every queue pair on it */
        q->broken = true;
        h->events++;
        for (uint32_t i = 1; i < h->qps; i++)
            if (h->qp[i].live && (h->qp[i].send_cq == cqn || h->qp[i].recv_cq == cqn))
                h->qp[i].state = RNIC_ERROR;
        return;
    }
    e.owner = !(q->tail / q->entries & 1);
    if (!bus(h, q->addr + q->tail % q->entries * sizeof(e), &e, sizeof(e), true)) {
        q->broken = true;
        h->events++;
        return;
    }
    q->tail++;
}

static bool fetch(struct rnic *h, uint64_t ring, uint64_t at, uint32_t entries, struct rnic_wqe *out)
{
    return bus(h, ring + at % entries * RNIC_STRIDE, out, sizeof(*out), false);
}

/* What is still posted on a queue pair in error comes back as flushed. */
static void flush_queues(struct rnic *h, uint32_t qpn)
{
    struct rnic_qp *q = &h->qp[qpn];
    struct rnic_wqe w;
    for (; q->sq_head != q->sq_tail; q->sq_head++) {
        if (!fetch(h, q->sq, q->sq_head, q->sq_entries, &w))
            w.id = 0, w.op = RNIC_SEND;
        complete(h, q->send_cq, (struct rnic_cqe){ .id = w.id, .qpn = qpn, .status = RNIC_FLUSH, .op = w.op });
    }
    for (; q->rq_head != q->rq_tail; q->rq_head++) {
        if (!fetch(h, q->rq, q->rq_head, q->rq_entries, &w))
            w.id = 0;
        complete(h, q->recv_cq, (struct rnic_cqe){ .id = w.id, .qpn = qpn, .status = RNIC_FLUSH, .op = RNIC_WC_RECV });
    }
}

static void fail(struct rnic *h, uint32_t qpn)
{
    if (h->qp[qpn].state != RNIC_RESET)
        h->qp[qpn].state = RNIC_ERROR;
}

/* ---- the responder ------------------------------------------------------------------------------------------------------------ */

/* The queue pair at the other end, or NULL: it would not answer. */
static struct rnic_qp *responder(struct rnic *h, const struct rnic_qp *q)
{
    struct rnic *p = h->peer;
    if (!p || !p->dev || !q->remote || q->remote >= RNIC_QPS)
        return NULL;
    struct rnic_qp *r = &p->qp[q->remote];
    return r->live && (r->state == RNIC_RTR || r->state == RNIC_RTS) ? r : NULL;
}

/* The next receive of the responder. A receive whose own entries are bad takes the responder down. */
static int take_receive(struct rnic *p, uint32_t rqpn, uint64_t bytes, struct rnic_wqe *w)
{
    struct rnic_qp *r = &p->qp[rqpn];
    uint64_t room;
    if (r->rq_head == r->rq_tail)
        return NOT_READY;
    if (!fetch(p, r->rq, r->rq_head, r->rq_entries, w)) {
        fail(p, rqpn);
        return RNIC_REM_OP;
    }
    r->rq_head++;
    w->flags = 0;
    int rc = check_entries(p, r->pd, w, RNIC_LOCAL_WRITE, &room);
    if (rc || room < bytes) {
        rc = rc ? rc : RNIC_LOC_LEN;
        complete(p, r->recv_cq, (struct rnic_cqe){ .id = w->id, .qpn = rqpn, .status = (uint8_t)rc, .op = RNIC_WC_RECV });
        fail(p, rqpn);
        return rc == RNIC_LOC_LEN ? RNIC_REM_INV_REQ : RNIC_REM_OP;
    }
    return RNIC_OK;
}

/* ---- the requester ---------------------------------------------------------------------------------------------------------- */

/* Carry bytes between local entries and one end of the wire, piece by piece. */
static int stream(struct rnic *h, struct cursor *mine, struct rnic *p, struct cursor *theirs, uint64_t n, bool to_me)
{
    for (uint64_t done = 0; done < n;) {
        uint64_t take = n - done < sizeof(h->staging) ? n - done : sizeof(h->staging);
        if (to_me ? !move_entries(p, theirs, h->staging, take, false) : !move_entries(h, mine, h->staging, take, false))
            return to_me ? RNIC_REM_OP : RNIC_LOC_PROT;
        if (to_me ? !move_entries(h, mine, h->staging, take, true) : !move_entries(p, theirs, h->staging, take, true))
            return to_me ? RNIC_LOC_PROT : RNIC_REM_OP;
        done += take;
    }
    return RNIC_OK;
}

static int atomic(struct rnic *h, struct rnic *p, const struct rnic_wqe *w)
{
    uint64_t old, next;
    struct cursor mine = cursor_of(w);
    if (!move_keyed(p, w->rkey, w->remote_addr, (uint8_t *)&old, 8, false))
        return RNIC_REM_OP;
    next = w->op == RNIC_FETCH_ADD ? old + w->swap : old == w->compare ? w->swap : old;
    if (!move_keyed(p, w->rkey, w->remote_addr, (uint8_t *)&next, 8, true))
        return RNIC_REM_OP;
    return move_entries(h, &mine, (uint8_t *)&old, 8, true) ? RNIC_OK : RNIC_LOC_PROT;
}

static uint32_t right_wanted(uint8_t op)
{
    switch (op) {
    case RNIC_WRITE: case RNIC_WRITE_IMM: return RNIC_REMOTE_WRITE;
    case RNIC_READ: return RNIC_REMOTE_READ;
    case RNIC_CMP_SWP: case RNIC_FETCH_ADD: return RNIC_REMOTE_ATOMIC;
    }
    return 0;
}

int rnic_execute(struct rnic *h, uint32_t qpn, const struct rnic_wqe *w)
{
    struct rnic_qp *q = &h->qp[qpn];
    uint32_t right = right_wanted(w->op);
    bool to_me = w->op == RNIC_READ || w->op == RNIC_CMP_SWP || w->op == RNIC_FETCH_ADD;
    uint64_t bytes;
    if (w->op >= RNIC_OPS)
        return RNIC_LOC_QP_OP;
    if (w->op == RNIC_LOCAL_INV)
        return invalidate(h, q->pd, w->imm) ? RNIC_OK : RNIC_LOC_QP_OP;
    if (w->op == RNIC_REG_MR)
        return reg_mr(h, q->pd, w) ? RNIC_OK : RNIC_LOC_QP_OP;
    int rc = check_entries(h, q->pd, w, to_me ? RNIC_LOCAL_WRITE : 0, &bytes);
    if (rc)
        return rc;
    if (right == RNIC_REMOTE_ATOMIC && bytes != 8)
        return RNIC_LOC_LEN;

    struct rnic_qp *r = responder(h, q);
    struct rnic *p = h->peer;
    struct rnic_wqe receive;
    if (!r)
        return RNIC_RETRY;
    if (right && !(r->access & right)) { /* the queue pair does not serve that */
        fail(p, q->remote);
        return RNIC_REM_INV_REQ;
    }
    if (right == RNIC_REMOTE_ATOMIC && w->remote_addr & 7) {
        fail(p, q->remote);
        return RNIC_REM_INV_REQ;
    }
    if (right && !allowed(p, r->pd, w->rkey, w->remote_addr, bytes, right, false)) {
        fail(p, q->remote);
        return RNIC_REM_ACCESS;
    }
    bool receives = w->op == RNIC_SEND || w->op == RNIC_SEND_INV || w->op == RNIC_WRITE_IMM;
    if (receives) {
        rc = take_receive(p, q->remote, w->op == RNIC_WRITE_IMM ? 0 : bytes, &receive);
        if (rc)
            return rc;
    }
    struct rnic_sge far = { w->remote_addr, (uint32_t)bytes, w->rkey };
    struct cursor mine = cursor_of(w), theirs = { &far, NULL, 1, 0, 0 };
    if (w->op == RNIC_SEND || w->op == RNIC_SEND_INV)
        theirs = cursor_of(&receive);
    if (right == RNIC_REMOTE_ATOMIC)
        rc = atomic(h, p, w);
    else
        rc = stream(h, &mine, p, &theirs, bytes, to_me);
    if (rc == RNIC_REM_OP)
        fail(p, q->remote);
    if (receives) {
        struct rnic_cqe e = { .id = receive.id, .len = (uint32_t)bytes, .qpn = q->remote, .op = RNIC_WC_RECV };
        if (w->op == RNIC_WRITE_IMM)
            e.op = RNIC_WC_RECV_IMM;
        if (w->op == RNIC_WRITE_IMM || w->flags & RNIC_IMM) {
            e.flags |= RNIC_WC_HAS_IMM;
            e.imm = w->imm;
        }
        if (rc == RNIC_OK && w->op == RNIC_SEND_INV) {
            e.flags |= RNIC_WC_INVALIDATED;
            e.imm = w->imm;
            if (!invalidate(p, r->pd, w->imm)) {
                e.status = RNIC_LOC_PROT;
                fail(p, q->remote);
                rc = RNIC_REM_OP;
            }
        }
        if (rc == RNIC_REM_OP && !e.status)
            e.status = RNIC_LOC_PROT;
        if (rc == RNIC_LOC_PROT) { /* the message never came whole: its receive waits for another */
            r->rq_head--;
            return rc;
        }
        complete(p, r->recv_cq, e);
    }
    h->bytes += rc ? 0 : bytes;
    return rc;
}

/* ---- queues ------------------------------------------------------------------------------------------------------------------- */

static int serve(struct rnic *h, uint32_t qpn)
{
    struct rnic_qp *q = &h->qp[qpn];
    struct rnic_wqe w;
    int done = 0;
    while (q->live && q->state == RNIC_RTS && q->sq_head != q->sq_tail) {
        if (!fetch(h, q->sq, q->sq_head, q->sq_entries, &w)) {
            fail(h, qpn);
            h->events++;
            break;
        }
        int rc = rnic_execute(h, qpn, &w);
        if (rc == NOT_READY) {
            if (q->rnr_retry == 7) /* for ever */
                break;
            if (q->rnr_tries++ < q->rnr_retry)
                break;
            rc = RNIC_RNR_RETRY;
        }
        q->rnr_tries = 0;
        q->sq_head++;
        h->requests++;
        done++;
        if (rc)
            fail(h, qpn);
        if (rc || w.flags & RNIC_SIGNALED)
            complete(h, q->send_cq, (struct rnic_cqe){ .id = w.id, .qpn = qpn, .status = (uint8_t)rc, .op = w.op });
    }
    if (q->live && q->state == RNIC_ERROR && (q->sq_head != q->sq_tail || q->rq_head != q->rq_tail)) {
        flush_queues(h, qpn);
        done++;
    }
    return done;
}

int rnic_work(void *hca)
{
    struct rnic *h = hca;
    int done = 0;
    if (!h->dev)
        return 0;
    for (uint32_t i = 1; i < h->qps; i++)
        if (h->qp[i].live)
            done += serve(h, i);
    struct rnic *p = h->peer; /* time passes at both ends of the wire */
    for (uint32_t i = 1; p && p != h && p->dev && i < p->qps; i++)
        if (p->qp[i].live)
            done += serve(p, i);
    return done;
}

/* ---- commands ------------------------------------------------------------------------------------------------------------------ */

static int free_place(const bool *live, size_t step, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++)
        if (!*(const bool *)((const char *)live + i * step))
            return (int)i;
    return -ENOSPC;
}

static bool ring_ok(uint64_t addr, uint32_t entries, uint32_t stride)
{
    return entries && entries <= 1u << 16 && !(addr & 63) && !dma_range_wraps(addr, (uint64_t)entries * stride);
}

static int create_qp(struct rnic *h, const struct rnic_command *c)
{
    if (!ring_ok(c->qp.sq, c->qp.sq_entries, RNIC_STRIDE) || !ring_ok(c->qp.rq, c->qp.rq_entries, RNIC_STRIDE) ||
        c->qp.send_cq >= RNIC_CQS || c->qp.recv_cq >= RNIC_CQS || !h->cq[c->qp.send_cq].live || !h->cq[c->qp.recv_cq].live || !c->qp.pd)
        return -EINVAL;
    int n = free_place(&h->qp[0].live, sizeof(h->qp[0]), RNIC_QPS);
    if (n < 0)
        return n;
    h->qp[n] = (struct rnic_qp){ .live = true, .pd = c->qp.pd, .send_cq = c->qp.send_cq, .recv_cq = c->qp.recv_cq,
                                 .sq = c->qp.sq, .rq = c->qp.rq, .sq_entries = c->qp.sq_entries, .rq_entries = c->qp.rq_entries };
    h->qps = (uint32_t)n + 1 > h->qps ? (uint32_t)n + 1 : h->qps;
    return n;
}

/* reset -> init -> rtr -> rts, from any to error or reset (IBA 10.3.1) */
static int modify_qp(struct rnic *h, const struct rnic_command *c)
{
    struct rnic_qp *q = c->id && c->id < RNIC_QPS ? &h->qp[c->id] : NULL;
    uint32_t to = c->modify.state;
    if (!q || !q->live)
        return -ENOENT;
    if (to == RNIC_RESET) {
        q->sq_head = q->sq_tail = q->rq_head = q->rq_tail = 0;
    } else if (to == RNIC_INIT && q->state == RNIC_RESET) {
        q->access = c->modify.access;
    } else if (to == RNIC_RTR && q->state == RNIC_INIT) {
        q->remote = c->modify.remote;
    } else if (to == RNIC_RTS && q->state == RNIC_RTR) {
        q->rnr_retry = c->modify.rnr_retry & 7;
        q->rnr_tries = 0;
    } else if (to != RNIC_ERROR) {
        return -EINVAL;
    }
    q->state = to;
    return 0;
}

static int create_mkey(struct rnic *h, const struct rnic_command *c)
{
    bool empty = c->mkey.flags & RNIC_MKEY_FREE;
    if (!c->mkey.pd || !c->mkey.pages || c->mkey.pages > 1u << 20 || c->mkey.access & ~15u)
        return -EINVAL;
    if (!empty && !key_fits(c->mkey.iova, c->mkey.length, c->mkey.mtt, c->mkey.pages))
        return -EINVAL;
    for (uint32_t tried = 0; tried < RNIC_MKEYS; tried++) {
        uint32_t i = h->next_key++ % RNIC_MKEYS; /* a key comes back as late as possible */
        struct rnic_mkey *m = &h->mkey[i];
        if (!i || m->live)
            continue;
        uint8_t variant = (uint8_t)(m->variant + 1);
        *m = (struct rnic_mkey){ true, !empty, variant, c->mkey.pd, c->mkey.access, c->mkey.pages, c->mkey.iova,
                                 c->mkey.length, c->mkey.mtt };
        h->keys++;
        return (int)(i << 8 | variant);
    }
    return -ENOSPC;
}

static int destroy_mkey(struct rnic *h, uint32_t key)
{
    struct rnic_mkey *m = key >> 8 && key >> 8 < RNIC_MKEYS ? &h->mkey[key >> 8] : NULL;
    if (!m || !m->live)
        return -ENOENT;
    m->live = m->valid = false;
    h->keys--;
    return 0;
}

static int command(struct rnic *h, const struct rnic_command *c)
{
    int n;
    switch (c->op) {
    case RNIC_CREATE_CQ:
        if (!ring_ok(c->cq.addr, c->cq.entries, sizeof(struct rnic_cqe)))
            return -EINVAL;
        n = free_place(&h->cq[0].live, sizeof(h->cq[0]), RNIC_CQS);
        if (n > 0)
            h->cq[n] = (struct rnic_cq){ .live = true, .addr = c->cq.addr, .entries = c->cq.entries }, h->cqs++;
        return n;
    case RNIC_DESTROY_CQ:
        if (!c->id || c->id >= RNIC_CQS || !h->cq[c->id].live)
            return -ENOENT;
        for (uint32_t i = 1; i < h->qps; i++)
            if (h->qp[i].live && (h->qp[i].send_cq == c->id || h->qp[i].recv_cq == c->id))
                return -EBUSY;
        h->cq[c->id].live = false;
        h->cqs--;
        return 0;
    case RNIC_CREATE_QP: return create_qp(h, c);
    case RNIC_MODIFY_QP: return modify_qp(h, c);
    case RNIC_DESTROY_QP:
        if (!c->id || c->id >= RNIC_QPS || !h->qp[c->id].live)
            return -ENOENT;
        h->qp[c->id].live = false;
        return 0;
    case RNIC_CREATE_MKEY: return create_mkey(h, c);
    case RNIC_DESTROY_MKEY: return destroy_mkey(h, c->id);
    }
    return -EOPNOTSUPP;
}

/* ---- registers ------------------------------------------------------------------------------------------------------------------ */

uint64_t rnic_read_reg(void *hca, uint64_t offset, unsigned width)
{
    struct rnic *h = hca;
    (void)width;
    return offset == RNIC_COMMAND ? h->command : offset == RNIC_EVENTS ? h->events : 0;
}

static void run_command(struct rnic *h)
{
    struct rnic_command c;
    if (!h->dev || !bus(h, h->command, &c, sizeof(c), false)) {
        h->events++;
        return;
    }
    int rc = command(h, &c);
    struct { int32_t status; uint32_t result; } answer = { rc < 0 ? -rc : 0, rc < 0 ? 0 : (uint32_t)rc };
    if (!bus(h, h->command + offsetof(struct rnic_command, status), &answer, sizeof(answer), true))
        h->events++;
}

/* A counter may run ahead of what was taken by a ring's entries at most. */
static void bell(struct rnic *h, uint64_t *tail, uint64_t head, uint32_t entries, uint64_t value)
{
    if (value - head > entries)
        h->events++;
    else
        *tail = value;
}

void rnic_write_reg(void *hca, uint64_t offset, unsigned width, uint64_t value)
{
    struct rnic *h = hca;
    uint64_t n = (offset & 0xfff) / 8;
    (void)width;
    if (offset == RNIC_COMMAND)
        h->command = value;
    else if (offset == RNIC_GO)
        run_command(h);
    else if (offset & 7 || offset < RNIC_SQ_BELLS || offset >= RNIC_CQ_BELLS + 0x1000 || !n || n >= RNIC_QPS)
        h->events++;
    else if (offset < RNIC_CQ_BELLS && !h->qp[n].live)
        h->events++;
    else if (offset < RNIC_RQ_BELLS)
        bell(h, &h->qp[n].sq_tail, h->qp[n].sq_head, h->qp[n].sq_entries, value);
    else if (offset < RNIC_CQ_BELLS)
        bell(h, &h->qp[n].rq_tail, h->qp[n].rq_head, h->qp[n].rq_entries, value);
    else if (h->cq[n].live)
        bell(h, &h->cq[n].head, h->cq[n].head, (uint32_t)(h->cq[n].tail - h->cq[n].head), value);
}
