/* SPDX-License-Identifier: MIT */
#include "nvme.h"

#include <stdlib.h>

/* ---- memory, through the bus ---------------------------------------------------------------------------------------- */

static bool dma_moves(struct nvme_ctrl *c, uint64_t addr, void *buf, uint64_t n, bool to_host)
{
    struct dma_fault fault;
    if (dma_range_wraps(addr, n))
        return false;
    return c->dev->bus->access(c->dev, dma_addr(addr), n, buf, to_host, &fault) == 0;
}

/* Refuse the command at hand for a field of it: byte and bit of the command (Error Information log, parameter location). */
static int refuse(struct nvme_ctrl *c, int status, unsigned byte, unsigned bit)
{
    c->at_byte = (uint16_t)byte;
    c->at_bit = (uint16_t)bit;
    return status | NVME_DNR;
}

enum { AT_OPCODE = 0, AT_FLAGS = 1, AT_NSID = 4, AT_MPTR = 16, AT_DPTR = 24, AT_DPTR2 = 32, AT_SGL_LEN = 32, AT_SGL_TYPE = 39,
       AT_CDW10 = 40, AT_CDW11 = 44, AT_CDW12 = 48 };

/* ---- descriptors: where a command's bytes are ------------------------------------------------------------------------- */

static int add_extent(struct nvme_ctrl *c, struct nvme_list *l, uint64_t addr, uint64_t len, bool bucket)
{
    struct nvme_extent *last = l->n ? &l->e[l->n - 1] : NULL;
    l->bytes += len;
    if (last && !bucket && !last->bucket && addr && last->addr + last->len == addr &&
        last->len + len < UINT32_MAX) {
        last->len += (uint32_t)len; /* neighbours are one access */
        return NVME_OK;
    }
    if (l->n == NVME_EXTENTS)
        return refuse(c, NVME_SGL_COUNT, AT_DPTR, 0);
    l->e[l->n++] = (struct nvme_extent){ addr, (uint32_t)len, bucket };
    return NVME_OK;
}

/* PRP entries: the first may begin inside a page, at a dword; every other is a page; the last entry of a page of list is
 * the next page of list while more data is to come (Base 4.1.1). */
static int walk_prp(struct nvme_ctrl *c, uint64_t prp1, uint64_t prp2, uint64_t bytes, struct nvme_list *l)
{
    uint64_t entries[NVME_PAGE / 8];
    uint64_t n = NVME_PAGE - (prp1 & (NVME_PAGE - 1));
    if (prp1 & 3)
        return refuse(c, NVME_PRP_OFFSET, AT_DPTR, 0);
    n = n < bytes ? n : bytes;
    int rc = add_extent(c, l, prp1, n, false);
    bytes -= n;
    if (rc || !bytes)
        return rc;
    if (bytes <= NVME_PAGE) {
        if (prp2 & (NVME_PAGE - 1))
            return refuse(c, NVME_PRP_OFFSET, AT_DPTR2, 0);
        return add_extent(c, l, prp2, bytes, false);
    }
    if (prp2 & 7) /* the first page of list may begin inside a page, at a qword */
        return refuse(c, NVME_PRP_OFFSET, AT_DPTR2, 0);
    while (bytes) {
        uint64_t room = (NVME_PAGE - (prp2 & (NVME_PAGE - 1))) / 8;
        uint64_t want = (bytes + NVME_PAGE - 1) / NVME_PAGE;
        bool chained = want > room;
        uint64_t take = chained ? room : want;
        if (!dma_moves(c, prp2, entries, take * 8, false))
            return refuse(c, NVME_DATA_TRANSFER, AT_DPTR2, 0) & ~NVME_DNR;
        for (uint64_t i = 0; i < take - chained; i++) {
            n = bytes < NVME_PAGE ? bytes : NVME_PAGE;
            if (entries[i] & (NVME_PAGE - 1))
                return refuse(c, NVME_PRP_OFFSET, AT_DPTR2, 0);
            rc = add_extent(c, l, entries[i], n, false);
            if (rc)
                return rc;
            bytes -= n;
        }
        if (chained) {
            prp2 = entries[take - 1];
            if (prp2 & (NVME_PAGE - 1))
                return refuse(c, NVME_PRP_OFFSET, AT_DPTR2, 0);
        }
    }
    return NVME_OK;
}

/* An SGL from its first descriptor on (Base 4.1.2). Segments are read 16 descriptors at a time. */
static int walk_sgl(struct nvme_ctrl *c, struct nvme_sgl d, uint64_t bytes, bool to_host, struct nvme_list *l, int too_long)
{
    struct nvme_sgl block[16];
    uint64_t at = 0, left = 0, seen = 0; /* of the segment that is being read: address and descriptors to come */
    uint32_t have = 0, next = 0;
    bool last = false;                   /* that segment may name no further one */
    for (bool first = true;; first = false) {
        if (!first) {
            if (next == have) {
                if (!left)
                    break;
                have = left < 16 ? (uint32_t)left : 16;
                if (!dma_moves(c, at, block, have * 16ull, false))
                    return refuse(c, NVME_DATA_TRANSFER, AT_DPTR, 0) & ~NVME_DNR;
                at += have * 16ull;
                left -= have;
                next = 0;
            }
            d = block[next++];
        }
        if (++seen > NVME_EXTENTS)
            return refuse(c, NVME_SGL_COUNT, AT_DPTR, 0);
        if (d.type & 15)
            return refuse(c, NVME_SGL_TYPE, AT_SGL_TYPE, 0);
        bool ends = !first && next == have && !left; /* the last descriptor of its segment */
        switch (d.type >> 4) {
        case NVME_SGL_DATA:
            if (ends && !last)
                return refuse(c, NVME_SGL_SEGMENT, AT_SGL_TYPE, 4);
            if (dma_range_wraps(d.addr, d.len))
                return refuse(c, NVME_DATA_TRANSFER, AT_DPTR, 0);
            if (l->bytes + d.len > bytes)
                return refuse(c, too_long, AT_SGL_LEN, 0);
            if (d.len) {
                int rc = add_extent(c, l, d.addr, d.len, false);
                if (rc)
                    return rc;
            }
            break;
        case NVME_SGL_BUCKET:
            if (ends && !last)
                return refuse(c, NVME_SGL_SEGMENT, AT_SGL_TYPE, 4);
            if (!to_host || !d.len) /* of data that the host gives it has no effect */
                break;
            if (l->bytes + d.len > bytes)
                return refuse(c, too_long, AT_SGL_LEN, 0);
            int rc = add_extent(c, l, 0, d.len, true);
            if (rc)
                return rc;
            break;
        case NVME_SGL_SEG:
        case NVME_SGL_LAST:
            if ((!first && !ends) || last) /* only the last descriptor of a segment leads on */
                return refuse(c, NVME_SGL_SEGMENT, AT_SGL_TYPE, 4);
            if (!d.len || d.len & 15)
                return refuse(c, NVME_SGL_SEGMENT, AT_SGL_LEN, 0);
            last = d.type >> 4 == NVME_SGL_LAST;
            at = d.addr;
            left = d.len / 16;
            have = next = 0;
            continue;
        default:
            return refuse(c, NVME_SGL_TYPE, AT_SGL_TYPE, 4);
        }
        if (first)
            break;
    }
    return l->bytes == bytes ? NVME_OK : refuse(c, too_long, AT_SGL_LEN, 0);
}

int nvme_data_list(struct nvme_ctrl *c, const struct nvme_cmd *cmd, uint64_t bytes, bool to_host, struct nvme_list *l)
{
    unsigned psdt = cmd->flags & 0xc0;
    l->n = 0;
    l->bytes = 0;
    if (psdt == 0)
        return walk_prp(c, cmd->prp1, cmd->prp2, bytes, l);
    if (!c->sgl || psdt == 0xc0 || (psdt == NVME_PSDT_METASEG && !c->metaseg))
        return refuse(c, NVME_BAD_FIELD, AT_FLAGS, 6);
    return walk_sgl(c, cmd->sgl, bytes, to_host, l, NVME_SGL_LENGTH);
}

int nvme_meta_list(struct nvme_ctrl *c, const struct nvme_cmd *cmd, uint64_t bytes, bool to_host, struct nvme_list *l)
{
    struct nvme_sgl first;
    l->n = 0;
    l->bytes = 0;
    if ((cmd->flags & 0xc0) != NVME_PSDT_METASEG) {
        if (cmd->mptr & 3)
            return refuse(c, NVME_BAD_FIELD, AT_MPTR, 0);
        return add_extent(c, l, cmd->mptr, bytes, false);
    }
    if (cmd->mptr & 7)
        return refuse(c, NVME_SGL_SEGMENT, AT_MPTR, 0);
    if (!dma_moves(c, cmd->mptr, &first, sizeof(first), false))
        return refuse(c, NVME_DATA_TRANSFER, AT_MPTR, 0) & ~NVME_DNR;
    return walk_sgl(c, first, bytes, to_host, l, NVME_SGL_META_LENGTH);
}

static int move(struct nvme_ctrl *c, const struct nvme_list *l, uint8_t *where, bool to_host)
{
    for (uint32_t i = 0; i < l->n; i++) {
        if (!l->e[i].bucket && !dma_moves(c, l->e[i].addr, where, l->e[i].len, to_host))
            return refuse(c, NVME_DATA_TRANSFER, AT_DPTR, 0) & ~NVME_DNR;
        where += l->e[i].len;
    }
    return NVME_OK;
}

/* A command's whole buffer of n bytes: descriptors first, so that a bad one moves nothing. */
static int transfer(struct nvme_ctrl *c, const struct nvme_cmd *cmd, void *buf, uint64_t n, bool to_host)
{
    int rc = nvme_data_list(c, cmd, n, to_host, &c->list);
    return rc ? rc : move(c, &c->list, buf, to_host);
}

/* ---- the NVM command set ----------------------------------------------------------------------------------------------- */

static int check_range(struct nvme_ctrl *c, uint64_t lba, uint64_t n)
{
    return lba >= c->blocks || n > c->blocks - lba ? refuse(c, NVME_LBA_RANGE, AT_CDW10, 0) : NVME_OK;
}

static int read_write(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint64_t lba = cmd->cdw10 | (uint64_t)cmd->cdw11 << 32, n = (cmd->cdw12 & 0xffff) + 1ull, bytes = n << c->block_shift;
    bool to_host = cmd->opcode == NVME_READ;
    if (cmd->cdw12 & 0x3c000000) /* protection information is not what this namespace is formatted with */
        return refuse(c, NVME_BAD_FIELD, AT_CDW12 + 3, 2);
    if (c->mdts && bytes > (uint64_t)NVME_PAGE << c->mdts)
        return refuse(c, NVME_BAD_FIELD, AT_CDW12, 0);
    int rc = check_range(c, lba, n);
    if (!rc) /* every descriptor is looked at before a byte moves */
        rc = nvme_data_list(c, cmd, bytes, to_host, &c->list);
    if (!rc && c->meta_size)
        rc = nvme_meta_list(c, cmd, n * c->meta_size, to_host, &c->meta_list);
    if (!rc)
        rc = move(c, &c->list, c->media + (lba << c->block_shift), to_host);
    if (!rc && c->meta_size)
        rc = move(c, &c->meta_list, c->meta + lba * c->meta_size, to_host);
    if (!rc)
        *(to_host ? &c->bytes_out : &c->bytes_in) += bytes;
    return rc;
}

static void zero(struct nvme_ctrl *c, uint64_t lba, uint64_t n)
{
    memset(c->media + (lba << c->block_shift), 0, n << c->block_shift);
    if (c->meta_size)
        memset(c->meta + lba * c->meta_size, 0, n * c->meta_size);
}

static int write_zeroes(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint64_t lba = cmd->cdw10 | (uint64_t)cmd->cdw11 << 32, n = (cmd->cdw12 & 0xffff) + 1ull;
    int rc = check_range(c, lba, n);
    if (!rc)
        zero(c, lba, n);
    return rc;
}

/* Dataset Management: deallocated blocks read as zeros. */
static int dataset(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    struct { uint32_t attr, n; uint64_t lba; } r[256];
    uint32_t count = (cmd->cdw10 & 0xff) + 1;
    int rc = transfer(c, cmd, r, count * sizeof(r[0]), false);
    for (uint32_t i = 0; !rc && i < count; i++)
        rc = r[i].n ? check_range(c, r[i].lba, r[i].n) : NVME_OK;
    for (uint32_t i = 0; !rc && cmd->cdw11 & 4 && i < count; i++)
        if (r[i].n)
            zero(c, r[i].lba, r[i].n);
    return rc;
}

static int io_command(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    if (cmd->flags & 3) /* no fused operations */
        return refuse(c, NVME_BAD_FIELD, AT_FLAGS, 0);
    if (cmd->nsid != 1 && !(cmd->opcode == NVME_FLUSH && cmd->nsid == UINT32_MAX))
        return refuse(c, NVME_BAD_NS, AT_NSID, 0);
    if (c->fail_n) {
        c->fail_n--;
        return (int)c->fail_status;
    }
    switch (cmd->opcode) {
    case NVME_FLUSH:
        return NVME_OK; /* nothing is held back */
    case NVME_READ:
    case NVME_WRITE:
        return read_write(c, cmd);
    case NVME_WRITE_ZEROES:
        return write_zeroes(c, cmd);
    case NVME_DSM:
        return dataset(c, cmd);
    }
    return refuse(c, NVME_BAD_OPCODE, AT_OPCODE, 0);
}

/* ---- the admin command set --------------------------------------------------------------------------------------------- */

static void put32(uint8_t *at, uint32_t v) { memcpy(at, &v, 4); }
static void put64(uint8_t *at, uint64_t v) { memcpy(at, &v, 8); }
static void put_text(uint8_t *at, const char *text, size_t width)
{
    size_t n = strlen(text);
    memset(at, ' ', width);
    memcpy(at, text, n < width ? n : width);
}

static int identify(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint8_t *d = c->scratch;
    memset(d, 0, NVME_PAGE);
    switch (cmd->cdw10 & 0xff) {
    case 0: /* the namespace */
        if (cmd->nsid != 1)
            return refuse(c, NVME_BAD_NS, AT_NSID, 0);
        put64(d, c->blocks);
        put64(d + 8, c->blocks);
        put64(d + 16, c->blocks);
        d[33] = 1 << 3 | 1;                                          /* DLFEAT: deallocated blocks read as zeros */
        put32(d + 128, c->meta_size | c->block_shift << 16);         /* LBA format 0 */
        break;
    case 1: /* the controller */
        put_text(d + 4, "0001", 20);
        put_text(d + 24, "dmapath NVMe controller", 40);
        put_text(d + 64, "1", 8);
        d[77] = (uint8_t)c->mdts;
        put32(d + 80, 0x20000);
        d[111] = 1;                                                  /* an I/O controller */
        d[262] = NVME_ERRORS - 1;                                    /* ELPE */
        d[512] = 6 << 4 | 6;
        d[513] = 4 << 4 | 4;
        put32(d + 516, 1);
        put32(d + 520, 1 << 2 | 1 << 3);                             /* ONCS: dataset management, write zeroes */
        if (c->sgl) /* any alignment; bit buckets; metadata at any byte; and as an SGL */
            put32(d + 536, 1 | 1 << 16 | 1 << 17 | (c->metaseg ? 1u << 19 : 0));
        break;
    case 2: /* active namespaces above nsid */
        if (cmd->nsid >= 0xfffffffe)
            return refuse(c, NVME_BAD_NS, AT_NSID, 0);
        put32(d, cmd->nsid < 1 ? 1 : 0);
        break;
    case 3: /* identifiers of the namespace */
        if (cmd->nsid != 1)
            return refuse(c, NVME_BAD_NS, AT_NSID, 0);
        d[0] = 3;
        d[1] = 16;
        put_text(d + 4, "dmapath-simnvme", 16);
        break;
    default:
        return refuse(c, NVME_BAD_FIELD, AT_CDW10, 0);
    }
    return transfer(c, cmd, d, NVME_PAGE, true);
}

static int log_page(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint64_t n = ((cmd->cdw10 >> 16 | (uint64_t)(cmd->cdw11 & 0xffff) << 16) + 1) * 4;
    if ((cmd->cdw10 & 0xff) != 1)
        return refuse(c, 0x109, AT_CDW10, 0); /* invalid log page */
    if (n > NVME_PAGE)
        return refuse(c, NVME_BAD_FIELD, AT_CDW10 + 2, 0);
    memset(c->scratch, 0, NVME_PAGE);
    for (uint32_t i = 0; i < NVME_ERRORS && i < c->nerrors; i++) { /* newest first */
        const struct nvme_error *e = &c->log[(c->nerrors - 1 - i) % NVME_ERRORS];
        uint8_t *d = c->scratch + i * 64;
        put64(d, e->count);
        put32(d + 8, e->sq | (uint32_t)e->cid << 16);
        put32(d + 12, (uint32_t)(uint16_t)(e->status << 1) | (uint32_t)(e->byte | e->bit << 8) << 16);
        put64(d + 16, e->lba);
        put32(d + 24, e->nsid);
    }
    return transfer(c, cmd, c->scratch, n, true);
}

static int create_cq(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint32_t id = cmd->cdw10 & 0xffff, size = (cmd->cdw10 >> 16) + 1;
    if (!id || id >= NVME_QUEUES || c->cq[id].live)
        return refuse(c, NVME_QID, AT_CDW10, 0);
    if (size < 2 || size > NVME_MQES + 1)
        return refuse(c, NVME_QSIZE, AT_CDW10 + 2, 0);
    if (!(cmd->cdw11 & 1)) /* queues lie in one piece (CAP.CQR) */
        return refuse(c, NVME_BAD_FIELD, AT_CDW11, 0);
    if (cmd->cdw11 >> 16 >= NVME_QUEUES)
        return refuse(c, NVME_VECTOR, AT_CDW11 + 2, 0);
    if (cmd->prp1 & (NVME_PAGE - 1) || dma_range_wraps(cmd->prp1, size * sizeof(struct nvme_cqe)))
        return refuse(c, NVME_PRP_OFFSET, AT_DPTR, 0);
    c->cq[id] = (struct nvme_cq){ cmd->prp1, size, 0, 0, 0, true, true };
    return NVME_OK;
}

static int create_sq(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint32_t id = cmd->cdw10 & 0xffff, size = (cmd->cdw10 >> 16) + 1, cq = cmd->cdw11 >> 16;
    if (!id || id >= NVME_QUEUES || c->sq[id].live)
        return refuse(c, NVME_QID, AT_CDW10, 0);
    if (!cq || cq >= NVME_QUEUES || !c->cq[cq].live)
        return refuse(c, NVME_CQ_INVALID, AT_CDW11 + 2, 0);
    if (size < 2 || size > NVME_MQES + 1)
        return refuse(c, NVME_QSIZE, AT_CDW10 + 2, 0);
    if (!(cmd->cdw11 & 1))
        return refuse(c, NVME_BAD_FIELD, AT_CDW11, 0);
    if (cmd->prp1 & (NVME_PAGE - 1) || dma_range_wraps(cmd->prp1, size * sizeof(struct nvme_cmd)))
        return refuse(c, NVME_PRP_OFFSET, AT_DPTR, 0);
    c->sq[id] = (struct nvme_sq){ cmd->prp1, size, 0, 0, cq, true };
    c->cq[cq].users++;
    return NVME_OK;
}

enum { NOBODY = UINT16_MAX };

static int delete_sq(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint32_t id = cmd->cdw10 & 0xffff;
    if (!id || id >= NVME_QUEUES || !c->sq[id].live)
        return refuse(c, NVME_QID, AT_CDW10, 0);
    for (uint32_t i = 0; i < c->npend; i++) /* what was fetched and not done goes with it */
        if (c->pend[i].sq == id)
            c->pend[i].sq = NOBODY;
    c->cq[c->sq[id].cq].users--;
    c->sq[id].live = false;
    return NVME_OK;
}

static int delete_cq(struct nvme_ctrl *c, const struct nvme_cmd *cmd)
{
    uint32_t id = cmd->cdw10 & 0xffff;
    if (!id || id >= NVME_QUEUES || !c->cq[id].live)
        return refuse(c, NVME_QID, AT_CDW10, 0);
    if (c->cq[id].users)
        return refuse(c, NVME_QDELETE, AT_CDW10, 0);
    c->cq[id].live = false;
    return NVME_OK;
}

static int admin_command(struct nvme_ctrl *c, const struct nvme_cmd *cmd, uint32_t *result)
{
    unsigned feature = cmd->cdw10 & 0xff;
    if (cmd->flags & 0xc3) /* neither fused nor SGL: PRP is all that admin commands take here */
        return refuse(c, NVME_BAD_FIELD, AT_FLAGS, cmd->flags & 3 ? 0 : 6);
    switch (cmd->opcode) {
    case NVME_ADMIN_DELETE_SQ: return delete_sq(c, cmd);
    case NVME_ADMIN_CREATE_SQ: return create_sq(c, cmd);
    case NVME_ADMIN_LOG: return log_page(c, cmd);
    case NVME_ADMIN_DELETE_CQ: return delete_cq(c, cmd);
    case NVME_ADMIN_CREATE_CQ: return create_cq(c, cmd);
    case NVME_ADMIN_IDENTIFY: return identify(c, cmd);
    case NVME_ADMIN_ABORT:
        *result = 1; /* not aborted: it was done already */
        return NVME_OK;
    case NVME_ADMIN_SET:
    case NVME_ADMIN_GET:
        if (feature == 7) { /* number of queues, 0's based */
            *result = (NVME_QUEUES - 2) | (NVME_QUEUES - 2) << 16;
            return NVME_OK;
        }
        if (feature == 0 || feature > 15)
            return refuse(c, NVME_BAD_FIELD, AT_CDW10, 0);
        if (cmd->opcode == NVME_ADMIN_SET)
            memcpy(c->features[feature], &cmd->cdw11, 4);
        memcpy(result, c->features[feature], 4);
        return NVME_OK;
    }
    return refuse(c, NVME_BAD_OPCODE, AT_OPCODE, 0);
}

/* ---- queues ---------------------------------------------------------------------------------------------------------------- */

static void fatal(struct nvme_ctrl *c) { c->csts |= 2; } /* CFS: only a reset helps */

static bool cq_full(const struct nvme_cq *q) { return (q->tail + 1) % q->size == q->head; }

static void complete(struct nvme_ctrl *c, uint32_t sq, const struct nvme_cmd *cmd, int status, uint32_t result)
{
    struct nvme_cq *q = &c->cq[c->sq[sq].cq];
    struct nvme_cqe e = { result, 0, (uint16_t)c->sq[sq].head, (uint16_t)sq, cmd->cid,
                          (uint16_t)(status << 1 | q->phase) };
    if (status) {
        struct nvme_error *log = &c->log[c->nerrors++ % NVME_ERRORS];
        *log = (struct nvme_error){ c->nerrors, (uint16_t)sq, cmd->cid, (uint16_t)status, c->at_byte, c->at_bit,
                                    cmd->cdw10 | (uint64_t)cmd->cdw11 << 32, cmd->nsid };
        c->at_byte = c->at_bit = UINT16_MAX;
    }
    if (cq_full(q) || !dma_moves(c, q->base + q->tail * sizeof(e), &e, sizeof(e), true)) {
        fatal(c);
        return;
    }
    q->tail++;
    if (q->tail == q->size) {
        q->tail = 0;
        q->phase = !q->phase;
    }
}

static void execute(struct nvme_ctrl *c, uint32_t sq, const struct nvme_cmd *cmd)
{
    uint32_t result = 0;
    c->at_byte = c->at_bit = UINT16_MAX; /* no field is to blame */
    c->commands++;
    int status = sq ? io_command(c, cmd) : admin_command(c, cmd, &result);
    complete(c, sq, cmd, status, result);
}

/* Take what a queue's doorbell announced into the window. */
static void fetch(struct nvme_ctrl *c, uint32_t id)
{
    struct nvme_sq *q = &c->sq[id];
    struct nvme_cmd block[16];
    while (q->head != q->tail && c->npend < NVME_WINDOW) {
        uint32_t n = (q->tail > q->head ? q->tail : q->size) - q->head;
        n = n > 16 ? 16 : n;
        n = n > NVME_WINDOW - c->npend ? NVME_WINDOW - c->npend : n;
        if (!dma_moves(c, q->base + q->head * sizeof(block[0]), block, n * sizeof(block[0]), false)) {
            fatal(c);
            return;
        }
        for (uint32_t i = 0; i < n; i++) {
            c->pend[c->npend].cmd = block[i];
            c->pend[c->npend++].sq = (uint16_t)id;
        }
        q->head = (q->head + n) % q->size;
    }
}

static uint64_t random_next(struct nvme_ctrl *c)
{
    c->seed ^= c->seed << 13;
    c->seed ^= c->seed >> 7;
    return c->seed ^= c->seed << 17;
}

int nvme_work(void *ctrl)
{
    struct nvme_ctrl *c = ctrl;
    int done = 0;
    if (!c->dev || (c->csts & 3) != 1)
        return 0;
    for (uint32_t id = 0; id < NVME_QUEUES; id++)
        if (c->sq[id].live)
            fetch(c, id);
    uint32_t n = c->npend, kept = 0;
    for (uint32_t i = 0; c->random && i + 1 < n; i++) { /* any order is right: queues promise none */
        uint32_t j = i + (uint32_t)(random_next(c) % (n - i));
        struct nvme_pending p = c->pend[i];
        c->pend[i] = c->pend[j];
        c->pend[j] = p;
    }
    if (c->random && n > 1)
        n = 1 + (uint32_t)(random_next(c) % n); /* and some take longer than others */
    for (uint32_t i = 0; i < c->npend; i++) {
        struct nvme_pending p = c->pend[i];
        if (p.sq == NOBODY)
            continue;
        if (i >= n || c->csts & 2 || cq_full(&c->cq[c->sq[p.sq].cq])) {
            c->pend[kept++] = p; /* not yet */
            continue;
        }
        execute(c, p.sq, &p.cmd);
        done++;
    }
    c->npend = kept;
    return done;
}

/* ---- registers --------------------------------------------------------------------------------------------------------------- */

void nvme_reset(struct nvme_ctrl *c)
{
    memset(c->sq, 0, sizeof(c->sq));
    memset(c->cq, 0, sizeof(c->cq));
    c->npend = 0;
    c->csts = 0;
}

static void enable(struct nvme_ctrl *c)
{
    uint32_t sq = (c->aqa & 0xfff) + 1, cq = (c->aqa >> 16 & 0xfff) + 1;
    bool fits = (c->cc & 0x7f0) == 0 && (c->cc >> 11 & 7) == 0 && /* NVM command set, pages of 4 KiB, round robin */
                !dma_range_wraps(c->asq, sq * sizeof(struct nvme_cmd)) && !dma_range_wraps(c->acq, cq * sizeof(struct nvme_cqe));
    nvme_reset(c);
    if (!fits || sq < 2 || cq < 2 || (c->asq | c->acq) & (NVME_PAGE - 1)) {
        fatal(c);
        return;
    }
    c->sq[0] = (struct nvme_sq){ c->asq, sq, 0, 0, 0, true };
    c->cq[0] = (struct nvme_cq){ c->acq, cq, 0, 0, 1, true, true };
    c->csts = 1;
}

uint64_t nvme_read_reg(void *ctrl, uint64_t offset, unsigned width)
{
    struct nvme_ctrl *c = ctrl;
    uint64_t v = 0;
    switch (offset & ~7ull) {
    case 0x00: v = NVME_MQES | 1 << 16 | 10ull << 24 | 1ull << 37; break; /* CAP: CQR, 5 s, NVM command set */
    case 0x08: v = 0x20000 | (uint64_t)c->intms << 32; break;
    case 0x10: v = c->intms | (uint64_t)c->cc << 32; break;
    case 0x18: v = (uint64_t)c->csts << 32; break;
    case 0x20: v = (uint64_t)c->aqa << 32; break;
    case 0x28: v = c->asq; break;
    case 0x30: v = c->acq; break;
    }
    v >>= (offset & 7) * 8;
    return width >= 8 ? v : v & ((1ull << width * 8) - 1);
}

static void doorbell(struct nvme_ctrl *c, uint64_t at, uint32_t v)
{
    uint64_t id = at / (2 * NVME_STRIDE);
    bool is_cq = at / NVME_STRIDE & 1;
    if (at % NVME_STRIDE || id >= NVME_QUEUES || !(is_cq ? c->cq[id].live : c->sq[id].live) ||
        v >= (is_cq ? c->cq[id].size : c->sq[id].size)) {
        c->bad_doorbells++; /* an asynchronous event on real ones; ignored */
        return;
    }
    if (!is_cq) {
        c->sq[id].tail = v;
    } else {
        struct nvme_cq *q = &c->cq[id]; /* the head may move as far as the tail */
        if ((v + q->size - q->head) % q->size > (q->tail + q->size - q->head) % q->size)
            c->bad_doorbells++;
        else
            q->head = v;
    }
}

static void set_half(uint64_t *reg, uint64_t offset, unsigned width, uint64_t v)
{
    if (width == 8)
        *reg = v;
    else if (offset & 4)
        *reg = (*reg & UINT32_MAX) | v << 32;
    else
        *reg = (*reg & ~(uint64_t)UINT32_MAX) | (v & UINT32_MAX);
}

void nvme_write_reg(void *ctrl, uint64_t offset, unsigned width, uint64_t value)
{
    struct nvme_ctrl *c = ctrl;
    uint32_t old = c->cc;
    if (offset >= NVME_DOORBELLS) {
        doorbell(c, offset - NVME_DOORBELLS, (uint32_t)value);
        return;
    }
    switch (offset) {
    case 0x0c: c->intms |= (uint32_t)value; break;
    case 0x10: c->intms &= ~(uint32_t)value; break;
    case 0x14:
        c->cc = (uint32_t)value;
        if ((c->cc & 1) && !(old & 1))
            enable(c);
        else if (!(c->cc & 1) && old & 1)
            nvme_reset(c);
        if ((c->cc >> 14 & 3) && c->csts & 1)
            c->csts |= 2 << 2; /* shutdown complete */
        break;
    case 0x24: c->aqa = (uint32_t)value; break;
    case 0x28: case 0x2c: set_half(&c->asq, offset, width, value); break;
    case 0x30: case 0x34: set_half(&c->acq, offset, width, value); break;
    }
}
