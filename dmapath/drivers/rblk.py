"""A block device over RDMA: requests become RDMA READs and WRITEs between local memory and a remote region.

One flow: map, post, poll, unmap. Segments come with their keys; whether a request was registered for itself, in a window,
or found in a cache, and on which device, is the back end's business.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dmapath.addr import as_dma, as_integer, as_length, as_seconds
from dmapath.bio import Bio, Request
from dmapath.device import Device, Mapping
from dmapath.errors import AddressTypeError, DmaError, DmaValueError, NoMemoryError, StateError, VerbsError, at_end
from dmapath.limits import QueueLimits
from dmapath.rdma import STATUS, as_key

__all__ = ["Io", "Rblk"]

SECTOR = 512
#: Failures that another try may mend: nobody answered, or another request's failure took this one along.
AGAIN = (STATUS["flush"], STATUS["retry"], STATUS["rnr_retry"])


@dataclass
class _Command:
    request: Bio | Request
    io: Io
    tries: int = 0
    error: DmaError | None = None


@dataclass
class Io:
    """Requests that were submitted together."""

    driver: Rblk
    commands: list[_Command] = field(default_factory=list)
    finished: int = 0

    @property
    def done(self) -> bool:
        """Whether all of them are complete."""
        return self.finished == len(self.commands)

    @property
    def errors(self) -> list[DmaError]:
        """What failed, in the order of the requests."""
        return [c.error for c in self.commands if c.error is not None]

    def wait(self, timeout: float = 10.0) -> None:
        """Work until all are done; raises the first error. VerbsError (ETIMEDOUT) when they are not within ``timeout``
        seconds.
        """
        self.driver.drive(self, timeout)
        for error in self.errors:
            raise error


class Rblk:
    """The driver of one remote region as a disk.

    Parameters
    ----------
    device : Device
        How local memory is mapped; its segments carry keys that ``qp`` knows.
    qp : Qp
        A connected queue pair, of ``dmapath.verbs`` or of ``dmapath.drivers.rnic``; nobody else uses it.
    remote_addr, rkey, size
        The remote region: address, key, bytes.
    queue_depth : int
        Requests in flight.
    max_bytes : int
        Longest request; longer bios are split.
    retries : int
        How often a request is tried again that nobody answered.
    recover : callable
        Brings both ends of the connection back after an error; default: ``qp.recover``, which does this end.

    """

    def __init__(self, device: Device, qp: Any, remote_addr: int, rkey: int, size: int, *, queue_depth: int = 16,
                 policy: str = "unified", max_bytes: int = 1 << 20, retries: int = 3,
                 recover: Callable[[], None] | None = None) -> None:  # fmt: skip
        if as_length(size, "size") % SECTOR:
            raise DmaValueError("whole sectors of 512 bytes", argument="size", value=size)
        queue_depth = as_integer(queue_depth, "queue_depth", least=1, last=qp.depth, what="the queue pair's depth")
        max_bytes, retries = as_length(max_bytes, "max_bytes", least=SECTOR), as_integer(retries, "retries")
        rkey, remote_addr = as_key(rkey, "rkey"), as_dma(remote_addr, "remote_addr")
        self.device, self.qp, self.remote_addr, self.rkey, self.size = device, qp, remote_addr, rkey, size
        self.queue_depth, self.policy, self.max_bytes, self.retries = queue_depth, policy, max_bytes, retries
        self._recover = qp.recover if recover is None else recover
        # a quarter of the send queue at most, so that requests overlap
        self._limits = QueueLimits.of(device, qp.max_sge * max(1, qp.depth // 4))
        self._waiting: deque[_Command] = deque()
        self._flying: dict[int, tuple[_Command, Mapping]] = {}
        self._broken = self._closed = False
        self._counts = dict.fromkeys(("requests", "retries", "recoveries"), 0)
        #: How the last request was mapped: its case, its layout and its segments.
        self.told: dict[str, Any] = {}

    def _must_live(self) -> None:
        if self._closed:
            raise StateError("it was closed", argument="self", value=self)

    # ---- requests

    def submit(self, requests: Bio | Request | Iterable[Bio | Request]) -> Io:
        """Hand over a Bio, a Request, or an iterable of them; an Io, which may be done later."""
        self._must_live()
        whole = [requests] if isinstance(requests, (Bio, Request)) else list(requests)
        io = Io(self)
        io.commands = [_Command(part, io) for request in whole for part in self._parts(request)]
        self._waiting.extend(io.commands)
        self._issue()
        return io

    def _parts(self, request: Bio | Request) -> list[Bio | Request]:
        if not isinstance(request, (Bio, Request)):
            raise AddressTypeError("a Bio or a Request is wanted", argument="requests", value=request)
        if request.total % SECTOR or not request.total:
            raise DmaValueError("whole sectors of 512 bytes", argument="requests", value=request)
        if request.sector * SECTOR + request.total > self.size:
            raise DmaValueError(f"within the disk's {self.size} bytes", argument="requests", value=request)
        return [*request.split(self._limits, max_bytes=self.max_bytes)] if isinstance(request, Bio) else [request]

    def run(self, requests: Bio | Request | Iterable[Bio | Request], timeout: float = 10.0) -> Io:
        """Submit and wait."""
        as_seconds(timeout)
        io = self.submit(requests)
        io.wait(timeout)
        return io

    # ---- the flow

    def _issue(self) -> None:
        """Post what waits, while there is room for it."""
        while self._waiting and len(self._flying) < self.queue_depth and not self._broken:
            command = self._waiting[0]
            try:
                self._post(command)
            except NoMemoryError as e:
                if self._flying:
                    return  # what others hold comes back when they complete
                self._finish(command, e)
            except DmaError as e:
                self._finish(command, e)
            self._waiting.popleft()

    def _post(self, command: _Command) -> None:
        request = command.request
        mapping = self.device.map(request, self.policy)
        try:
            number = self.qp.post(request.op, mapping, self.remote_addr + request.sector * SECTOR, self.rkey)
        except BaseException:
            mapping.unmap()
            raise
        self.told = {"case": mapping.case, "layout": mapping.layout, "segments": len(mapping)}
        self._flying[number] = command, mapping
        self._counts["requests"] += 1

    def _finish(self, command: _Command, error: DmaError | None) -> None:
        command.error = error
        command.io.finished += 1

    def _reap(self, timeout: float) -> int:
        """Take what completed, wait for the first; how many."""
        completions = self.qp.send_cq.poll(64, timeout)
        for done in completions:
            command, mapping = self._flying.pop(done.request, (None, None))
            if command is None or mapping is None:
                continue  # a later work request of a request that failed already
            mapping.unmap()
            if done.ok:
                self._finish(command, None)
                continue
            self._broken = True
            if done.status in AGAIN and command.tries < self.retries:
                command.tries += done.status != STATUS["flush"]
                self._counts["retries"] += 1
                self._waiting.appendleft(command)
            else:
                self._finish(command, done.error())
        if self._broken and not self._flying:
            self._recover()
            self._broken = False
            self._counts["recoveries"] += 1
        return len(completions)

    def drive(self, io: Io, timeout: float) -> None:
        """Work until an Io is done; Io.wait calls it."""
        end = time.monotonic() + as_seconds(timeout)
        if not io.done:
            self._must_live()
        while not io.done:
            self._issue()
            got = 0 if io.finished == len(io.commands) else self._reap(max(0.0, end - time.monotonic()))
            if got == 0 and io.finished < len(io.commands) and time.monotonic() >= end:
                undone = len(io.commands) - io.finished
                raise VerbsError(f"{undone} of {len(io.commands)} requests did not complete within {timeout} s; they are in "
                                 "flight until close()", errno=110, argument="timeout", value=timeout)  # fmt: skip

    # ---- what it did

    @property
    def in_flight(self) -> int:
        """Requests that the queue pair has."""
        return len(self._flying)

    def counters(self) -> dict[str, int]:
        """Requests posted, tried again, and recoveries of the connection."""
        return dict(self._counts)

    def close(self) -> None:
        """Give everything back. Requests in flight fail with a StateError, and the queue pair, which stays its owner's, is
        reset first, so that nothing of theirs moves any more: ``Qp.recover`` brings it back.
        """
        if self._closed:
            return
        self._closed = True
        flying, waiting = list(self._flying.values()), list(self._waiting)
        self._flying.clear()
        self._waiting.clear()
        ended = StateError("the driver was closed before it was done", argument="requests", value=len(flying) + len(waiting))
        for command in (*(c for c, _ in flying), *waiting):
            self._finish(command, ended)
        with contextlib.suppress(DmaError):  # the queue pair is closed, or its device is gone: nothing moves then either
            if flying:
                self.qp.reset()
        at_end(None, *(mapping.unmap for _, mapping in flying))

    def __enter__(self) -> Rblk:
        self._must_live()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        at_end(error, self.close)
