/* SPDX-License-Identifier: MIT */
/* Vectors of links at random into an IOVA space that ends at 2^64, by their page tables: what is linked lies in the room given
 * and leads to its memory, what is refused leaves nothing, and the counters say how much there is. */
#include "domain.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES = 16, MOST = 6 };

static void must(int what, const char *words)
{
    if (!what) {
        fprintf(stderr, "broken: %s\n", words);
        abort();
    }
}

static uint64_t seed = 88172645463325252ull;
static uint64_t pick(uint64_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % n;
}

static uint64_t some_length(void)
{
    static const uint64_t odd[] = { 0, 1u << 21, 1ull << 62, (1ull << 63) - 1, 1ull << 63, UINT64_MAX - 4096, UINT64_MAX - 0x1ff,
                                    UINT64_MAX };
    switch (pick(12)) {
    case 0: return odd[pick(sizeof(odd) / sizeof(odd[0]))];
    case 1: return 1 + pick(4096);
    case 2: return 1 + pick(4 * 4096);
    }
    return (1 + pick(3)) << 12;
}

/* Pages of the last 2 * PAGES that are mapped; each to be `want` where that is told. */
static uint64_t mapped(struct iommu_domain *d, uint64_t first, const uint64_t *want, uint64_t n)
{
    struct translation t;
    uint64_t there = 0;
    for (uint64_t k = 0; k < 2 * PAGES; k++) {
        uint64_t at = -((uint64_t)(k + 1) << 12);
        if (!dom_translate(d, at, &t))
            continue;
        there++;
        must(at - first < n << 12, "a page outside the room is mapped");
        must(t.phys == want[(at - first) >> 12], "a page leads elsewhere");
    }
    return there;
}

static uint64_t live(struct iommu_domain *d)
{
    return counter_read(d->counters, C_PTE_SET) - counter_read(d->counters, C_PTE_CLEAR);
}

int main(int argc, char **argv)
{
    struct fail_point never = { 0 };
    struct iommu_unit unit;
    struct iommu_domain *d;
    struct iommu_domain_config how = { 4096, 0, UINT64_MAX, 1, false, false };
    uint64_t linked = 0, refused = 0;
    must(!iommu_unit_init(&unit, 4, 2, false, &never) && !iommu_domain_create(&d, &unit, &how), "no memory");
    for (long rounds = argc > 1 ? atol(argv[1]) : 20000; rounds > 0; rounds--) {
        uint64_t pages = 1 + pick(PAGES), iova = -((pages + (pick(3) ? 0 : pick(PAGES))) << 12), want[2 * PAGES] = { 0 };
        bool gapped = pick(2);
        uint64_t off = gapped ? 0 : pick(3) ? 0 : pick(4096), room = (pages << 12) - off - (gapped ? 0 : pick(2) * pick(4096 - off));
        uint64_t n = 0, whole = 0;
        bool fits = true;
        struct phys_vec v[MOST];
        uint32_t count = 1 + (uint32_t)pick(MOST);
        for (uint32_t i = 0; i < count; i++) { /* what must come of it, page by page and in 128 bits */
            uint64_t in = gapped ? (pick(2) ? pick(4096) : 0) : i ? 0 : off, phys = ((uint64_t)(i + 1) << 30) + in;
            v[i] = (struct phys_vec){ { phys }, some_length() };
            __extension__ unsigned __int128 end = (unsigned __int128)(gapped ? in : n) + v[i].len;
            fits = fits && end <= (gapped ? room - whole : room) && v[i].len;
            if (!fits)
                continue;
            for (uint64_t k = 0, at = gapped ? whole : (n + off) & ~4095ull; k < (in + v[i].len + 4095) >> 12; k++)
                want[(at >> 12) + k] = phys - in + (k << 12);
            fits = fits && (gapped || i + 1 == count || !((n + off + v[i].len) & 4095));
            whole += (in + v[i].len + 4095) & ~4095ull;
            n += v[i].len;
        }
        int rc = (gapped ? dom_link_gapped : dom_link_vec)(d, iova + off, room, v, count, PROT_READ_);
        uint64_t there = mapped(d, iova, want, pages);
        must(!rc == fits, "linked what does not fit, or refused what does");
        must(there == (rc ? 0 : whole >> 12) && live(d) == there, "counted more or fewer than there are");
        if (!rc)
            must(dom_unmap(d, iova, whole) == whole, "not all of it comes back");
        must(!live(d) && !mapped(d, iova, want, pages), "something is left");
        *(rc ? &refused : &linked) += 1;
    }
    printf("%llu %llu\n", (unsigned long long)linked, (unsigned long long)refused);
    iommu_domain_free(d);
    iommu_unit_destroy(&unit);
    return 0;
}
