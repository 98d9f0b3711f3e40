from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmapath.addr import DmaAddr

FORM_RULES: tuple[tuple[str, str, str], ...]
FORMS: dict[str, int]

@dataclass
class Prp:
    prp1: DmaAddr
    prp2: DmaAddr | None = None
    lists: list[list[DmaAddr]] = ...
    pool: str | None = None
    @property
    def entries(self) -> int: ...

@dataclass
class Sgl:
    blocks: list[tuple[DmaAddr, int]]
    pool: str | None = None

@dataclass
class DataPointer:
    form: str
    rule: str
    source: str
    because: str
    descriptors: Prp | Sgl
    list_pages: int
    list_entries: int

def build_prp(segments: Iterable[Any], *, kernel_quirks: bool = False) -> Prp: ...
def describe_request(
    segments: Iterable[Any],
    *,
    gap_mask: int = 0,
    physical: int = 0,
    form: str = "auto",
    sgl: bool = True,
    sgl_threshold: int = 32768,
) -> DataPointer: ...
