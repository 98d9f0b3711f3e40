"""What hardware time a mapping would cost, from measured figures of others. Always to be shown as modelled.

Each term has its source; they come from different machines (a Xeon host under an Intel IOMMU, and its users' mails), so
a sum of them ranks layouts, and predicts no machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["COSTS", "Cost", "modelled_ns"]

_XLAB = "xlab-uiuc/Fast-and-Safe-IO-Memory-Protection, branch lock-contention, tracing/host_aggregate.csv"


class Cost(NamedTuple):
    """Nanoseconds for one event, and where the figure comes from."""

    ns: float
    what: str
    source: str


COSTS = {
    "iova_alloc": Cost(100, "one IOVA allocation", "Luis Chamberlain, 20250520223913.3407136-7-mcgrof@kernel.org"),
    "map_call": Cost(590, "one page-table map call", _XLAB),
    "sync": Cost(890, "one sync after mapping", _XLAB),
    "unmap_call": Cost(820, "one page-table unmap call", _XLAB),
    "invalidation": Cost(2070, "one IOTLB invalidation, waited for", _XLAB),
    "dma_page": Cost(65, "one 4 KiB page over the bus", "Fast & Safe IO memory protection, SOSP'24: l0"),
    "walk_read": Cost(197, "one memory read of a page walk", "Fast & Safe IO memory protection, SOSP'24: lm"),
}


def modelled_ns(events: Mapping[str, float]) -> float:
    """Sum of count * cost over the named events."""
    return sum(n * COSTS[name].ns for name, n in events.items())
