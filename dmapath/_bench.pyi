from collections.abc import Sequence

from dmapath.device import Device, Segment
from dmapath.request import Mappable

def time_request(dev: Device, rq: Mappable, policy: str, rounds: int) -> tuple[int, int]: ...
def run(name: str, dev: Device, rq: Mappable, rounds: int, policy: str = "unified") -> float: ...
def dma_against_memcpy(
    dev: Device, segments: Sequence[Segment], pages: Sequence[tuple[int, int]], rounds: int
) -> tuple[int, int]: ...
