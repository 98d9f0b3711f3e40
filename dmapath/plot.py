"""Pictures of ``dmapath compare`` and ``dmapath reg``."""

from __future__ import annotations

from typing import Any

__all__ = ["plot_compare", "plot_reg"]

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


def plot_reg(table: list[dict[str, Any]], path: str) -> None:
    """Write time to register and deregister against bytes, a line per method and scatter, to a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [r for r in table if r["error"] is None]
    aligns = sorted({r["align"] for r in good})[:2]
    fig, axes = plt.subplots(1, max(1, len(aligns)), figsize=(6.5 * max(1, len(aligns)), 5), layout="constrained",
                             squeeze=False)
    for ax, align in zip(axes[0], aligns, strict=False):
        for scatter, style in (("contiguous", "-"), ("pages", ":"), ("random", "--")):
            lines: dict[str, list[tuple[int, float]]] = {}
            for r in good:
                if (r["align"], r["scatter"]) == (align, scatter):
                    lines.setdefault(r["method"], []).append((r["size"], (r["reg_ns"] + r["dereg_ns"]) / 1000))
                    if "plain_reg_ns" in r:
                        plain = (r["plain_reg_ns"] + r["plain_dereg_ns"]) / 1000
                        lines.setdefault("plain C, range by range", []).append((r["size"], plain))
            for colour, (method, points) in enumerate(lines.items()):
                points = sorted(dict(points).items())
                ax.plot(*zip(*points, strict=True), marker="o", color=f"C{colour}", linestyle=style,
                        label=f"{method}, {scatter}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("bytes")
        ax.set_ylabel("register and deregister (us)")
        ax.set_title(f"{align} bytes off the page")
        ax.grid(alpha=0.3)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    fig.savefig(path)
    plt.close(fig)
