"""What one request may hold, as drivers tell the block layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["QueueLimits"]


class _Device(Protocol):
    @property
    def max_segments(self) -> int: ...
    @property
    def max_segment_size(self) -> int | None: ...
    @property
    def seg_boundary_mask(self) -> int: ...
    @property
    def virt_boundary(self) -> int: ...
    @property
    def dma_alignment(self) -> int: ...


@dataclass(frozen=True)
class QueueLimits:
    """A device's limits for ``Bio.split``, with those of its queue (struct queue_limits); masks are inclusive."""

    max_segments: int
    max_segment_size: int | None
    seg_boundary_mask: int
    virt_boundary: int
    dma_alignment: int

    @classmethod
    def of(cls, device: _Device, max_segments: int) -> QueueLimits:
        """A device's own, and at most so many segments in a request."""
        return cls(min(device.max_segments, max_segments), device.max_segment_size, device.seg_boundary_mask,
                   device.virt_boundary, device.dma_alignment)  # fmt: skip
