from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmapath
from dmapath import Device, Iommu, PhysMemory

LIVE = dmapath.LIVE_COUNTERS


def live(dev: Device) -> dict[str, int]:
    """The counters that say what stands now."""
    counters = dev.counters()
    return {k: counters[k] for k in LIVE}


def strict(**kw: Any) -> Device:
    """The default device of the kernel's rows: trusted, coherent, 64-bit mask, strict x86 IOMMU."""
    unit = {k: kw.pop(k) for k in ("format", "caching_mode", "page_sizes", "cpus", "reserved", "aperture") if k in kw}
    return Device(iommu=Iommu("strict", **unit), **kw)


def lazy(**kw: Any) -> Device:
    return Device(iommu=Iommu("lazy"), **kw)


@pytest.fixture
def memory() -> PhysMemory:
    return PhysMemory(1 << 20, layout="scattered", seed=3)


@pytest.fixture
def errno_of() -> Callable[..., int]:
    def call(f: Callable[..., object], *args: Any, **kw: Any) -> int:
        with pytest.raises(dmapath.DmaError) as e:
            f(*args, **kw)
        assert e.value.errno is not None
        return e.value.errno

    return call


@pytest.fixture(autouse=True)
def _no_dropped_mappings() -> Iterator[None]:
    """ResourceWarnings are errors (pyproject); collect here so that they surface in the test that caused them."""
    yield
    import gc

    gc.collect()
