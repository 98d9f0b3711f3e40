from typing import Any

from dmapath.backends.base import Backend

class PythonBackend(Backend):
    owner: Any
    def __init__(self, owner: Any) -> None: ...
