"""Requests on queue pairs: bytes, cuts, errors and what brings a queue pair back."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import time
from array import array
from collections.abc import Callable
from typing import Any, cast

import pytest
from rdma import RIGHTS

from dmapath import DmaValueError, NoMemoryError, StateError
from dmapath.errors import AddressTypeError, CompletionError, VerbsError
from dmapath.rdma import cut
from dmapath.verbs import LOCAL_WRITE, REMOTE_READ, STATUS, Batch, Completion, Cq, Mr, Pd, Qp, QpInfo, loopback

Pair = tuple[Qp, Qp]


def both(pair: Pair) -> None:
    for qp in pair:
        qp.recover()


def test_bytes_of_every_offset_and_length(pd: Pd, pair: Pair) -> None:
    source, target = bytearray(os.urandom(1 << 16)), bytearray(1 << 16)
    with Mr(pd, source, access=RIGHTS) as s, Mr(pd, target, access=RIGHTS) as t:
        for at in (0, 1, 7, 63, 64, 4095):
            for n in (1, 2, 63, 64, 511, 4096, 4097, 3 * 4096 + 5):
                for to in (0, 1, 4090):
                    target[:] = b"\xa5" * (1 << 16)
                    pair[0].write([s.segment(at, n)], int(t.addr) + to, t.rkey)
                    assert target == b"\xa5" * to + source[at : at + n] + b"\xa5" * ((1 << 16) - to - n), (at, n, to)
                    target[to : to + n] = bytes(n)
                    pair[0].read([t.segment(to, n)], int(s.addr) + at, s.rkey)
                    assert target[to : to + n] == source[at : at + n], (at, n, to)


def test_one_request_over_many_segments(pd: Pd) -> None:
    """100 segments are more than max_sge: several work requests, one id, one wait."""
    first, second = loopback(pd, max_sge=8)
    source, target = bytearray(os.urandom(1 << 16)), bytearray(1 << 16)
    with Mr(pd, source, access=RIGHTS) as s, Mr(pd, target, access=RIGHTS) as t:
        parts = [(37 * i, 1 + i) for i in range(100)]
        want = b"".join(source[a : a + n] for a, n in parts)
        request = first.post("write", [s.segment(a, n) for a, n in parts], int(t.addr) + 5, t.rkey)
        assert first.outstanding == 13
        first.wait(request)
        assert first.outstanding == 0
        assert target[5 : 5 + len(want)] == want
        back = bytearray(os.urandom(1 << 16))
        with Mr(pd, back, access=RIGHTS) as b:
            first.read([b.segment(a, n) for a, n in parts], int(t.addr) + 5, t.rkey)
            assert b"".join(back[a : a + n] for a, n in parts) == want
        with pytest.raises(DmaValueError, match="one message of at most 8 segments"):
            first.post("send", [s.segment(a, n) for a, n in parts])
        assert first.outstanding == 0
    first.close()
    second.close()


def test_cut() -> None:
    assert cut([], 4, 100) == [[]]
    assert cut([(0, 0, 1)], 4, 100) == [[]]
    assert cut([(0, 10, 1), (10, 5, 1), (15, 5, 2), (30, 1, 2)], 4, 100) == [[(0, 15, 1), (15, 5, 2), (30, 1, 2)]]
    assert cut([(0, 250, 1)], 4, 100) == [[(0, 100, 1)], [(100, 100, 1)], [(200, 50, 1)]]
    assert cut([(0, 10, 1), (20, 10, 1), (40, 10, 1)], 2, 15) == [[(0, 10, 1), (20, 5, 1)], [(25, 5, 1), (40, 10, 1)]]


def test_messages(pd: Pd, pair: Pair) -> None:
    first, second = pair
    source, target = bytearray(os.urandom(9000)), bytearray(9000)
    with Mr(pd, source) as s, Mr(pd, target, access=RIGHTS) as t:
        second.recv([t.segment(1, 3000), t.segment(5000, 4000)])
        second.recv([t.segment(4001, 10)])
        second.recv([])
        first.wait(first.post("send", [s.segment(3, 4000)]))
        done = second.arrived()
        assert (done.opcode, done.length, done.imm) == ("recv", 4000, None)
        assert target[1:3001] + target[5000:6000] == source[3:4003]
        first.wait(first.post("send_imm", [s.segment(0, 10)], imm=0xDEADBEEF))
        assert (second.arrived().imm, target[4001:4011]) == (0xDEADBEEF, source[:10])
        first.wait(first.post("write_imm", [s.segment(0, 99)], int(t.addr) + 7000, t.rkey, imm=0))
        done = second.arrived()
        assert (done.opcode, done.imm, target[7000:7099]) == ("recv_write_imm", 0, source[:99])
        with pytest.raises(VerbsError, match=r"nothing was received within 0\.01 s"):
            second.arrived(0.01)


def test_inline_needs_no_registration(pd: Pd) -> None:
    first, second = loopback(pd, max_inline=64)
    data, target = bytearray(os.urandom(64)), bytearray(64)
    with Mr(pd, target, access=RIGHTS) as t:
        at = ctypes.addressof(ctypes.c_char.from_buffer(data))
        first.wait(first.post("write", [(at, 60, 0)], t.addr, t.rkey, inline=True))
        assert target[:60] == data[:60]
        with pytest.raises(DmaValueError, match="bytes go inline"):
            first.post("write", [(at, 60, 0), (at, first.max_inline, 0)], t.addr, t.rkey, inline=True)
    first.close()
    second.close()


def test_atomics(pd: Pd, pair: Pair) -> None:
    first = pair[0]
    cell, old = bytearray(64), bytearray(16)
    with Mr(pd, cell, access=RIGHTS) as c, Mr(pd, old, access=LOCAL_WRITE) as o:
        at = int(c.addr) + (-int(c.addr) & 7)
        off = at - int(c.addr)
        cell[off : off + 8] = (41).to_bytes(8, "little")
        first.wait(first.fetch_add(o.segment(0, 8), at, c.rkey, 1))
        first.wait(first.cmp_swp(o.segment(8, 8), at, c.rkey, 42, 7))
        assert [int.from_bytes(b, "little") for b in (old[:8], old[8:], cell[off : off + 8])] == [41, 42, 7]
        with pytest.raises(DmaValueError, match="multiple of 8"):
            first.fetch_add(o.segment(0, 8), at + 4, c.rkey, 1)
        with pytest.raises(DmaValueError, match="8 bytes"):
            first.fetch_add(o.segment(0, 4), at, c.rkey, 1)


def test_a_batch_in_columns(pd: Pd, pair: Pair) -> None:
    first = pair[0]
    source, target = bytearray(os.urandom(1 << 16)), bytearray(1 << 16)
    with Mr(pd, source, access=RIGHTS) as s, Mr(pd, target, access=RIGHTS) as t:
        n = 64
        places = [(i * 613, 1 + i * 7, i * 1000 + 3) for i in range(n)]
        batch = Batch(n, addr=array("Q", [int(s.addr) + a for a, _, _ in places]), lkey=s.lkey,
                      length=array("I", [k for _, k, _ in places]), rkey=t.rkey,
                      remote_addr=array("Q", [int(t.addr) + b for _, _, b in places]))  # fmt: skip
        assert first.run(batch) == 1
        for a, k, b in places:
            assert target[b : b + k] == source[a : a + k]
        source[:] = bytes(1 << 16)
        assert first.run(batch, "read", signal_all=True) == n
        for a, k, b in places:
            assert target[b : b + k] == source[a : a + k]
        for _ in range(5):  # the ring goes round
            first.run(batch)
        assert first.outstanding == 0
        small = Batch(129, addr=int(s.addr), lkey=s.lkey, length=1, remote_addr=int(t.addr), rkey=t.rkey)
        with pytest.raises(NoMemoryError, match="the send queue holds 128, 0 are outstanding and 129 more"):
            first.run(small)
    for wrong in (array("Q", [1]), array("I", [1] * n), array("d", [1] * n), b"12345678" * n):
        with pytest.raises((DmaValueError, TypeError)):
            Batch(n, addr=wrong, lkey=1, length=1)


def test_numpy_columns(pd: Pd, pair: Pair) -> None:
    np = pytest.importorskip("numpy", reason="numpy is missing: pip install numpy")
    buf = np.zeros(4096, dtype=np.uint8)
    buf[:64] = range(64)
    with Mr(pd, buf, access=RIGHTS) as mr:
        addr = int(mr.addr) + np.arange(4, dtype=np.uint64) * np.uint64(16)
        batch = Batch(4, addr=addr, lkey=mr.lkey, length=np.full(4, 16, dtype=np.uint32), remote_addr=addr + np.uint64(2048),
                      rkey=mr.rkey)  # fmt: skip
        pair[0].run(batch)
    assert (buf[2048:2112] == buf[:64]).all()


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_what_the_remote_side_refuses_is_named_and_the_pair_recovers(pd: Pd, pair: Pair) -> None:
    first, second = pair
    buf, read_only = bytearray(8192), bytearray(8192)
    with Mr(pd, buf, access=RIGHTS) as mr, Mr(pd, read_only, access=REMOTE_READ) as ro:
        base = int(mr.addr)
        wrong = {
            "one byte past the end": (base + 8192 - 63, mr.rkey),
            "before the start": (base - 1, mr.rkey),
            "a key of nobody's": (base, mr.rkey ^ 0x5A00),
            "a missing right": (int(ro.addr), ro.rkey),
        }
        for what, (addr, rkey) in wrong.items():
            request = first.post("write", [mr.segment(0, 64)], addr, rkey)
            with pytest.raises(CompletionError) as e:
                first.wait(request)
            assert e.value.status == STATUS["rem_access"], what
            assert (e.value.request, e.value.opcode, e.value.segment) == (request, "write", 0)
            assert (e.value.address, e.value.key, e.value.length, e.value.qp_num) == (addr, rkey, 64, first.info.qp_num)
            assert (first.state, second.state) == ("error", "error")
            both(pair)
            first.write([mr.segment(0, 64)], base + 4096, mr.rkey)
        assert read_only == bytes(8192)
        first.read([mr.segment(0, 64)], ro.addr, ro.rkey)


def test_the_failing_work_request_of_a_long_request_is_named(pd: Pd) -> None:
    first, second = loopback(pd, max_sge=1)
    buf = bytearray(8192)
    with Mr(pd, buf, access=RIGHTS) as mr, Mr(pd, bytearray(b"x" * 4096)) as s:
        request = first.post("write", [s.segment(i * 256, 100) for i in range(10)], int(mr.addr) + 8192 - 650, mr.rkey)
        after = first.post("write", [s.segment(0, 1)], mr.addr, mr.rkey)
        with pytest.raises(CompletionError) as e:
            first.wait(after)  # one before it failed
        assert (e.value.request, e.value.segment, e.value.address) == (request, 6, int(mr.addr) + 8192 - 50)
        assert buf[8192 - 650 : 8192 - 50] == b"x" * 600
        with pytest.raises(CompletionError):
            first.wait(request)
        first.recover()
        first.wait(after)  # forgotten with everything else
    first.close()
    second.close()


def test_a_bad_local_key_fails(pd: Pd, pair: Pair) -> None:
    with Mr(pd, bytearray(64), access=RIGHTS) as mr:
        addr, n, _ = mr.segment()
        with pytest.raises(CompletionError) as e:
            pair[0].write([(addr, n, 0xBAD)], mr.addr, mr.rkey)
        assert e.value.status in (STATUS["loc_prot"], STATUS["flush"], STATUS["loc_qp_op"])
    both(pair)


def test_receiver_not_ready_and_too_short(pd: Pd) -> None:
    first, second = Qp(pd), Qp(pd)
    first.connect(second.info, rnr_retry=1, min_rnr_timer=1)
    second.connect(first.info, min_rnr_timer=1)
    buf = bytearray(256)
    with Mr(pd, buf, access=RIGHTS) as mr:
        with pytest.raises(CompletionError, match="RNR retry counter exceeded") as e:
            first.wait(first.post("send", [mr.segment(0, 16)]))
        assert (e.value.status, e.value.opcode) == (STATUS["rnr_retry"], "send")
        both((first, second))
        second.recv([mr.segment(128, 8)])
        with pytest.raises(CompletionError) as e:
            first.wait(first.post("send", [mr.segment(0, 16)]))
        assert e.value.status in (STATUS["rem_inv_req"], STATUS["rem_op"])
        with pytest.raises(CompletionError) as e:
            second.arrived()
        assert (e.value.opcode, e.value.address) == ("recv", int(mr.addr) + 128)
        both((first, second))
        second.recv([mr.segment(128, 16)])
        first.wait(first.post("send", [mr.segment(0, 16)]))
        assert second.arrived().length == 16
    first.close()
    second.close()


def test_a_peer_that_is_gone_exhausts_retries(pd: Pd) -> None:
    first, second = Qp(pd), Qp(pd)
    first.connect(second.info, timeout=8, retry_cnt=1)
    second.connect(first.info)
    second.close()
    with Mr(pd, bytearray(64), access=RIGHTS) as mr, pytest.raises(CompletionError, match="transport retry counter") as e:
        first.write(mr, mr.addr, mr.rkey)
    assert e.value.status == STATUS["retry"]
    first.close()


def test_a_full_queue_and_one_that_nobody_polls(pd: Pd) -> None:
    first, second = loopback(pd, max_send_wr=4, max_recv_wr=2)
    with Mr(pd, bytearray(64), access=RIGHTS) as mr:
        ids = [first.post("write", [mr.segment(0, 8)], mr.addr, mr.rkey) for _ in range(4)]
        with pytest.raises(NoMemoryError, match="the send queue holds 4, 4 are outstanding and 1 more"):
            first.post("write", [mr.segment(0, 8)], mr.addr, mr.rkey)
        first.wait(ids[1])
        first.wait(ids[-1])
        first.wait(first.post("write", [mr.segment(0, 8)], mr.addr, mr.rkey))
        for _ in range(2):
            second.recv([mr.segment(0, 8)])
        with pytest.raises(NoMemoryError, match="all of its 2 are outstanding"):
            second.recv([mr.segment(0, 8)])
        second.reset()
    first.close()
    second.close()


def test_a_completion_queue_that_is_too_small_is_refused(pd: Pd) -> None:
    with Cq(pd.context, 8) as cq:
        few: dict[str, Any] = {"max_send_wr": cq.cqe - 3, "max_recv_wr": 4}
        with pytest.raises(DmaValueError, match="a completion queue that cannot overflow"):
            Qp(pd, cq, **few)
        few["max_send_wr"] -= 1
        with Qp(pd, cq, **few), pytest.raises(DmaValueError, match="cannot overflow"):
            Qp(pd, cq, max_send_wr=1, max_recv_wr=1)
        with Qp(pd, cq, **few):
            pass


def test_an_overflown_queue_says_so(pd: Pd) -> None:
    """Overcommitted on purpose: the device reports it, and new queues work."""
    cq = Cq(pd.context, 3)
    first, second = Qp(pd, cq, max_send_wr=64, overcommit=True), Qp(pd)
    first.connect(second.info)
    second.connect(first.info)
    with Mr(pd, bytearray(64), access=RIGHTS) as mr:
        batch = Batch(16, addr=int(mr.addr), lkey=mr.lkey, length=8, remote_addr=int(mr.addr), rkey=mr.rkey)
        first.post_batch(batch, signal_all=True)
        end = time.monotonic() + 20
        seen: list[str] = []
        while "CQ error" not in seen and time.monotonic() < end:
            seen += pd.context.events()
            time.sleep(0.02)
        assert "CQ error" in seen
        first.close()
        cq.close()
        second.close()
        again = loopback(pd)
        again[0].write(mr, mr.addr, mr.rkey)
    for qp in again:
        qp.close()
    pd.context.events()


def test_completions_of_a_shared_queue_reach_their_own(pd: Pd) -> None:
    with Cq(pd.context, 1024) as cq:
        first, second = Qp(pd, cq), Qp(pd, cq)
        first.connect(second.info)
        second.connect(first.info)
        buf = bytearray(range(64))
        with Mr(pd, buf, access=RIGHTS) as mr:
            second.recv([mr.segment(32, 8)])
            other = second.post("write", [mr.segment(0, 4)], int(mr.addr) + 48, mr.rkey)
            first.wait(first.post("send", [mr.segment(0, 8)]))
            assert second.arrived().length == 8
            second.wait(other)
            bad = second.post("write", [mr.segment(0, 4)], int(mr.addr) + 62, mr.rkey)
            with pytest.raises(CompletionError):
                second.wait(bad)
        first.close()
        second.close()


def test_poll_gives_what_failed_too(pd: Pd, pair: Pair) -> None:
    first = pair[0]
    with Mr(pd, bytearray(64), access=RIGHTS) as mr:
        first.post("write", [mr.segment(0, 8)], mr.addr, mr.rkey)
        bad = first.post("write", [mr.segment(0, 8)], 0x1234, mr.rkey)
        seen: list[Completion] = []
        while len(seen) < 2:
            seen += first.send_cq.poll(timeout=5)
        assert [c.ok for c in seen] == [True, False]
        assert seen[0].error() is None
        error = seen[1].error()
        assert error is not None
        assert (error.request, error.address) == (bad, 0x1234)
        assert "Qp.recover" in str(error)
        assert pickle.loads(pickle.dumps(error)).details == error.details
    both(pair)


def test_bad_arguments(pd: Pd, pair: Pair) -> None:
    first = pair[0]
    batch = Batch(1, addr=1, lkey=1, length=1)
    wrong: list[Callable[[], object]] = [
        lambda: first.post("wrote", []),
        lambda: first.post_batch(batch, "atomic"),
        lambda: first.connect(first.info, mtu=4000),
        lambda: QpInfo.from_json("{}"),
        lambda: Qp(pd, max_send_wr=0),
        lambda: Qp(pd, max_send_wr=1 << 30),
        lambda: Cq(pd.context, 1 << 30),
    ]
    for call in wrong:
        with pytest.raises((DmaValueError, VerbsError)):
            call()
    calls: list[Callable[[], object]] = [
        lambda: first.connect(cast(QpInfo, "me")), lambda: first.post("send", [(1, 2)]),
        lambda: first.post("send", [object()])]
    for call in calls:
        with pytest.raises((AddressTypeError, ValueError)):
            call()
    assert first.outstanding == 0
    assert QpInfo.from_json(first.info.to_json()) == first.info


def test_a_wait_can_be_interrupted(pd: Pd, pair: Pair) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            pair[0].arrived(timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_closed_pair(pd: Pd) -> None:
    first, second = loopback(pd)
    first.close()
    first.close()
    second.close()
    with pytest.raises(StateError, match="the queue pair was closed"):
        first.post("write", [])
    fresh = Qp(pd)
    with pytest.raises(StateError, match="never connected"):
        fresh.recover()
    fresh.close()
