from dmapath.backends.base import Backend
from dmapath.xen import XenDomain

class DirectBackend(Backend):
    def __init__(self, xen: XenDomain | None = None) -> None: ...
