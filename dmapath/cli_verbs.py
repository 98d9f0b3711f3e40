"""The commands on real RDMA: reg, ping, and compare's other half."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dmapath import reg as reg_mod
from dmapath.cli_common import Number, draw, picture, write
from dmapath.cli_guest import KERNEL_OPTION, in_a_guest, plain_errors
from dmapath.errors import DmaError
from dmapath.mr import LOCAL_WRITE, MW_BIND, REMOTE_ATOMIC, REMOTE_READ, REMOTE_WRITE

__all__ = ["compare_on_verbs", "needs_a_device", "ping", "reg"]

RIGHTS = {"local-write": LOCAL_WRITE, "remote-read": REMOTE_READ, "remote-write": REMOTE_WRITE,
          "remote-atomic": REMOTE_ATOMIC, "mw-bind": MW_BIND}  # fmt: skip


def needs_a_device(host: bool, kernel: str, writes: list[str | None], *, icount: bool = False, memory: int = 1024) -> None:
    """Go on where this machine has an RDMA device; else run this very command in a guest that has, and end with its
    status.
    """
    try:
        from dmapath.verbs import devices

        there = bool(devices())
    except ImportError as e:
        raise click.UsageError(str(e)) from None
    if there or host or "DMAPATH_GUEST" in os.environ:
        return
    folders = {str(Path(p).resolve().parent) for p in writes if p not in (None, "-")}
    if len(folders) > 1:
        raise click.UsageError("in a guest, files can be written to one folder only")
    click.echo("no RDMA device here: running this in a guest with soft-RoCE (--host: not)", err=True)
    with plain_errors():
        result = in_a_guest([sys.executable, "-m", "dmapath.cli", *sys.argv[1:]], kernel=kernel, icount=icount,
                            memory=memory,
                            share=next(iter(folders), None))  # fmt: skip
    sys.exit(result.status)


class Sizes(click.ParamType[list[int]]):
    """Numbers with K, M, G, comma by comma; A..B are all powers of four between."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Read them, or fail with exit code 2."""
        if isinstance(value, list):
            return value
        out: list[int] = []
        for part in value.split(","):
            ends = [Number().convert(word, param, ctx) for word in part.split("..", 1)]
            out.append(ends[0])
            while len(ends) == 2 and out[-1] * 4 <= ends[1]:
                out.append(out[-1] * 4)
            if len(ends) == 2 and out[-1] != ends[1]:
                out.append(ends[1])
        return out


class Names(click.ParamType[list[str]]):
    """Names of a set, comma by comma."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Read them, or fail with exit code 2."""
        names = value if isinstance(value, list) else value.split(",")
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is none of {', '.join(self.known)}", param, ctx)
        return list(names)


def _table(title: str, columns: list[tuple[str, bool]], rows: list[list[str]]) -> None:
    console = Console(markup=False, width=None if sys.stdout.isatty() else 150)
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name, left in columns:
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _write_json(path: str | None, data: dict[str, Any]) -> bool:
    """Write JSON to a file or to standard output; True where that is all that is to be printed."""
    if path is None:
        return False
    text = json.dumps(data, indent=1)
    if path == "-":
        click.echo(text)
        return True
    write(path, text + "\n")
    return False


def bytes_text(n: int) -> str:
    """4096 as 4K."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if n and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


# ---- reg ------------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--sizes", type=Sizes(), default="4K,64K,1M,16M", show_default=True, help="4K..1G: powers of four.")
@click.option("--page-size", type=click.Choice(["4K", "2M"]), default="4K", show_default=True)
@click.option(
    "--align", "aligns", type=Sizes(), default="0,64", show_default=True, help="Bytes off the page: 0,1,64,512,4095."
)
@click.option("--scatter", "scatters", type=Names(reg_mod.SCATTER), default="contiguous,random", show_default=True)
@click.option("--method", "methods", type=Names(reg_mod.METHODS), default=",".join(reg_mod.METHODS), show_default=True)
@click.option("--access", type=Names(tuple(RIGHTS)), default=None, help=f"Of {', '.join(RIGHTS)}; default: by direction.")
@click.option("--op", type=click.Choice(["read", "write"]), default="read", show_default=True,
              help="read: the device writes to the memory.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--backend", type=click.Choice(["sim", "verbs"]), default="verbs", show_default=True)
@click.option("--device", help="RDMA device; default: the first.")
@click.option("--host", is_flag=True, help="On this machine, without a guest.")
@click.option("--icount", is_flag=True, help="In a guest: count instructions, 1 to the nanosecond.")
@KERNEL_OPTION
@click.option("--json", "json_path", metavar="FILE|-")
@click.option("--plot", "plot_path", metavar="FILE.png|.svg")
def reg(
    sizes: list[int], page_size: str, aligns: list[int], scatters: list[str], methods: list[str], access: list[str] | None,
    op: str, threads: int, backend: str, device: str | None, host: bool, icount: bool, kernel: str, json_path: str | None,
    plot_path: str | None,
) -> None:  # fmt: skip
    """What registering memory costs: time to register and deregister, keys, entries of a work request, bytes pinned."""
    picture(plot_path)
    if any(n <= 0 for n in sizes) or any(a >= 4096 for a in aligns):
        raise click.UsageError("--sizes wants positive numbers, --align numbers below 4096")
    if backend == "verbs":
        needs_a_device(host, kernel, [json_path, plot_path], icount=icount, memory=max(1024, 6 * max(sizes) >> 20))
    if page_size == "2M" and "DMAPATH_GUEST" in os.environ:  # the guest is thrown away: its pool of huge pages is ours
        Path("/proc/sys/vm/nr_hugepages").write_text(str(2 * (max(sizes) >> 21) + 8))
    bits = None if access is None else sum(RIGHTS[a] for a in set(access))
    every = reg_mod.cases(sizes, aligns, scatters, 4096 if page_size == "4K" else 2 << 20)
    out = []
    with plain_errors(), Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("registering", total=1)
        out = list(reg_mod.rows(backend, every, methods, op=op, access=bits, threads=threads, device=device,
                                progress=lambda done, of: bar.update(task, completed=done, total=of)))  # fmt: skip
    if not _write_json(json_path, reg_mod.json_object(out)):
        _reg_table(out, backend, icount or "DMAPATH_ICOUNT" in os.environ)
    if plot_path is not None:
        draw("plot_reg", out, plot_path)


def _reg_table(out: list[dict[str, Any]], backend: str, icount: bool) -> None:
    plain = backend == "verbs"
    last = ["plain C us", "ratio"] if plain else ["modelled us"]
    columns = [(n, n in ("scatter", "method")) for n in (
        "bytes", "align", "scatter", "method", "ranges", "regs", "lkeys", "SGEs", "pinned", "reg us", "dereg us", "ns/page",
        *last)]  # fmt: skip
    rows = []
    for r in out:
        head = [bytes_text(r["size"]), str(r["align"]), r["scatter"], r["method"]]
        if r["error"] is not None:
            rows.append([*head, *["-"] * (len(columns) - len(head))])
            continue
        tail = (
            [f"{r['modelled_ns'] / 1000:.1f}"]
            if not plain
            else (
                [f"{(r['plain_reg_ns'] + r['plain_dereg_ns']) / 1000:.1f}", f"{r['ratio']:.2f}"]
                if "ratio" in r
                else ["-", "-"]
            )
        )
        rows.append([*head, str(r["ranges"]), str(r["registrations"]), str(r["lkeys"]), str(r["sges"]),
                     str(r["pinned_bytes"]),
                     f"{r['reg_ns'] / 1000:.1f}", f"{r['dereg_ns'] / 1000:.1f}", f"{r['ns_per_page']:.0f}",
                     *tail])  # fmt: skip
    _table(f"registering memory, {'rdma-core' if plain else 'simulated IOMMU'}", columns, rows)
    for reason in dict.fromkeys(r["error"] for r in out if r["error"]):
        click.echo(f"-: {reason}")
    if plain:
        click.echo("plain C: ibv_reg_mr and ibv_dereg_mr of the same ranges one by one, in the same rounds; medians."
                   + (" 1 us is 1000 instructions." if icount else ""))  # fmt: skip
    else:
        click.echo(
            "reg, dereg: what mapping took here, medians. modelled: hardware time from published costs (dmapath.costs)."
        )


# ---- ping -----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("peer", required=False)
@click.option("--port", type=int, default=18515, show_default=True, help="TCP port to meet at.")
@click.option("--device", help="RDMA device; default: the first.")
@click.option("--size", type=Sizes(), default="64K", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--align", type=click.IntRange(0, 4095), default=0, show_default=True)
@click.option("--mode", type=click.Choice(["linear", "per-range", "direct"]), default="linear", show_default=True)
def ping(peer: str | None, size: list[int], **options: Any) -> None:
    """Exchange bytes with another dmapath over RDMA and compare them: without PEER wait for one, else meet it there."""
    from dmapath.verbs.ping import ping as run_ping

    with plain_errors():
        try:
            report = run_ping(peer, size=size[0], **options)
        except OSError as e:
            if isinstance(e, DmaError):
                raise
            raise click.ClickException(f"{peer or 'nobody came'}: {e}") from None
    click.echo(f"{report.rounds} rounds of {bytes_text(report.bytes)}, {report.layout}, {report.segments} segments: "
               f"{report.round_ns / 1000:.0f} us to write one in the median, "
               f"{'every byte right' if report.verified else 'WRONG BYTES'}")  # fmt: skip
    sys.exit(0 if report.verified else 1)


# ---- compare --------------------------------------------------------------------------------------------------------


def compare_on_verbs(json_path: str | None) -> None:
    """Aligned and unaligned flows on the real device, verified at the remote side."""
    from dmapath.verbs.flows import rows, sentences

    with plain_errors(), Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("mapping", total=1)
        out = rows(lambda done, of: bar.update(task, completed=done, total=of))
    if not _write_json(json_path, {"version": 1, "backend": "verbs", "rows": out}):
        columns = [(n, n in ("alignment", "method", "layout")) for n in (
            "ranges", "alignment", "method", "layout", "regs", "keys", "SGEs", "work requests", "map us", "write us",
            "read us",
            "unmap us", "data")]  # fmt: skip
        _table("ranges of 4 KiB over RDMA, rdma-core", columns, [[
            str(r["ranges"]), r["alignment"], r["method"], r["layout"], str(r["registrations"]), str(r["keys"]),
            str(r["sges"]),
            str(r["work_requests"]), *(f"{r[k] / 1000:.0f}" for k in ("map_ns", "write_ns", "read_ns", "unmap_ns")),
            "ok" if r["verified"] else "WRONG"] for r in out])  # fmt: skip
        for sentence in sentences(out):
            click.echo(sentence)
    if not all(r["verified"] for r in out):
        sys.exit(1)
