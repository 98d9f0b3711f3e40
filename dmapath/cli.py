"""The command line: compare, explain, replay. Exit codes: 0 fine, 1 a comparison or verification failed, 2 bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dmapath import compare as compare_mod
from dmapath._version import __version__
from dmapath.backends.grant import GrantTable
from dmapath.backends.iommu import Iommu
from dmapath.bio import Bio
from dmapath.cli_common import Number, draw, picture, write
from dmapath.cli_guest import KERNEL_OPTION, doctor, guest, rxe
from dmapath.cli_matrix import matrix
from dmapath.cli_verbs import compare_on_verbs, needs_a_device, ping, reg
from dmapath.descriptors import DataPointer, Prp, describe_request
from dmapath.device import Device
from dmapath.errors import DmaError
from dmapath.explain import Explanation
from dmapath.memory import PhysMemory
from dmapath.mr import MemoryRegion
from dmapath.pci import ACS_RR, Fabric, Function
from dmapath.replay import Report
from dmapath.replay import replay as replay_trace
from dmapath.request import Mappable, iterate
from dmapath.rules import CASES
from dmapath.swiotlb import Swiotlb
from dmapath.xen import XenDomain

__all__ = ["main"]

_OPS = {"to": "write", "from": "read"}
_PEERS = ("bus", "host-bridge", "none")


class Range(click.ParamType[tuple[int, int]]):
    """A physical range: PHYS+LEN."""

    name = "phys+len"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read it, or fail with exit code 2."""
        phys, plus, length = value.partition("+")
        if not plus:
            self.fail(f"{value!r} is no range (0x100200+0xe00)", param, ctx)
        number = Number()
        return number.convert(phys, param, ctx), number.convert(length, param, ctx)


def _console() -> Console:
    # piped output keeps one row a line; a terminal keeps its own width
    return Console(markup=False) if sys.stdout.isatty() else Console(width=150, markup=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dmapath")
def cli() -> None:
    """How buffers reach a device: mapped, explained, and compared with a kernel's trace."""


for command in (doctor, guest, rxe, reg, ping, matrix):
    cli.add_command(command)


# ---- compare ------------------------------------------------------------------------------------------------------

def _ptes(r: dict[str, Any]) -> str:
    return " ".join(f"{n}x{size.upper()}" for size, n in r["ptes"].items() if n) or "0"


_Column = tuple[str, Callable[[dict[str, Any]], object]]
_WHICH: tuple[_Column, ...] = (
    ("request", lambda r: f"{r['request']} {r['ranges'] if r['request'] == 'bio' else '16M'} {r['alignment']}"),
    ("policy", lambda r: r["policy"]),
)
_WHAT: tuple[_Column, ...] = (
    ("case", lambda r: CASES[r["case"]][0]),
    ("layout", lambda r: r["layout"]),
    ("segs", lambda r: r["segments"]),
    ("IOVA\nalloc", lambda r: r["iova_allocs"]),
    ("PTEs", _ptes),
    ("IOTLB\ninval", lambda r: r["invalidations"]),
    ("kept\nbytes", lambda r: r["unmap_state_bytes"]),
    ("exposed\nbytes", lambda r: "all" if r["exposed_bytes"] is None else r["exposed_bytes"]),
)
_HOW: tuple[_Column, ...] = (
    ("data", lambda r: "ok" if r["verified"] else "WRONG"),
    ("map\nns", lambda r: r["map_ns"]),
    ("unmap\nns", lambda r: r["unmap_ns"]),
    ("modelled\nns", lambda r: r["modelled_ns"]),
)


def _compare_table(console: Console, rows: list[dict[str, Any]]) -> None:
    wide = console.width >= 119
    parts = [_WHICH + _WHAT + _HOW] if wide else [_WHICH + _WHAT[:6], _WHICH + _WHAT[6:] + _HOW]
    for backend, mode in compare_mod.MODES:
        title = "no IOMMU" if backend == "direct" else f"{mode} IOMMU"
        mine = [r for r in rows if (r["backend"], r["mode"]) == (backend, mode)]
        for columns in parts:
            table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False,
                          padding=(0, 1, 0, 0))  # fmt: skip
            for name, _ in columns:
                left = name in ("request", "policy", "layout", "PTEs")
                table.add_column(name, justify="left" if left else "right", no_wrap=True)
            for r in mine:
                table.add_row(*(str(cell(r)) for _, cell in columns))
            console.print(table)
    console.print(
        "case: " + ", ".join(f"{n} {words}" for n, words in sorted({CASES[r["case"]] for r in rows})) + ". "
        "exposed: bytes that the device can reach beyond the request (all: the whole memory). map, unmap: measured "
        "here, medians. modelled: hardware time from published costs (dmapath.costs), for ranking only.\n"
    )  # fmt: skip


def _six_table(console: Console, six: list[dict[str, Any]]) -> None:
    table = Table(title="the six cases, one driver", title_justify="left", title_style="bold", box=SIMPLE_HEAD,
                  pad_edge=False, padding=(0, 1, 0, 0) if console.width >= 90 else 0)  # fmt: skip
    for name in ("case", "policy", "layout", "segs", "kept\nbytes", "copied\nbytes", "IOTLB\ninval", "exposed", "data"):
        left = name in ("case", "policy", "layout")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    names = {number: name for name, (number, _) in CASES.items()}
    for r in sorted(six, key=lambda r: (r["number"], r["policy"])):
        refused = r["error"] is not None
        what = ("refused", "-", "-", "-", "-", "-", "-") if refused else (
            r["layout"], r["segments"], r["unmap_state_bytes"], r["bounced_bytes"], r["invalidations"],
            "all" if r["exposed_bytes"] is None else r["exposed_bytes"], "ok" if r["verified"] else "WRONG")  # fmt: skip
        table.add_row(*(str(cell) for cell in (f"{r['number']} {names[r['number']]}", r["policy"], *what)))
    console.print(table)
    for r in six:
        if r["error"] is not None:
            console.print(f"case {r['number']}, policy {r['policy']}: {r['error']}", highlight=False)
    console.print()


@cli.command()
@click.option("--json", "json_path", metavar="FILE|-", help="Write the rows as one JSON object; - is standard output.")
@click.option("--plot", "plot_path", metavar="FILE.png|.svg", help="Draw the figures.")
@click.option("--backend", type=click.Choice(["sim", "verbs"]), default="sim", show_default=True,
              help="verbs: aligned and unaligned on a real RDMA device (in a guest, where there is none).")  # fmt: skip
@click.option("--host", is_flag=True, help="verbs: on this machine, without a guest.")
@KERNEL_OPTION
def compare(json_path: str | None, plot_path: str | None, backend: str, host: bool, kernel: str) -> None:
    """The six cases through one driver; then aligned and unaligned requests, by Linux's rules and by the unified flow, on
    no, strict and lazy IOMMU.
    """
    if backend == "verbs":
        if plot_path is not None:
            raise click.UsageError("--plot draws the simulated figures; dmapath reg --plot draws real ones")
        needs_a_device(host, kernel, [json_path])
        compare_on_verbs(json_path)
        return
    picture(plot_path)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("mapping", total=1)
        rows = compare_mod.rows(lambda done, of: bar.update(task, completed=done, total=of))
    six = compare_mod.six_rows()
    text = json.dumps(compare_mod.json_object(rows, six), indent=1)
    if json_path == "-":
        click.echo(text)
    else:
        if json_path is not None:
            write(json_path, text + "\n")
        console = _console()
        _six_table(console, six)
        _compare_table(console, rows)
        for sentence in compare_mod.sentences(rows):
            console.print(sentence, highlight=False)
    if plot_path is not None:
        draw("plot_compare", rows, plot_path)
    if not all(r["verified"] for r in rows) or any(r["verified"] is False for r in six):
        sys.exit(1)


# ---- explain ------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("ranges", nargs=-1, required=True, type=Range(), metavar="PHYS+LEN...")
@click.option("--policy", type=click.Choice(["unified", "linux"]), default="unified", show_default=True)
@click.option("--backend", type=click.Choice(["direct", "iommu", "xen", "grant"]), default="iommu", show_default=True,
              help="xen: machine frames, by swiotlb-xen. grant: Xen grant references.")  # fmt: skip
@click.option("--mode", type=click.Choice(["strict", "lazy"]), default="strict", show_default=True)
@click.option("--dir", "direction", type=click.Choice(["to", "from", "bidi"]), default="from", show_default=True,
              help="to: the device reads memory. bidi: a memory region.")  # fmt: skip
@click.option("--dma-mask", type=Number(), default=2**64 - 1, help="Greatest address the device can name.")
@click.option("--bus-dma-limit", type=Number(), default=0, help="Greatest address its bus can name; 0: no limit.")
@click.option("--untrusted", is_flag=True, help="It may see nothing but the bytes it was given.")
@click.option("--swiotlb", type=click.Choice(["none", "pool", "force"]), default="pool", show_default=True,
              help="Is there a bounce pool; force: everything without an IOMMU goes through it.")  # fmt: skip
@click.option("--p2p", type=Range(), multiple=True, metavar="PHYS+LEN", help="A peer's BAR; give it once for each.")
@click.option("--p2p-type", type=click.Choice(_PEERS), default="bus", show_default=True,
              help="How peers are reached: by bus address (one switch, no ACS), by the host bridge, not.")  # fmt: skip
@click.option("--p2p-bus-offset", type=Number(), default=0, help="Bus address minus physical address.")
@click.option("--xen-frames", type=click.Choice(["scattered", "contiguous"]), default="scattered", show_default=True,
              help="How machine frames lie behind the buffers.")  # fmt: skip
@click.option("--non-coherent", is_flag=True, help="CPU caches do not see its DMA.")
@click.option("--min-align-mask", type=Number(), default=0, help="Address bits a bounce buffer must keep.")
@click.option("--max-segments", type=Number(), default=2**16 - 1)
@click.option("--max-segment-size", type=Number(), default=None, help="Bytes.")
@click.option("--seg-boundary-mask", type=Number(), default=2**64 - 1)
@click.option("--virt-boundary", type=Number(), default=0, help="Mask; 0xfff: the device takes no gaps (PRP).")
@click.option("--dma-alignment", type=Number(), default=0, help="Mask of address and length bits that must be 0.")
@click.option("--forcedac", is_flag=True, help="Do not try IOVA below 4 GiB first.")
@click.option("--nvme", type=click.Choice(["auto", "prp", "sgl"]), is_flag=False, flag_value="auto", default=None,
              help="The NVMe command's descriptors too, as Linux picks them, or in this form.")  # fmt: skip
@click.option("--sgl-threshold", type=Number(), default=32768, show_default=True, help="--nvme: average segment from which "
              "SGLs are used; 0: where they must be.")  # fmt: skip
@click.option("--no-sgl", is_flag=True, help="--nvme: the controller takes PRP entries alone.")
@click.option("--json", "as_json", is_flag=True)
def explain(
    ranges: tuple[tuple[int, int], ...], policy: str, backend: str, mode: str, direction: str, as_json: bool,
    nvme: str | None, sgl_threshold: int, no_sgl: bool, **options: Any,
) -> None:  # fmt: skip
    """Will this buffer list become one range, a gapped range, many ranges, a bounce or an error, and by which rule?"""
    options["coherent"] = not options.pop("non_coherent")
    device = _explained_device(ranges, backend, mode, options)
    request: Mappable
    if direction == "bidi":
        request = MemoryRegion(ranges, length=sum(n for _, n in ranges))
    else:
        request = Bio.from_phys(ranges, op=_OPS[direction])
    told = device.explain(request, policy)
    pointer: DataPointer | DmaError | None = None
    if nvme is not None and told.error is None:
        pointer = _data_pointer(told, request, device, nvme, sgl_threshold, not no_sgl)
    if as_json:
        found = {"nvme": _pointer_dict(pointer)} if pointer is not None else {}
        click.echo(json.dumps({**told.to_dict(), **found}, indent=1))
    else:
        _print_explanation(_console(), told)
        if pointer is not None:
            _print_pointer(_console(), pointer)


def _data_pointer(
    told: Explanation, request: Mappable, device: Device, form: str, threshold: int, sgl: bool
) -> DataPointer | DmaError:
    """What the request becomes in a command, or why one command cannot say it."""
    try:
        return describe_request(told.segments, gap_mask=request.gap_mask, physical=len(iterate(request, device)), form=form,
                                sgl=sgl, sgl_threshold=threshold)  # fmt: skip
    except DmaError as e:
        return e


def _pointer_dict(pointer: DataPointer | DmaError) -> dict[str, Any]:
    if isinstance(pointer, DmaError):
        return {"refused": pointer.rule, "argument": pointer.argument, "value": str(pointer.value), "errno": pointer.errno}
    d = pointer.descriptors
    out: dict[str, Any] = {
        "form": pointer.form, "rule": pointer.rule, "source": pointer.source, "because": pointer.because,
        "list_pages": pointer.list_pages, "list_entries": pointer.list_entries, "pool": d.pool,
    }  # fmt: skip
    if isinstance(d, Prp):
        lists = [[hex(at) for at in page] for page in d.lists]
        return {**out, "prp1": hex(d.prp1), "prp2": None if d.prp2 is None else hex(d.prp2), "lists": lists}
    return {**out, "blocks": [{"addr": hex(at), "len": n} for at, n in d.blocks]}


def _print_pointer(console: Console, pointer: DataPointer | DmaError) -> None:
    """The descriptors, or the rule that refuses them; long lists by their ends."""
    if isinstance(pointer, DmaError):
        console.print(f"\nNVMe command: refused: {pointer}", highlight=False)
        return
    d = pointer.descriptors
    memory = "in the command alone" if not pointer.list_pages else (
        f"{pointer.list_entries} in {pointer.list_pages} {'page' if pointer.list_pages == 1 else 'pages'} of list "
        f"({'256 bytes' if d.pool == 'small' else '4096 bytes'} each)")  # fmt: skip
    console.print(f"\nNVMe command: {pointer.form.upper()}, descriptors {memory}", highlight=False)
    lines = []
    if isinstance(d, Prp):
        lines.append(f"prp1 {hex(d.prp1)}")
        lines.append(f"prp2 {hex(d.prp2)}" if d.prp2 is not None else "prp2 the list" if d.lists else "prp2 not used")
        lines += [f"list {i}[{k}] {hex(at)}" for i, page in enumerate(d.lists) for k, at in enumerate(page)]
    else:
        lines += [f"data block {hex(at)} + {n:#x}" for at, n in d.blocks]
    shown = lines if len(lines) <= 20 else [*lines[:12], f"... {len(lines) - 16} more ...", *lines[-4:]]
    for line in shown:
        console.print(f"  {line}", highlight=False)
    console.print(f"  {pointer.rule}: {pointer.because}\n      from {pointer.source}", highlight=False)


def _explained_device(ranges: tuple[tuple[int, int], ...], backend: str, mode: str, options: dict[str, Any]) -> Device:
    """A device as the options describe it, on a machine that has just the memory that they name."""
    peers, kind, offset = (options.pop(k) for k in ("p2p", "p2p_type", "p2p_bus_offset"))
    frames, wants_pool = options.pop("xen_frames"), options.pop("swiotlb")
    memory = PhysMemory(4096, base=1 << 50)  # the arena itself is nothing's buffer
    pool = None if wants_pool == "none" else Swiotlb(memory if backend == "xen" else None, force=wants_pool == "force")
    if peers:
        options["memory"], options["pci"] = memory, _fabric(memory, peers, kind, offset)
    if backend == "xen":
        xen = XenDomain(memory, pool=pool, layout=frames)
        pages = sorted({p & ~4095 for at, n in ranges for p in range(at & ~4095, at + n, 4096)})
        xen.populate([(p, 4096) for p in pages])
        options["xen"] = xen
    if backend == "grant":
        options["grants"], pool = GrantTable(), None
    return Device(iommu=Iommu(mode) if backend == "iommu" else None, swiotlb=pool, **options)


def _fabric(memory: PhysMemory, peers: tuple[tuple[int, int], ...], kind: str, offset: int) -> Function:
    fabric = Fabric()
    switch = None
    for at, size in peers:
        bridge = (0x8086, 0x2020) if kind != "none" else (0, 0)
        root = fabric.root_complex(bridge, window=(at & ~4095, -(-size // 4096) * 4096), bus_offset=offset)
        switch = root.port().switch()
        peer = switch.port(acs=None if kind == "bus" else ACS_RR).function("peer")
        peer.bar(memory, -(-size // 4096) * 4096)
        if len(peers) > 1 and kind == "bus":
            raise click.UsageError("--p2p-type bus takes one --p2p: peers by bus address share a switch")
    assert switch is not None
    return switch.port().function("device")


def _print_explanation(console: Console, told: Explanation) -> None:
    d = told.to_dict()
    console.print(told.headline(), highlight=False)
    if told.segments:
        console.print("\nsegments")
        for s in d["segments"]:
            console.print(f"  {s['addr']} + {s['len']:#x}", highlight=False)
    if told.maps:
        console.print("\nmaps (IOVA <- physical)")
        for m in d["maps"]:
            console.print(f"  {m['iova']} <- {m['phys']} + {m['len']:#x}", highlight=False)
    if told.bounced:
        console.print("\nbounced" if told.error is None else "\nwould have to bounce")
        for b in d["bounced"]:
            console.print(f"  {b['part']} {b['phys']} + {b['len']:#x}", highlight=False)
    if told.error is None:
        exposed = "all memory" if told.exposed_bytes is None else f"{told.exposed_bytes} bytes"
        console.print(
            f"\nIOVA allocations: {told.iova_allocs} ({told.iova_bytes} bytes)\n"
            f"page-table entries (4K/2M/1G): {'/'.join(str(v) for v in told.ptes.values())}\n"
            f"IOTLB invalidations: {told.invalidations}\n"
            f"kept for unmap: {told.unmap_state_bytes} bytes\n"
            f"exposed beyond the request: {exposed}",
            highlight=False,
        )
    if told.rules:
        console.print("\nrules")
        for rule, source, because in told.rules:
            console.print(f"  {rule}: {because}\n      from {source}", highlight=False)


# ---- replay -------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False), metavar="TRACE...")
@click.option("--json", "as_json", is_flag=True)
@click.option("--trace-out", metavar="FILE", help="Write our own trace of the same I/Os in the kernel's format.")
def replay(traces: tuple[str, ...], as_json: bool, trace_out: str | None) -> None:
    """Map each I/O of a kernel's trace again and compare with what the kernel did (ftrace text, trace-cmd report)."""
    reports = []
    if trace_out is not None and len(traces) > 1:
        raise click.UsageError("--trace-out takes one trace at a time")
    for path in traces:
        try:
            with open(path, encoding="utf-8") as f:
                reports.append(replay_trace(f.readlines(), path, trace=trace_out is not None))
        except UnicodeDecodeError as e:
            raise click.UsageError(f"{path}: not text: {e.reason} at byte {e.start}") from None
    if trace_out is not None:
        write(trace_out, reports[0].traced)
    if as_json:
        click.echo(json.dumps({"version": 1, "traces": [r.to_dict() for r in reports]}, indent=1))
    else:
        for report in reports:
            _print_report(_console(), report)
    if any(r.count("disagree") for r in reports):
        sys.exit(1)


def _print_report(console: Console, report: Report) -> None:
    console.print(f"{report.name} ({report.environment})", style="bold", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("I/O", "line", "bytes", "flow here", "verdict"):
        table.add_column(name, justify="right" if name in ("line", "bytes") else "left", no_wrap=True)
    for o in report.outcomes:
        table.add_row(f"{o.io.name} {o.io.op}", str(o.io.line), str(o.io.total), o.kinds, o.verdict)
    console.print(table)
    for o in report.outcomes:
        for d in o.differences:
            console.print(f"  {o.io.name} {o.io.op}: {d}", highlight=False)
    agree, covered = report.count("agree"), report.count("agree") + report.count("disagree")
    share = f"{100 * agree / covered:.0f} %" if covered else "nothing covered"
    console.print(f"agrees with the kernel on {agree} of {covered} covered I/Os ({share})", highlight=False)
    left_out = [o for o in report.outcomes if o.verdict == "not covered"]
    for reason in sorted({o.reason for o in left_out}):
        n = sum(o.reason == reason for o in left_out)
        console.print(f"not covered: {n} I/Os, {reason}", highlight=False)
    console.print()


def main() -> None:
    """Entry point of the ``dmapath`` command."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except DmaError as e:
        click.echo(f"Error: {e.rule if not e.argument else e.strerror}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
