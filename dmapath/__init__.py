"""dmapath: a DMA driver is written once; how its memory reaches the device is the wrapper's business."""

import os as _os

from dmapath._version import __version__ as __version__
from dmapath.addr import DmaAddr, Iova, PhysAddr
from dmapath.backends.base import COUNTERS, LIVE_COUNTERS
from dmapath.backends.grant import GrantTable
from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio, Request
from dmapath.device import Device, IovaState, Mapping, Segment
from dmapath.engine import DmaEngine
from dmapath.errors import (
    AddressTypeError,
    AlignmentError,
    DmaError,
    DmaFault,
    DmaValueError,
    ExistingMappingError,
    IovaRangeError,
    MappingError,
    NoMemoryError,
    NotSupportedError,
    PermissionDeniedError,
    StateError,
    TraceError,
)
from dmapath.explain import Explanation
from dmapath.memory import HostBuffer, PhysMemory
from dmapath.mr import MemoryRegion
from dmapath.pci import Bar, Fabric, RootComplex
from dmapath.swiotlb import Swiotlb
from dmapath.xen import XenDomain


def get_include() -> str:
    """Directory to put on the C compiler's include path: ``#include <dmapath/dmapath.h>``."""
    here = _os.path.dirname(__file__)
    installed = _os.path.join(here, "include")
    return installed if _os.path.isdir(installed) else _os.path.join(_os.path.dirname(here), "ext", "include")


__all__ = [
    "COUNTERS",
    "LIVE_COUNTERS",
    "AddressTypeError",
    "AlignmentError",
    "Bar",
    "Bio",
    "Device",
    "DmaAddr",
    "DmaEngine",
    "DmaError",
    "DmaFault",
    "DmaValueError",
    "ExistingMappingError",
    "Explanation",
    "Fabric",
    "GrantTable",
    "HostBuffer",
    "Iommu",
    "Iova",
    "IovaRangeError",
    "IovaState",
    "Mapping",
    "MappingError",
    "MemoryRegion",
    "NoMemoryError",
    "NotSupportedError",
    "PermissionDeniedError",
    "PhysAddr",
    "PhysMemory",
    "Request",
    "RootComplex",
    "Segment",
    "StateError",
    "Swiotlb",
    "TraceError",
    "XenDomain",
    "get_include",
]
