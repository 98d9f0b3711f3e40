"""``dmapath matrix``: every driver on every machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dmapath import machines
from dmapath import matrix as matrix_mod
from dmapath.cli_common import write
from dmapath.cli_guest import KERNEL_OPTION
from dmapath.cli_verbs import needs_a_device

__all__ = ["matrix"]


def _print(every: list[dict[str, Any]]) -> None:
    console = Console(markup=False, width=None if sys.stdout.isatty() else 150)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in matrix_mod.HEADINGS:
        table.add_column(name, no_wrap=console.width >= 140)
    for line in matrix_mod.table(every):
        table.add_row(*line)
    console.print(table)
    bad = [r for r in every if not r["verified"] or r["leaks"]]
    console.print(
        f"{len(every)} cells (each alignment read and written, {matrix_mod.REQUESTS} requests in flight, completed in any "
        "order by the NVMe controller): layout (case). "
        + ("Every byte was compared, around the requests too; nothing was left behind." if not bad else f"WRONG: {bad[0]}"),
        highlight=False,
    )


@click.command()
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Only this machine; give it once for each.")
@click.option("--verbs", "with_verbs", is_flag=True, help="rblk on real RDMA too (in a guest, where there is no device).")
@click.option("--host", is_flag=True, help="--verbs: on this machine, without a guest.")
@click.option("--json", "json_path", metavar="FILE|-", help="Write the rows as one JSON object; - is standard output.")
@click.option("--markdown", is_flag=True, help="Print the table as docs/matrix.md has it.")
@KERNEL_OPTION
def matrix(
    backends: tuple[str, ...], with_verbs: bool, host: bool, json_path: str | None, markdown: bool, kernel: str
) -> None:
    """The drivers nvme and rblk on every machine, with memory aligned, unaligned and mixed: every byte compared, nothing
    left behind, and how each was mapped. Exit code 1 where something was wrong.
    """
    known = [*machines.names_of_all(), "verbs"]
    for name in backends:
        if name not in known:
            raise click.UsageError(f"--backend {name}: one of {', '.join(known)}")
    chosen = [*(backends or machines.names_of_all()), *(["verbs"] if with_verbs and "verbs" not in backends else [])]
    if "verbs" in chosen:
        needs_a_device(host, kernel, [json_path])
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("moving bytes", total=1)
        every = matrix_mod.rows(chosen, lambda done, of: bar.update(task, completed=done, total=of))
    text = json.dumps({"version": 1, "rows": every}, indent=1)
    if json_path == "-":
        click.echo(text)
    else:
        if json_path is not None:
            write(json_path, text + "\n")
        if markdown:
            click.echo(matrix_mod.markdown(every), nl=False)
        else:
            _print(every)
    if any(not r["verified"] or r["leaks"] for r in every):
        sys.exit(1)
