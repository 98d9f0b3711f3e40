"""What several commands share: numbers, files, pictures."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import click

__all__ = ["Number", "draw", "picture", "write"]


class Number(click.ParamType[int]):
    """An integer: decimal or 0x hex, with an optional K, M or G (powers of 1024)."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or fail with exit code 2."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)([KMG]?)", value.strip())
        if match is None:
            self.fail(f"{value!r} is no number (12, 0x1000, 64K)", param, ctx)
        return int(match[1], 0) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def write(path: str, text: str) -> None:
    """A text file, or exit code 2."""
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise click.UsageError(f"cannot write {path}: {e.strerror}") from None


def picture(path: str | None) -> None:
    """Exit code 2 unless a picture can be of that name."""
    if path is not None and not path.endswith((".png", ".svg")):
        raise click.UsageError("--plot wants a name that ends in .png or .svg")


def draw(name: str, rows: list[dict[str, Any]], path: str) -> None:
    """A picture by a function of dmapath.plot, or exit code 2."""
    try:
        getattr(importlib.import_module("dmapath.plot"), name)(rows, path)
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'dmapath[plot]'") from None
    except OSError as e:
        raise click.UsageError(f"cannot write {path}: {e.strerror}") from None
