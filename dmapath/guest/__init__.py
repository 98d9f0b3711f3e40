"""A throw-away QEMU guest that shares this machine's files: soft-RoCE, an emulated IOMMU or NVMe, and the same Python."""

from dmapath.guest.image import KERNELS, Kernel, find_kernel, prepare
from dmapath.guest.packages import Progress, cache_dir, missing_packages
from dmapath.guest.vm import GuestError, Result, run, run_pair

__all__ = [
    "KERNELS",
    "GuestError",
    "Kernel",
    "Progress",
    "Result",
    "cache_dir",
    "find_kernel",
    "missing_packages",
    "prepare",
    "run",
    "run_pair",
]
