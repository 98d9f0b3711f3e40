/* SPDX-License-Identifier: MIT */
/* A machine for fuzzers: one flat piece of memory behind a bus, most of it filled from the input. */
#ifndef FUZZ_FLAT_H
#define FUZZ_FLAT_H

#include "dmapath/dmapath.h"

#include <stdio.h>
#include <stdlib.h>

#define FLAT (1u << 16)

struct flat { struct dma_device dev; uint8_t *bytes; }; /* dev first: the bus gets no more */

static int flat_access(struct dma_device *d, dma_addr_t addr, uint64_t n, void *buf, int write, struct dma_fault *fault)
{
    struct flat *m = (struct flat *)d;
    if (addr.v >= FLAT || n > FLAT - addr.v)
        return dma_fault_at(fault, addr.v, 0, DMA_FAULT_NOT_PRESENT, write);
    memcpy(write ? m->bytes + addr.v : buf, write ? buf : m->bytes + addr.v, n);
    return 0;
}
static const struct dma_bus_ops flat_bus = { flat_access };

static inline void flat_make(struct flat *m)
{
    memset(m, 0, sizeof(*m));
    m->dev.bus = &flat_bus;
    m->bytes = calloc(1, FLAT); /* of its own, so that a sanitizer sees what passes its ends */
}

static inline void must(int what, const char *words)
{
    if (!what) {
        fprintf(stderr, "broken: %s\n", words);
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
#endif
