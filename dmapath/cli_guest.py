"""The commands about machines: guest, rxe, doctor."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dmapath.doctor import examine
from dmapath.errors import DmaError
from dmapath.guest import KERNELS, Result, find_kernel, missing_packages, prepare, run, run_pair

__all__ = ["KERNEL_OPTION", "doctor", "guest", "in_a_guest", "plain_errors", "rxe"]


@contextmanager
def plain_errors() -> Iterator[None]:
    """What goes wrong is one line and exit code 2; a SIGTERM ends the guest as Ctrl-C does."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except DmaError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(kernel: str, *, rxe: bool = True) -> None:
    """Fetch what is missing, with a bar."""
    if not missing_packages(rxe=rxe) and (kernel not in KERNELS or find_kernel(kernel, missing_ok=True)):
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=None)
        said = ""

        def show(text: str, done: int, total: int) -> None:
            nonlocal said
            if text != said and not console.is_terminal:
                console.print(text, highlight=False)
            said = text
            bar.update(task, description=text, completed=done, total=total or None)

        prepare(kernel, show, rxe=rxe)


def in_a_guest(command: list[str], *, kernel: str = "6.1", timeout: float = 600.0, **options: Any) -> Result:
    """Run a command with soft-RoCE in a guest, fetching what that takes."""
    _prepare(kernel)
    return run(command, kernel=kernel, rxe=True, timeout=timeout, **options)


KERNEL_OPTION = click.option("--kernel", default="6.1", show_default=True, metavar="|".join([*KERNELS, "PATH"]),
                       help="A Debian kernel by version, or a bzImage with its modules.")  # fmt: skip


@click.group()
def guest() -> None:
    """Throw-away guests: this machine's files, another kernel, soft-RoCE, an IOMMU, an NVMe disk."""


@guest.command("prepare")
@KERNEL_OPTION
def prepare_command(kernel: str) -> None:
    """Fetch and cache what a guest takes, through this machine's own package manager."""
    with plain_errors():
        _prepare(kernel)
        found = find_kernel(kernel)
        assert found is not None
        size = sum(p.stat().st_size for p in [found.image, *found.modules.iterdir()])
        click.echo(f"ready: kernel {found.release}, {size / 1e6:.0f} MB kept in {found.image.parent}")


@guest.command("run", context_settings={"ignore_unknown_options": True})
@KERNEL_OPTION
@click.option("--rxe", is_flag=True, help="Soft-RoCE: device rxe0 on 10.10.0.1.")
@click.option("--nvme", is_flag=True, help="An emulated NVMe disk of 64 MiB.")
@click.option("--iommu", type=click.Choice(["strict", "lazy", "passthrough"]), help="An emulated Intel IOMMU.")
@click.option(
    "--share", type=click.Path(exists=True, file_okay=False), help="A folder that CMD may write to, at its own place."
)
@click.option("--pair", is_flag=True, help="Two guests on one cable; DMAPATH_SIDE and DMAPATH_PEER tell them apart.")
@click.option("--memory", type=int, default=1024, show_default=True, help="MiB.")
@click.option("--cpus", type=int, default=2, show_default=True)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds after which the guest is ended.")
@click.option("--icount", is_flag=True, help="The guest's clock counts instructions, 1000 to the microsecond.")
@click.option("--console", is_flag=True, help="Print the kernel's messages afterwards.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(cmd: tuple[str, ...], pair: bool, console: bool, kernel: str, rxe: bool, **options: Any) -> None:
    """Boot a guest, run CMD in it with the same environment and working folder, stream its output, return its status."""
    with plain_errors():
        _prepare(kernel, rxe=rxe)
        results = (run_pair if pair else _alone)(list(cmd), kernel=kernel, rxe=rxe, **options)
    for result in results if console else ():
        click.echo(result.console, err=True)
    sys.exit(next((r.status for r in results if r.status), 0))


def _alone(cmd: list[str], **options: Any) -> tuple[Result]:
    return (run(cmd, **options),)


# ---- rxe ------------------------------------------------------------------------------------------------------------


@click.group()
def rxe() -> None:
    """Soft-RoCE: the project's tests of real RDMA."""


@rxe.command("test", context_settings={"ignore_unknown_options": True})
@KERNEL_OPTION
@click.option("--host", is_flag=True, help="On this machine's own device, without a guest.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds after which the guest is ended.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def test_command(kernel: str, host: bool, timeout: float, args: tuple[str, ...]) -> None:
    """Run tests/verbs with pytest in a guest; ARGS go to pytest."""
    tests = Path("tests/verbs")
    if not tests.is_dir():
        raise click.UsageError("tests/verbs is not here: run this in a checkout of dmapath")
    # asserts are rewritten anew in the guest: the tests' own folder is read-only there
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(args or ()), str(tests)]
    if host:
        os.execv(sys.executable, command)
    with plain_errors():
        result = in_a_guest(command, kernel=kernel, timeout=timeout)
    click.echo(
        f"guest: kernel {kernel}, {result.accel}, booted in {result.boot_seconds:.0f} s, {result.seconds:.0f} s in all"
    )
    sys.exit(result.status)


# ---- doctor ---------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """What this machine has for real RDMA and for guests, and what to do about what it has not."""
    findings = examine()
    if as_json:
        click.echo(json.dumps([f._asdict() for f in findings], indent=1))
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for style in ("bold", "", "yellow"):
        table.add_column(style=style, overflow="fold")
    for f in findings:
        table.add_row(*f)
    Console(markup=False, width=None if sys.stdout.isatty() else 150).print(table)
