"""Kernel traces as text: ftrace's own and what ``trace-cmd report`` prints.

Events are told by their name and the keys of their body, never by column; the formats are those of Linux 7.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dmapath.errors import TraceError

__all__ = ["Command", "Io", "TraceEvent", "parse_lines", "read_ios"]

_LINE = re.compile(
    r"^\s*(?P<comm>\S.*?)-(?P<pid>\d+)\s+(?:\(.{7}\)\s+)?\[(?P<cpu>\d+)\]\s+(?:(?P<flags>[^\s\d]\S{3,5}|\.{4,6})\s+)?"
    r"(?P<time>\d+\.\d+):\s+(?P<event>\w+):\s*(?P<body>.*?)\s*$"
)
_HEX, _DEC = r"(0x[0-9a-fA-F]+)", r"(\d+)"
_DMA = r"([0-9a-f]+)"
_BODIES = {
    "map": re.compile(rf"IOMMU: iova={_HEX} - {_HEX} paddr={_HEX} size={_DEC}$"),
    "unmap": re.compile(rf"IOMMU: iova={_HEX} - {_HEX} size={_DEC} unmapped_size={_DEC}$"),
    "dma_map_phys": re.compile(rf"(\S+) dir=(\w+) dma_addr={_DMA} size={_DEC} phys_addr={_DMA} attrs=(\S*)$"),
    "dma_unmap_phys": re.compile(rf"(\S+) dir=(\w+) dma_addr={_DMA} size={_DEC} attrs=(\S*)$"),
    "dma_alloc": re.compile(rf"(\S+) dir=(\w+) dma_addr={_DMA} size={_DEC} virt_addr=\S+ flags=\S* attrs=(\S*)$"),
    "swiotlb_bounced": re.compile(rf"dev_name: (\S+) dma_mask={_DMA} dev_addr={_DMA} size={_DEC} (FORCE|NORMAL)$"),
    "cache_tag_flush_range": re.compile(
        rf"(\S+ \S+) type (\w+) did \d+ \[{_HEX}-{_HEX}\] addr {_HEX} mask {_HEX}$"),
    "nvme_setup_cmd": re.compile(r"(\w+): .*cmd=\((nvme_cmd_\w+) .*\)$"),
    "BEGIN": re.compile(rf"BEGIN (\S+) (read|write) n={_DEC} total={_HEX}$"),
    "VEC": re.compile(rf"VEC {_DEC} pa={_HEX} len={_HEX}$"),
    "END": re.compile(r"END (\S+) r=(-?\d+) errno=(\d+)$"),
}  # fmt: skip
# names that older kernels gave to the same event
_ALIASES = {
    "dma_map_page": "dma_map_phys",
    "dma_map_resource": "dma_map_phys",
    "dma_unmap_page": "dma_unmap_phys",
    "dma_unmap_resource": "dma_unmap_phys",
    "cache_tag_flush_range_np": "cache_tag_flush_range",
}
_MARKERS = ("tracing_mark_write", "print", "bprint")


@dataclass(frozen=True)
class TraceEvent:
    """One line: where it stands, the event's name and the values of its body (numbers as int)."""

    line: int
    name: str
    kind: str
    values: tuple[int | str, ...]

    def num(self, i: int) -> int:
        """Value i, which is a number."""
        value = self.values[i]
        assert isinstance(value, int)
        return value


@dataclass
class Command:
    """One NVMe command and what the kernel did to map it."""

    line: int
    op: str
    events: list[TraceEvent] = field(default_factory=list)

    def of(self, kind: str, name: str | None = None) -> list[TraceEvent]:
        """Its events of one kind."""
        return [e for e in self.events if e.kind == kind and name in (None, e.name)]


@dataclass
class Io:
    """One announced I/O: its vectors, and the commands it became."""

    line: int
    name: str
    op: str
    total: int
    expected: int
    vecs: list[tuple[int, int]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    result: int | None = None


def _values(match: re.Match[str]) -> tuple[int | str, ...]:
    return tuple(
        int(g, 16) if g.startswith("0x") else int(g) if g.lstrip("-").isdecimal() else g for g in match.groups()
    )


def _body(kind: str, text: str) -> tuple[int | str, ...] | None:
    match = _BODIES[kind].match(text)
    if match is None:
        return None
    if kind in ("dma_map_phys", "dma_unmap_phys", "dma_alloc", "swiotlb_bounced"):
        return _dma_values(kind, match)
    return _values(match)


def _dma_values(kind: str, match: re.Match[str]) -> tuple[int | str, ...]:
    """Addresses of dma and swiotlb events are hex without 0x, sizes decimal: told by place, since both may be digits."""
    hexes = {"dma_map_phys": (2, 4), "dma_unmap_phys": (2,), "dma_alloc": (2,), "swiotlb_bounced": (1, 2)}[kind]
    size = 3
    return tuple(
        int(g, 16) if i in hexes else int(g) if i == size else g for i, g in enumerate(match.groups())
    )


def parse_lines(lines: Iterator[str] | list[str], name: str) -> Iterator[TraceEvent]:
    """The events of a trace that concern mapping. Raises TraceError with file, line and reason."""
    promised: int | None = None
    seen = 0
    last = 0
    for number, text in enumerate(lines, 1):
        last = number
        if not text.strip():
            continue
        if text.startswith("#") or re.match(r"^(cpus=\d+|version = \d+)", text):
            header = re.match(r"^#\s*entries-in-buffer/entries-written: (\d+)/(\d+)", text)
            if header:
                promised = int(header[1])
                if int(header[2]) > promised:
                    raise TraceError(f"{name}:{number}: the buffer overran: {header[2]} entries were written, "
                                     f"{promised} kept")  # fmt: skip
            continue
        match = _LINE.match(text)
        if match is None:
            raise TraceError(f"{name}:{number}: not a trace line: {text.strip()[:60]!r}")
        seen += 1
        event = _event(match["event"], match["body"], number, name)
        if event is not None:
            yield event
    if promised is not None and seen < promised:
        raise TraceError(f"{name}:{last}: truncated: the header promises {promised} entries, there are {seen}")


def _event(raw: str, body: str, number: int, name: str) -> TraceEvent | None:
    if raw in _MARKERS:
        body = re.sub(r"^(tracing_mark_write: |0x[0-9a-f]+s?: )", "", body)
        kind = body.split(" ", 1)[0]
        if kind not in ("BEGIN", "VEC", "END"):
            return None
        raw = kind
    kind = _ALIASES.get(raw, raw)
    if kind not in _BODIES:
        return None
    values = _body(kind, body)
    if values is None:
        raise TraceError(f"{name}:{number}: malformed {raw} event: {body[:80]!r}")
    return TraceEvent(number, raw, kind, values)


def read_ios(lines: Iterator[str] | list[str], name: str) -> list[Io]:
    """The I/Os that a trace announces. Raises TraceError where one is cut short or out of place."""
    ios: list[Io] = []
    current: Io | None = None
    owner: dict[int, Command] = {}  # IOVA -> the command that mapped it
    for e in parse_lines(lines, name):
        where = f"{name}:{e.line}"
        if e.kind == "BEGIN":
            if current is not None:
                raise TraceError(f"{where}: an I/O begins inside {current.name!r} of line {current.line}")
            current = Io(e.line, str(e.values[0]), str(e.values[1]), e.num(3), e.num(2))
            owner.clear()
        elif current is None:
            if e.kind in ("VEC", "END"):
                raise TraceError(f"{where}: {e.kind} outside an I/O")
        elif e.kind == "VEC":
            if e.num(0) != len(current.vecs):
                raise TraceError(f"{where}: vector {len(current.vecs)} is wanted, this is {e.num(0)}")
            current.vecs.append((e.num(1), e.num(2)))
        elif e.kind == "END":
            _finish(current, e, where)
            ios.append(current)
            current = None
        elif e.kind == "nvme_setup_cmd":
            current.commands.append(Command(e.line, str(e.values[1])))
        elif current.commands:
            _assign(current, e, owner)
    if current is not None:
        raise TraceError(f"{name}:{current.line}: truncated: the I/O {current.name!r} has no END")
    return ios


def _finish(io: Io, e: TraceEvent, where: str) -> None:
    if len(io.vecs) != io.expected:
        raise TraceError(f"{where}: {io.name!r} announced {io.expected} vectors, {len(io.vecs)} came")
    if sum(n for _, n in io.vecs) != io.total:
        raise TraceError(f"{where}: the vectors of {io.name!r} make {sum(n for _, n in io.vecs):#x} bytes, "
                         f"{io.total:#x} were announced")  # fmt: skip
    io.result = e.num(1)


def _assign(io: Io, e: TraceEvent, owner: dict[int, Command]) -> None:
    """Give an event to its command: maps to the latest, unmaps and flushes to whoever mapped the address."""
    latest = io.commands[-1]
    if e.kind == "map":
        owner[e.num(0)] = latest
    elif e.kind == "dma_alloc":  # a descriptor page of the driver's, and its sync flush, not the request's
        at = e.num(2)
        latest.events = [x for x in latest.events if not (x.kind == "map" and x.num(0) == at)
                         and not (x.kind == "cache_tag_flush_range" and x.num(2) == at)]  # fmt: skip
        return
    place = {"unmap": 0, "cache_tag_flush_range": 2, "dma_unmap_phys": 2}.get(e.kind)
    target = latest if place is None else owner.get(e.num(place) & ~0xFFF, latest)
    target.events.append(e)
