"""Real RDMA through libibverbs: the back end ``Verbs``, and the objects that move bytes over it.

``Device(backend=Verbs(Pd(), memory), memory=memory)`` maps as on any other back end; segments carry keys. Objects are opened
here, or are the user's own pyverbs ones (``Context(ctx)``, ``Pd(pd, context=...)``, ``Cq(cq, context=...)``, ``Qp(pd, cq,
of=qp)``, ``Mr(pd, mr)``), whose lives stay their owner's.
"""

try:
    from dmapath.verbs.backend import Verbs
except ImportError as e:
    raise ImportError(
        f"dmapath.verbs needs libibverbs, here and when dmapath is built ({e}): apt-get install libibverbs-dev "
        "ibverbs-providers, then install dmapath again"
    ) from None
from dmapath.mr import LOCAL_WRITE, MW_BIND, ON_DEMAND, REMOTE_ATOMIC, REMOTE_READ, REMOTE_WRITE
from dmapath.rdma import REMOTE_ALL, STATUS
from dmapath.verbs.exchange import accept, dial, meet, tell
from dmapath.verbs.probe import FEATURES, require, self_test
from dmapath.verbs.queue import Batch, Completion, Cq, Qp, QpInfo, loopback
from dmapath.verbs.resources import Context, Mr, Mw, Pd, devices, memlock

__all__ = [
    "FEATURES",
    "LOCAL_WRITE",
    "MW_BIND",
    "ON_DEMAND",
    "REMOTE_ALL",
    "REMOTE_ATOMIC",
    "REMOTE_READ",
    "REMOTE_WRITE",
    "STATUS",
    "Batch",
    "Completion",
    "Context",
    "Cq",
    "Mr",
    "Mw",
    "Pd",
    "Qp",
    "QpInfo",
    "Verbs",
    "accept",
    "devices",
    "dial",
    "loopback",
    "meet",
    "memlock",
    "require",
    "self_test",
    "tell",
]
