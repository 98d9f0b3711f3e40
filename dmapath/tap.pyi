from typing import Any

def caller() -> str: ...

class Call:
    op: str
    phys: Any
    addr: Any
    size: Any
    offset: Any
    dir: Any
    attrs: Any
    vecs: Any
    segments: Any
    state: Any
    write: Any
    done: Any
    rc: Any
    mapping: Any
    index: Any
    region: Any
    @property
    def where(self) -> str: ...

class Tap: ...
