"""Waits that end, errors that name what can be at fault, and with blocks that keep the error that is on its way."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
from rdma import RIGHTS, Machine

from dmapath import Bio, DmaError, DmaValueError, StateError
from dmapath.drivers.rblk import Rblk
from dmapath.errors import AddressTypeError, CompletionError, VerbsError
from dmapath.verbs import REMOTE_WRITE, STATUS, Cq, Mr, Pd, Qp, loopback

PAGE = 4096


def test_a_peer_that_is_gone_ends_the_wait(pd: Pd) -> None:
    """By default a send ends with "retry" in bounded time, and names the peer."""
    first, second = loopback(pd)
    buf = bytearray(2 * PAGE)
    with Mr(pd, buf, access=RIGHTS) as mr:
        second.close()
        start = time.monotonic()
        with pytest.raises(CompletionError, match="does not answer") as e:
            first.write([mr.segment(0, 64)], int(mr.addr) + PAGE, mr.rkey)
        assert e.value.status == STATUS["retry"]
        assert e.value.entries == ()
        assert time.monotonic() - start < 9
        first.close()


def test_rblk_closes_with_requests_in_flight(pd: Pd) -> None:
    """Whatever became of the peer: requests fail, and nothing stays mapped or registered."""
    first, second = loopback(pd)
    far = bytearray(1 << 16)
    with Mr(pd, far, access=RIGHTS) as mr, Machine(pd, "per-range") as m:
        disk = Rblk(m.dev, first, mr.addr, mr.rkey, len(far))
        disk.run(Bio.from_memory(m.memory, [(0, PAGE)], "write"))
        second.close()
        io = disk.submit([Bio.from_memory(m.memory, [(i * PAGE, PAGE)], "read") for i in range(4)])
        assert disk.in_flight
        disk.close()
        assert disk.in_flight == 0
        assert io.done
        assert all(isinstance(e, DmaError) for e in io.errors)
        assert len(io.errors) == 4
        disk.close()
        with pytest.raises(StateError):
            disk.submit(Bio.from_memory(m.memory, [(0, PAGE)], "read"))
    first.close()


def test_a_timeout_is_a_deadline(pd: Pd) -> None:
    """Other requests' completions on the same queue do not give the time anew."""
    cq = Cq(pd.context, 1024)
    busy, idle = Qp(pd, cq), Qp(pd, cq)
    ends = [Qp(pd), Qp(pd)]
    for qp, other in zip((busy, idle), ends, strict=True):
        qp.connect(other.info)
        other.connect(qp.info)
    buf = bytearray(2 * PAGE)
    with Mr(pd, buf, access=RIGHTS) as mr:
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.05):
                busy.post("write", [mr.segment(0, 64)], int(mr.addr) + PAGE, mr.rkey)

        worker = threading.Thread(target=work)
        request = idle.recv([mr.segment(0, 64)])  # nobody sends
        worker.start()
        start = time.monotonic()
        try:
            with pytest.raises(VerbsError) as e:
                idle.arrived(timeout=0.5)
        finally:
            stop.set()
            worker.join()
        assert request is not None
        assert e.value.errno == 110
        assert time.monotonic() - start < 3
        for qp in (busy, idle, *ends):
            qp.reset()
            qp.close()
    cq.close()


@pytest.mark.parametrize(("argument", "call"), [
    ("retry_cnt", lambda a, b: a.connect(b.info, retry_cnt=9)),
    ("rnr_retry", lambda a, b: a.connect(b.info, rnr_retry=8)),
    ("timeout", lambda a, b: a.connect(b.info, timeout=32)),
    ("min_rnr_timer", lambda a, b: a.connect(b.info, min_rnr_timer=32)),
    ("mtu", lambda a, b: a.connect(b.info, mtu=1000)),
    ("max_inline", lambda a, b: Qp(a.pd, max_inline=1 << 20)),
    ("max_send_wr", lambda a, b: Qp(a.pd, max_send_wr=1 << 30)),
    ("max_sge", lambda a, b: Qp(a.pd, max_sge=10_000)),
    ("access", lambda a, b: Mr(a.pd, bytearray(64), access=REMOTE_WRITE)),
])  # fmt: skip
def test_what_can_be_known_before_is_said_by_name(pd: Pd, argument: str, call: Any) -> None:
    with Qp(pd) as a, Qp(pd) as b:
        with pytest.raises(DmaError) as e:
            call(a, b)
        assert e.value.argument == argument


def test_order_of_calls(pd: Pd, pair: tuple[Qp, Qp]) -> None:
    with pytest.raises(StateError, match="connected already"):
        pair[0].connect(pair[1].info)
    with Qp(pd) as qp, Mr(pd, bytearray(64)) as mr, pytest.raises(StateError):
        qp.recv([mr.segment()])


def test_a_wrong_local_key_is_named(pd: Pd) -> None:
    """Of several entries the one that no region covers; not the remote key, which is right."""
    first, second = loopback(pd)
    buf = bytearray(2 * PAGE)
    with Mr(pd, buf, access=RIGHTS) as mr:
        good, (addr, n, key) = mr.segment(0, 64), mr.segment(64, 64)
        with pytest.raises(CompletionError) as e:
            first.write([good, (addr, n, key ^ 0x5500)], int(mr.addr) + PAGE, mr.rkey)
        assert e.value.status in (STATUS["loc_prot"], STATUS["loc_qp_op"])  # soft-RoCE says the second
        assert e.value.entries == ((addr, n, key ^ 0x5500),)
        assert f"{key ^ 0x5500:#x}" in str(e.value)
        assert f"key {mr.rkey:#x}" not in str(e.value) or mr.rkey == key
    first.close()
    second.close()


def test_a_with_block_keeps_its_own_error(pd: Pd) -> None:
    first, second = loopback(pd)
    with pytest.raises(KeyError, match="mine"), Mr(pd, bytearray(PAGE), access=RIGHTS) as mr:
        first.recv([mr.segment(0, 64)])  # outstanding: leaving would be refused
        raise KeyError("mine")
    assert "closed" in repr(mr) or "deregistered" in repr(mr)
    first.reset()
    first.close()
    second.close()


def test_a_buffer_of_objects_is_refused(pd: Pd) -> None:
    with pytest.raises(AddressTypeError, match="objects"):
        Mr(pd, (ctypes.py_object * 4)())
    with pytest.raises(DmaValueError):
        Mr(pd, bytearray(64), length=0)
