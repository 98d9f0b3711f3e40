"""Back ends, devices and drivers of other packages, found by entry points.

============================ =========================================================================================
group ``dmapath.backends``   called without arguments: what ``Device(backend=...)`` takes
group ``dmapath.devices``    called without arguments: has ``mmio`` (a capsule "dmapath.mmio.v1"), ``attach(device)`` and
                             ``limits`` (keyword arguments of the Device it is to be plugged into)
group ``dmapath.drivers``    called with (hardware, device): what drives that hardware through that Device
============================ =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dmapath.errors import DmaValueError

__all__ = ["GROUPS", "find", "names"]

GROUPS = ("backends", "devices", "drivers")
#: This package's own, by the same names and calls.
_OWN = {
    "backends": {},
    "devices": {"nvme": "dmapath.devices.nvme:NvmeController", "rnic": "dmapath.devices.rnic:Rnic"},
    "drivers": {"nvme": "dmapath.drivers.nvme:Nvme"},
}  # fmt: skip


def _all(group: str) -> dict[str, EntryPoint]:
    if group not in GROUPS:
        raise DmaValueError(f"one of {', '.join(GROUPS)}", argument="group", value=group)
    full = f"dmapath.{group}"
    own = {name: EntryPoint(name, value, full) for name, value in _OWN[group].items()}
    return {**{e.name: e for e in entry_points(group=full)}, **own}


def names(group: str) -> list[str]:
    """Names of all back ends, devices or drivers: this package's, then other packages'."""
    return sorted(_all(group), key=lambda name: (name not in _OWN[group], name))


def find(group: str, name: str) -> Callable[..., Any]:
    """What makes the one of that name. DmaValueError where no installed package has it."""
    found = _all(group)
    if name not in found:
        raise DmaValueError(f"one of {', '.join(found) or 'none: no package has any'} (entry points dmapath.{group})",
                            argument="name", value=name)  # fmt: skip
    made: Callable[..., Any] = found[name].load()
    return made
