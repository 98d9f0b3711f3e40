"""The rules that decide how a request is mapped: their names, where they come from, and what to say about them."""

from __future__ import annotations

import errno as _errno
from typing import TYPE_CHECKING, NamedTuple

from dmapath.errors import (
    AlignmentError,
    DmaError,
    DmaValueError,
    IovaRangeError,
    NoMemoryError,
    NotSupportedError,
    error_for,
)
from dmapath.wrapper import RULE_BITS

if TYPE_CHECKING:
    from dmapath.device import Device
    from dmapath.request import Mappable

__all__ = ["CASES", "LAYOUTS", "RULES", "Rule"]


class Rule(NamedTuple):
    """A rule: the kernel function or specification it mirrors, and what it means."""

    source: str
    text: str


#: Layout names, by enum dma_layout.
LAYOUTS = ("none", "direct", "linear", "gapped", "per-range", "bounced")

#: Case name -> (number in the acceptance matrix, words).
CASES = {
    "direct": (1, "direct map"),
    "iommu-aligned": (2, "IOMMU, aligned, no P2P"),
    "iommu-aligned-p2p": (3, "IOMMU, aligned, some P2P"),
    "swiotlb-single": (4, "swiotlb, single range"),
    "swiotlb-multi": (5, "swiotlb, several ranges"),
    "iommu-unaligned": (6, "IOMMU, unaligned"),
    "empty": (0, "nothing to map"),
}

RULES: dict[str, Rule] = {
    "empty": Rule("blk_rq_dma_map_iter_start", "the request has no data, so nothing is mapped"),
    "no-iova": Rule("dma_iova_try_alloc (no dma_iommu)",
                    "there is no IOMMU in the path, so no IOVA range can hold the request"),
    "no-gap": Rule("blk_can_dma_map_iova", "no gap inside a granule (request gap mask & merge boundary is 0)"),
    "gap": Rule("blk_can_dma_map_iova", "the request has a gap inside a granule, so Linux maps range by range"),
    "iova-full": Rule("alloc_iova_fast",
                      "no IOVA range can hold it: none is free under the device's mask, or the back end gives none"),
    "separate": Rule("iova_link (EXDEV), iommu_dma_iova_link_swiotlb",
                     "part of the memory cannot lie beside other memory: mapped range by range"),
    "fits": Rule("dma_iova_link (granule rule)",
                 "every range but the first begins, and every one but the last ends, on a granule"),
    "gapped": Rule("dmapath layout gapped",
                   "ranges begin or end inside a granule: each gets granules of its own in one IOVA range"),
    "non-coherent": Rule("iommu_dma_iova_unlink_range_slow",
                         "the device is not coherent: unmap must invalidate exactly the mapped bytes"),
    "umem-sg": Rule("ib_umem_get_va", "Linux maps a memory region's pages with dma_map_sgtable"),
    "alignment": Rule("queue_limits.dma_alignment", "an address or length misses the device's dma_alignment"),
    "virt-boundary": Rule("queue_limits.virt_boundary_mask (bvec_gap_to_prev)",
                          "the device takes no gaps, and nothing here can close them: split the bio first (Bio.split)"),
    "max-segments": Rule("queue_limits.max_segments",
                         "more segments than the device takes: split the bio first (Bio.split)"),
    "no-cut": Rule("queue_limits.max_segment_size, seg_boundary_mask",
                   "a segment is too long or crosses the boundary, and no place to cut it keeps dma_alignment and "
                   "virt_boundary"),
    "bounce-offset": Rule("swiotlb_tbl_map_single (min_align_mask)",
                          "the bounce buffer does not keep the address bits that virt_boundary and dma_alignment need: "
                          "give the device that min_align_mask"),
    "limits": Rule("queue_limits (dmapath)",
                   "one IOVA range would be segments that the device does not take: mapped range by range"),
    "segment-cut": Rule("queue_limits.max_segment_size, seg_boundary_mask",
                        "the one range is handed out in pieces that the device takes"),
    "link-failed": Rule("dma_iova_link", "a range could not be linked; what was linked is undone, nothing is retried"),
    "map-failed": Rule("dma_map_phys", "a range could not be mapped; what was mapped is undone"),
    "forget": Rule("dma_need_unmap", "direct and coherent: no address has to be kept for unmap"),
    "p2p-bus": Rule("blk_dma_map_bus, hmm_dma_map_pfn (PCI_P2PDMA_MAP_BUS_ADDR)",
                    "a peer below the same switch: the device is told its bus address, no IOVA and no unmap"),
    "p2p-host-bridge": Rule("pci_p2pdma_map_type (THRU_HOST_BRIDGE)",
                            "a peer that is reached through the host bridge: mapped like memory, as MMIO"),
    "p2p-refused": Rule("pci_p2pdma_map_type (NOT_SUPPORTED)",
                        "the device cannot reach that peer's memory: no common switch, and no host bridge that forwards"),
    "p2p-mix": Rule("bio_add_page (zone_device_pages_compatible)",
                    "Linux's bios hold memory of one kind and provider: the first segment decides for all"),
    "bounced": Rule("swiotlb_map",
                    "the device cannot use the buffer where it is: it is copied to the pool, and back at unmap"),
    "bounced-ends": Rule("iommu_dma_iova_link_swiotlb",
                         "an untrusted device must not see the rest of a granule: unaligned ends bounce, the rest is not"),
    "bounce-needed": Rule("dev_use_swiotlb, iova_unaligned",
                          "an untrusted device must not see the rest of a granule, so these bytes would have to bounce"),
    "no-pool": Rule("swiotlb_map (no pool)", "there is no swiotlb pool to bounce through"),
    "pool-full": Rule("swiotlb_tbl_map_single", "the swiotlb pool has no room for it, or no mapping may be so large"),
    "not-capable": Rule("dma_capable", "the device cannot reach the address"),
    "min-align": Rule("iommu_dma_map_phys", "min_align_mask is wider than the granule"),
    "flush-now": Rule("dma_iova_unlink", "unlink flushes its range from the IOTLB at once, in lazy mode too"),
    "flush-strict": Rule("__iommu_dma_unmap (strict)", "each unmap flushes its range from the IOTLB at once"),
    "flush-queue": Rule("queue_iova (lazy)",
                        "unmaps are queued: 256 of them or 10 ms share one full flush, and stale entries live till then"),
    "exposure": Rule("iommu_map (granule)", "whole pages are mapped: the device also sees bytes around the ranges"),
    "granted": Rule("xen_grant_dma_map_phys", "the other domain sees the pages that are granted, and nothing else"),
    "registered": Rule("ibv_reg_mr, ibv_dereg_mr",
                       "the device reaches what is registered, by its keys, until they are taken back"),
    "see-all": Rule("dma_direct_map_phys", "without an IOMMU the device can reach all memory under its mask"),
}

_REFUSALS: dict[str, type[DmaError]] = {
    "alignment": AlignmentError, "virt-boundary": AlignmentError, "max-segments": DmaValueError,
    "no-cut": AlignmentError, "bounce-offset": AlignmentError, "not-capable": IovaRangeError,
    "p2p-refused": NotSupportedError, "p2p-mix": DmaValueError,
}  # fmt: skip
_NAMES = {bit: name for name, bit in RULE_BITS.items()}


def names_of(bits: int) -> list[str]:
    """The names behind a state's rule bits."""
    return [name for bit, name in sorted(_NAMES.items()) if bits & bit]


def case_of(layout: str, bits: int, segments: int) -> str:
    """The case name for a layout, the rules that led to it and the segments that came of it."""
    if layout == "bounced":
        return "swiotlb-single" if segments == 1 else "swiotlb-multi"
    if layout in ("none", "direct"):
        return "empty" if layout == "none" else "direct"
    if layout == "linear":
        return "iommu-aligned-p2p" if bits & RULE_BITS["p2p-bus"] else "iommu-aligned"
    return "iommu-unaligned" if bits & (RULE_BITS["gap"] | RULE_BITS["gapped"] | RULE_BITS["non-coherent"]) else (
        "iommu-aligned")


def bounce_parts(phys: int, size: int, granule: int) -> list[tuple[str, int, int]]:
    """(part, phys, bytes) of a range that an untrusted device could only get through a bounce buffer
    (iommu_dma_iova_link_swiotlb: unaligned head and tail).
    """
    head = -phys % granule
    parts = []
    if head:
        parts.append(("head", phys, min(size, head)))
    if size > head and (phys + size) % granule:
        tail = (phys + size) % granule
        parts.append(("tail", phys + size - tail, tail))
    return parts


def _first_bounce(device: Device, request: Mappable) -> tuple[int, int] | None:
    granule = device.merge_boundary + 1
    if device.untrusted and granule > 1:
        for phys, n in request.vecs:
            if bounce_parts(int(phys), n, granule):
                return int(phys), n
    return None


def refusal(device: Device, request: Mappable, errno: int, bits: int) -> DmaError:
    """The exception for a request that could not be mapped, naming the rule."""
    if errno == _errno.EREMOTEIO:  # map_sg says it without a bit
        bits |= RULE_BITS["p2p-refused"]
    for name, kind in _REFUSALS.items():
        if bits & RULE_BITS[name]:
            rule = RULES[name]
            return kind(f"{rule.text} [{rule.source}]", errno=errno, argument="request", value=request)
    bounce = _first_bounce(device, request)
    if bounce is not None and errno in (_errno.ENOMEM, _errno.EPERM, _errno.EIO):
        return error_for(errno, _bounce_text(device, errno), "request", request)
    if bits & RULE_BITS["link-failed"] and device.backend.why(errno) is None:
        return error_for(errno, f"{RULES['link-failed'].text} [dma_iova_link]", "request", request)
    return error_for(errno, map_refusal(device, errno, 0, 0, 0), "request", request)


def _pool_rule(device: Device) -> Rule:
    """Why nothing bounced: no pool, or a full one with its numbers."""
    if device.swiotlb is None:
        return RULES["no-pool"]
    full, c = RULES["pool-full"], device.swiotlb.counters()
    return full._replace(text=f"{full.text} ({c['slots_used']} of {c['slots']} slots of 2048 bytes are used)")


def _bounce_text(device: Device, errno: int) -> str:
    need, pool = RULES["bounce-needed"], _pool_rule(device)
    if errno == _errno.EPERM:
        return f"{need.text}, and memory with these attributes must not bounce [{need.source}]"
    return f"{need.text}, and {pool.text} [{need.source}; {pool.source}]"


_GRANTS = {
    _errno.ENODEV: "the device is broken: an unmap met a grant that the other domain still had mapped",
    _errno.EOPNOTSUPP: "a resource cannot be granted",
}


def map_refusal(device: Device, errno: int, phys: int, size: int, attrs: int) -> str:
    """Why map_phys gave no address, in words."""
    own = device.backend.why(errno)
    if own is not None:
        return str(own)
    if errno == _errno.EOPNOTSUPP and device.backend.name != "grant":
        return "memory that must be coherent, on a device that is not [dma_map_phys, REQUIRE_COHERENT]"
    if errno == _errno.EFAULT:
        return "no machine frame is behind the address: ballooned out, or never populated [xen_phys_to_dma]"
    if device.backend.name == "grant":
        return f"{_GRANTS.get(errno, 'no run of free grant references is long enough')} [xen_grant_dma_map_page]"
    granule = device.merge_boundary + 1
    if granule == 1:
        pool = _pool_rule(device)
        return (f"{RULES['not-capable'].text} (mask {device.dma_mask:#x}, bus limit {device.bus_dma_limit:#x}), and "
                f"{pool.text} [{RULES['not-capable'].source}; {pool.source}]")
    if device.untrusted and (phys | size) % granule:
        return _bounce_text(device, errno)
    if device.min_align_mask > granule - 1:
        return f"{RULES['min-align'].text} [{RULES['min-align'].source}]"
    if errno == _errno.ENOMEM:
        return (f"{RULES['iova-full'].text}, or the page table refused: no memory, an address too wide, or mapped already "
                f"[{RULES['iova-full'].source}, iommu_map]")
    return "no direction was given [iommu_map]"


def link_refusal(device: Device, errno: int, *, phys: int, offset: int, size: int, state_size: int) -> DmaError:
    """The exception for a refused dma_iova_link, naming the argument."""
    own = device.backend.why(errno)
    if own is not None:
        return error_for(errno, str(own), "phys", phys)
    granule = device.merge_boundary + 1
    inside = phys % granule if granule > 1 else 0
    if granule == 1:
        return error_for(errno, f"{RULES['no-iova'].text} [{RULES['no-iova'].source}]")
    if errno == _errno.EIO:
        return error_for(errno, "only the first range may begin inside a granule [dma_iova_link]", "phys", phys)
    if errno == _errno.ERANGE and offset + size > state_size:
        return error_for(errno, f"offset + size within the state's {state_size} bytes", "size", size)
    if errno in (_errno.EADDRINUSE, _errno.EEXIST):
        return error_for(errno, "this part of the state is linked already [iommu_map]", "offset", offset)
    if device.untrusted and (phys | size) % granule and errno in (_errno.ENOMEM, _errno.EPERM):
        return error_for(errno, _bounce_text(device, errno), "phys", phys)
    if errno in (_errno.ENXIO, _errno.EINVAL) and size:
        return AlignmentError("IOVA and physical address do not fall on granules together: the range before ended "
                              f"inside one, or the state begins {inside} bytes off [iommu_map]", errno=errno,
                              argument="phys", value=phys)
    if errno == _errno.EOPNOTSUPP:
        return error_for(errno, "memory that must be coherent, on a device that is not [dma_iova_link]")
    if errno == _errno.ENOMEM:
        return NoMemoryError("no memory for page tables [iommu_map]", errno=errno)
    return error_for(errno, "the page table refused the range [iommu_map]", "size", size)
