/* SPDX-License-Identifier: MIT */
/* The core as one translation unit, so that the compiler sees through the layers of a hot path. */
#include "util.c"
#include "iova.c"
#include "pgtable.c"
#include "iotlb.c"
#include "domain.c"
