"""Pictures of ``dmapath compare``."""

from __future__ import annotations

from typing import Any

__all__ = ["plot_compare"]

_COLOURS = {("linux", "aligned"): "#4c72b0", ("linux", "unaligned"): "#a1b8dd",
            ("unified", "aligned"): "#dd8452", ("unified", "unaligned"): "#f3c6a7"}  # fmt: skip


def plot_compare(table: list[dict[str, Any]], path: str) -> None:
    """Write modelled time, invalidations and kept bytes per bio against its ranges, to a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = (("modelled_ns", "hardware time, modelled (ns)"), ("invalidations", "IOTLB invalidations"),
               ("unmap_state_bytes", "bytes kept for unmap"), ("map_ns", "map, measured here (ns)"))  # fmt: skip
    fig, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for ax, (key, label) in zip(axes.flat, figures, strict=True):
        for (policy, alignment), colour in _COLOURS.items():
            line = [r for r in table if r["request"] == "bio" and r["mode"] == "strict"
                    and (r["policy"], r["alignment"]) == (policy, alignment)]  # fmt: skip
            ax.plot([r["ranges"] for r in line], [r[key] for r in line], marker="o", color=colour,
                    label=f"{policy}, {alignment}", linestyle="-" if alignment == "aligned" else "--")  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("ranges of 4 KiB in the bio")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0][0].legend()
    fig.suptitle("One bio on a strict IOMMU: Linux's rules and the unified flow")
    fig.savefig(path)
    plt.close(fig)
