"""dmapath: a DMA driver is written once; how its memory reaches the device is the wrapper's business."""

import os as _os

from dmapath._version import __version__ as __version__
from dmapath.addr import DmaAddr, Iova, PhysAddr
from dmapath.adversary import Adversary
from dmapath.backends.base import COUNTERS, LIVE_COUNTERS
from dmapath.backends.grant import GrantTable
from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio, Request
from dmapath.debug import DmaDebug, DmaDebugError
from dmapath.device import CoherentBuffer, Device, IovaState, Mapping, Segment
from dmapath.engine import DmaEngine
from dmapath.errors import (
    AddressTypeError,
    AlignmentError,
    CompletionError,
    DmaError,
    DmaFault,
    DmaValueError,
    ExistingMappingError,
    IovaRangeError,
    MappingError,
    NoMemoryError,
    NotSupportedError,
    NvmeError,
    PermissionDeniedError,
    StateError,
    TraceError,
)
from dmapath.explain import Explanation
from dmapath.hmm import HmmMap, OdpRegion
from dmapath.memory import HostBuffer, PhysMemory
from dmapath.mr import MemoryRegion
from dmapath.observe import Exposure, FaultInjector, History, StaleUseError
from dmapath.pci import Bar, Fabric, RootComplex
from dmapath.swiotlb import Swiotlb
from dmapath.tracer import Tracer
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
    "Adversary",
    "AlignmentError",
    "Bar",
    "Bio",
    "CoherentBuffer",
    "CompletionError",
    "Device",
    "DmaAddr",
    "DmaDebug",
    "DmaDebugError",
    "DmaEngine",
    "DmaError",
    "DmaFault",
    "DmaValueError",
    "ExistingMappingError",
    "Explanation",
    "Exposure",
    "Fabric",
    "FaultInjector",
    "GrantTable",
    "History",
    "HmmMap",
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
    "NvmeError",
    "OdpRegion",
    "PermissionDeniedError",
    "PhysAddr",
    "PhysMemory",
    "Request",
    "RootComplex",
    "Segment",
    "StaleUseError",
    "StateError",
    "Swiotlb",
    "TraceError",
    "Tracer",
    "XenDomain",
    "get_include",
]
