"""The simulated HCA: every operation by bytes, every mistake by its verbs status, keys, and recovery."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import live
from hypothesis import given, settings
from hypothesis import strategies as st

from dmapath import (
    AddressTypeError,
    Bio,
    Device,
    DmaError,
    DmaValueError,
    Iommu,
    MemoryRegion,
    NoMemoryError,
    PhysMemory,
    StateError,
)
from dmapath.devices.rnic import Rnic
from dmapath.drivers.registered import Registered
from dmapath.drivers.rnic import Context, Cq, FastMr, Mr, Pd, Qp, loopback
from dmapath.errors import CompletionError, VerbsError
from dmapath.rdma import STATUS

LW, RW, RR, RA = 1, 2, 4, 8
ALL = LW | RW | RR | RA
SIZE = 1 << 18
FAR = (1 << 44) + 0x333


@dataclass
class Side:
    memory: PhysMemory
    hca: Rnic
    device: Device
    context: Context
    pd: Pd


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    made = []
    for seed in (1, 2):
        memory, hca = PhysMemory(SIZE, layout="scattered", seed=seed), Rnic()
        device = Device(memory=memory, iommu=Iommu("strict"), **hca.limits)
        hca.attach(device)
        context = Context(hca, device)
        memoryview(memory)[:] = os.urandom(SIZE)
        made.append(Side(memory, hca, device, context, Pd(context)))
    made[0].hca.connect(made[1].hca)
    yield made[0], made[1]
    for side in made:
        side.context.close()  # proves that nothing made in it lives
        assert not any(live(side.device).values())
        assert side.hca.counters()["keys_live"] == side.hca.counters()["cqs_live"] == 0


@pytest.fixture
def pair(sides: tuple[Side, Side]) -> Iterator[tuple[Qp, Qp]]:
    with Qp(sides[0].pd) as a, Qp(sides[1].pd) as b:
        a.connect(b.qp_num)
        b.connect(a.qp_num)
        yield a, b


def part(side: Side, at: int, n: int) -> bytes:
    return bytes(memoryview(side.memory)[at : at + n])


def test_write_read_send_receive(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, b = pair
    with Mr(near.pd, near.memory, 100, 100_000) as mine, Mr(far.pd, far.memory, 0x333, 120_000, iova=FAR, access=ALL) as its:
        assert int(its.addr) == FAR
        a.write(mine, int(its.addr) + 5, its.rkey)
        assert part(far, 0x338, 100_000) == part(near, 100, 100_000)
        far_bytes = part(far, 0x333 + 9000, 50_001)
        a.read([mine.segment(7, 20_000), mine.segment(40_000, 30_001)], int(its.addr) + 9000, its.rkey)
        assert part(near, 107, 20_000) + part(near, 40_100, 30_001) == far_bytes
        ids = [b.recv([its.segment(0, 100), its.segment(200, 5000)]) for _ in range(3)]
        a.wait(a.post("send", [mine.segment(0, 3000)]))
        a.wait(a.post("send_imm", [mine.segment(0, 0)], imm=0xABCD))
        a.wait(a.post("write_imm", [mine.segment(0, 64)], its.addr, its.rkey, imm=7))
        got = [b.arrived() for _ in range(3)]
        assert [(g.request, g.opcode, g.length, g.imm) for g in got] == [
            (ids[0], "recv", 3000, None), (ids[1], "recv", 0, 0xABCD), (ids[2], "recv_write_imm", 64, 7)]  # fmt: skip
        assert part(far, 0x333 + 200, 2900) == part(near, 200, 2900)
        a.wait(a.post("write", b"inline!", its.addr, its.rkey, inline=True))
        assert part(far, 0x333, 7) == b"inline!"
        assert near.hca.counters()["requests"] == 6
        assert near.hca.counters()["mtt_reads"] > 0


def test_atomics(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, _ = pair
    memoryview(far.memory)[64:72] = (2**64 - 1).to_bytes(8, "little")
    with Mr(near.pd, near.memory, 0, 4096) as mine, Mr(far.pd, far.memory, 0, 4096, access=ALL) as its:
        a.wait(a.fetch_add(mine.segment(8, 8), 64, its.rkey, 3))
        assert (part(near, 8, 8), part(far, 64, 8)) == (b"\xff" * 8, (2).to_bytes(8, "little"))
        a.wait(a.cmp_swp(mine.segment(16, 8), 64, its.rkey, 5, 9))
        a.wait(a.cmp_swp(mine.segment(24, 8), 64, its.rkey, 2, 9))
        assert (part(near, 16, 8), part(near, 24, 8), part(far, 64, 8)) == (
            *[(2).to_bytes(8, "little")] * 2,
            (9).to_bytes(8, "little"),
        )


def failing(a: Qp, b: Qp, call: Callable[[], Any]) -> CompletionError:
    with pytest.raises(CompletionError) as e:
        a.wait(call())
    for qp in (b, a):
        qp.recover()
    return e.value


def test_every_mistake_has_its_status(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, b = pair
    other = Pd(near.context)
    with (
        Mr(near.pd, near.memory, 0, 8192) as mine,
        Mr(far.pd, far.memory, 0, 8192, access=ALL) as its,
        Mr(near.pd, near.memory, 0, 4096, access=0) as const,
        Mr(other, near.memory, 0, 4096) as foreign,
        Mr(far.pd, far.memory, 8192, 4096, access=RR) as readable,
    ):
        before = part(far, 0, SIZE), part(near, 0, SIZE)
        seg = mine.segment
        cases: dict[str, tuple[str, Callable[[], int]]] = {
            "local key unknown": ("loc_prot", lambda: a.post("write", [(0, 8, 0x999900)], 0, its.rkey)),
            "local key stale": ("loc_prot", lambda: a.post("write", [(0, 8, mine.lkey ^ 1)], 0, its.rkey)),
            "local key of another domain": ("loc_prot", lambda: a.post("write", [foreign.segment()], 0, its.rkey)),
            "local range": ("loc_prot", lambda: a.post("write", [(8190, 8, mine.lkey)], 0, its.rkey)),
            "local range wraps": ("loc_prot", lambda: a.post("write", [(2**64 - 4, 8, mine.lkey)], 0, its.rkey)),
            "read into what is constant": ("loc_prot", lambda: a.post("read", [const.segment()], 0, its.rkey)),
            "bus address out of reach": ("loc_prot", lambda: a.post("write", [(0x7FFF0000, 8, 0)], 0, its.rkey)),
            "remote key": ("rem_access", lambda: a.post("write", [seg(0, 8)], 0, its.rkey ^ 1)),
            "remote key 0": ("rem_access", lambda: a.post("write", [seg(0, 8)], 0, 0)),
            "remote range": ("rem_access", lambda: a.post("write", [seg(0, 8)], 8190, its.rkey)),
            "remote rights": ("rem_access", lambda: a.post("write", [seg(0, 8)], 8192, readable.rkey)),
            "remote atomic rights": ("rem_access", lambda: a.fetch_add(seg(0, 8), 8192, readable.rkey, 1)),
            "atomic across": ("rem_inv_req", lambda: a.fetch_add(seg(0, 8), 4, its.rkey, 1)),
            "atomic of 4 bytes": ("loc_len", lambda: a.fetch_add(seg(0, 4), 0, its.rkey, 1)),
            "invalidate what is no key": ("loc_qp_op", lambda: a.local_inv(0x77)),
        }
        for name, (status, call) in cases.items():
            error = failing(a, b, call)
            assert error.status == STATUS[status], (name, error)
            assert error.qp_num == a.qp_num
        assert (part(far, 0, SIZE), part(near, 0, SIZE)) == before
        # a receive that is too short, or whose own key is bad, takes the receiver down with it
        b.recv([its.segment(0, 4)])
        with pytest.raises(CompletionError) as e:
            a.wait(a.post("send", [seg(0, 8)]))
        assert e.value.status == STATUS["rem_inv_req"]
        with pytest.raises(CompletionError) as e:
            b.arrived()
        assert e.value.status == STATUS["loc_len"]
        for qp in (b, a):
            qp.recover()
        b.recv([readable.segment()])
        assert failing_status(lambda: a.wait(a.post("send", [seg(0, 8)]))) == STATUS["rem_op"]
        for qp in (b, a):
            qp.recover()
        a.write([seg(0, 16)], 0, its.rkey)  # everything works again


def failing_status(call: Callable[[], Any]) -> int:
    with pytest.raises(CompletionError) as e:
        call()
    return int(e.value.status)


def test_rights_of_the_queue_pair_and_silence(sides: tuple[Side, Side]) -> None:
    near, far = sides
    with (
        Qp(near.pd) as a,
        Qp(far.pd) as b,
        Mr(near.pd, near.memory, 0, 4096) as mine,
        Mr(far.pd, far.memory, 0, 4096, access=ALL) as its,
    ):
        with pytest.raises(StateError, match="not connected"):
            a.write(mine, 0, its.rkey)
        a.connect(b.qp_num, rnr_retry=2)
        assert failing_status(lambda: a.write(mine, 0, its.rkey)) == STATUS["retry"]  # the other one is not up yet
        a.recover()
        b.connect(a.qp_num, access=LW | RR)
        a.read(mine, 0, its.rkey)
        assert failing_status(lambda: a.write(mine, 0, its.rkey)) == STATUS["rem_inv_req"]
        b.recover()
        a.recover()
        assert failing_status(lambda: a.wait(a.post("send", mine))) == STATUS["rnr_retry"]
        a.recover()
        near.hca.disconnect()
        assert failing_status(lambda: a.read(mine, 0, its.rkey)) == STATUS["retry"]
        near.hca.connect(far.hca)
        a.recover()
        a.read(mine, 0, its.rkey)


def test_an_error_flushes_what_follows_and_what_waits_to_receive(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, b = pair
    with Mr(near.pd, near.memory, 0, 4096) as mine, Mr(far.pd, far.memory, 0, 4096, access=ALL) as its:
        for _ in range(2):
            b.recv(its)
        good = a.post("write", mine, 0, its.rkey)
        bad = a.post("write", mine, 1, its.rkey)
        later = [a.post("write", mine, 0, its.rkey) for _ in range(3)]
        done = []
        for _ in range(20):
            done += a.send_cq.poll(64)
        assert [(d.request, d.status) for d in done] == [
            (good, 0), (bad, STATUS["rem_access"]), *((n, STATUS["flush"]) for n in later)]  # fmt: skip
        assert (a.state, a.outstanding) == ("error", 0)
        got = b.recv_cq.poll(64)
        assert [d.status for d in got] == [STATUS["flush"]] * 2
        b.recover()
        a.recover()
        b.fail()
        assert failing_status(lambda: a.write(mine, 0, its.rkey)) == STATUS["retry"]


def test_fast_registration(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, b = pair
    with FastMr(near.pd, 4) as fast, Mr(far.pd, far.memory, 0, 1 << 16, access=ALL) as its:
        bio = Bio.from_memory(near.memory, [(0x200, 0xE00), (0x5000, 0x1000), (0x9000, 0x300)], op="write")
        want = b"".join(near.memory.read(p, n) for p, n in bio.vecs)
        with near.device.map(bio) as m:
            before = fast.key
            number, taken = a.reg_mr(fast, m.segments)
            a.wait(number)
            assert (taken, fast.length, fast.key & 255) == (len(m), len(want), (before + 1) & 255)
            a.write([fast.segment()], 0, its.rkey)
            assert part(far, 0, len(want)) == want
            assert (
                failing(a, b, lambda: a.post("write", [(int(fast.addr), 8, before)], 0, its.rkey)).status
                == STATUS["loc_prot"]
            )
            again, _ = a.reg_mr(fast, m.segments)  # it is in use
            assert failing_status(lambda: a.wait(again)) == STATUS["loc_qp_op"]
            for qp in (b, a):
                qp.recover()
            with FastMr(near.pd, 1) as small:
                number, taken = a.reg_mr(small, [(int(m.segments[0].addr) & ~4095, 4096), (1 << 30, 4096)])
                assert taken == 1  # the capacity ends it
                a.wait(number)
                a.wait(a.local_inv(small.key))
                assert failing(a, b, lambda: a.post("write", [small.segment()], 0, its.rkey)).status == STATUS["loc_prot"]
    lent_pages = Bio.from_memory(far.memory, [(0, 4096)], op="read")
    with FastMr(far.pd, 4) as lent, Mr(near.pd, near.memory, 0, 4096) as mine, Mr(far.pd, far.memory, 0, 4096) as room:
        m = far.device.map(lent_pages)
        try:
            b.wait(b.reg_mr(lent, m.segments, access=LW | RW)[0])
            a.write(mine, lent.addr, lent.rkey)
            b.recv(room)
            a.wait(a.post("send_inv", mine, imm=lent.rkey))  # the receiver's key goes with the message
            assert b.arrived().imm == lent.rkey
            assert failing_status(lambda: a.write(mine, lent.addr, lent.rkey)) == STATUS["rem_access"]
        finally:
            m.unmap()


def test_completion_queues_overflow_and_are_destroyed_by_the_rules(sides: tuple[Side, Side]) -> None:
    near, far = sides
    with (
        Cq(near.context, 2) as cq,
        Mr(near.pd, near.memory, 0, 4096) as mine,
        Mr(far.pd, far.memory, 0, 4096, access=ALL) as its,
    ):
        a, b = Qp(near.pd, cq), Qp(far.pd)
        a.connect(b.qp_num)
        b.connect(a.qp_num)
        for _ in range(3):
            a.post("write", mine, 0, its.rkey)
        near.hca.work()
        assert near.hca.counters()["events"] == 1
        assert len(cq.poll(8)) == 2
        with pytest.raises(DmaError, match="queue pairs use"):
            cq.close()
        a.close()
        b.close()


def test_queues_have_ends(sides: tuple[Side, Side], pair: tuple[Qp, Qp]) -> None:
    near, far = sides
    a, b = pair
    with Mr(near.pd, near.memory, 0, 4096) as mine, Mr(far.pd, far.memory, 0, 4096, access=ALL) as its:
        for _ in range(a.depth):
            a.post("write", mine, 0, its.rkey)
        with pytest.raises(NoMemoryError, match="128 are outstanding"):
            a.post("write", mine, 0, its.rkey)
        assert a.outstanding == 128
        a.wait(127)
        for _ in range(b.recv_depth):
            b.recv(its)
        with pytest.raises(NoMemoryError, match="receive queue"):
            b.recv(its)
        many = [mine.segment(i, 1) for i in range(0, 40, 2)]
        a.wait(a.post("write", many, 0, its.rkey))  # two work requests, one completion
        with pytest.raises(DmaValueError, match="one message"):
            a.post("send", many)
        with pytest.raises(DmaValueError, match="12 segments"):
            b.recv([(i * 2, 1, its.lkey) for i in range(13)])
        for wrong in ({"opcode": "fly", "segments": mine}, {"opcode": "write", "segments": [b"x" * 193], "inline": True}):
            with pytest.raises(DmaValueError):
                a.post(**wrong)
        with pytest.raises(AddressTypeError):
            a.post("write", [5], 0, its.rkey)
        with pytest.raises(VerbsError, match="nothing was received"):
            b.arrived(timeout=0.01)


def test_regions_are_checked_and_given_back(sides: tuple[Side, Side]) -> None:
    near, _ = sides
    mr = Mr(near.pd, near.memory, 10, 5000)
    assert near.hca.counters()["keys_live"] == 1
    with pytest.raises(StateError, match="live"):
        near.context.close()
    mr.dereg()
    with pytest.raises(StateError, match="already"):
        mr.dereg()
    with pytest.raises(DmaValueError):
        Mr(near.pd, near.memory, 0, 4096, access=RW)
    with pytest.raises(DmaValueError, match="where in its page"):
        Mr(near.pd, near.memory, 0x333, 4096, iova=1 << 44)
    for make in (lambda: Cq(near.context, 0), lambda: Qp(near.pd, max_send_wr=0), lambda: FastMr(near.pd, 513)):
        with pytest.raises(DmaValueError):
            make()
    with pytest.raises(AddressTypeError, match="mmio"):
        Context(object(), near.device)


def test_loopback_on_one_hca(sides: tuple[Side, Side]) -> None:
    near, far = sides
    a, b = loopback(near.pd)
    with a, b, Mr(near.pd, near.memory, 0, 8192, access=ALL) as mr:
        a.write([mr.segment(0, 4096)], int(mr.addr) + 4096, mr.rkey)
        assert part(near, 0, 4096) == part(near, 4096, 4096)
    near.hca.connect(far.hca)


# ---- keys as a back end


@settings(max_examples=60, deadline=None)
@given(ranges=st.lists(st.tuples(st.sampled_from([0, 0, 0x10, 0x200, 0xFFF]), st.sampled_from([1, 0x200, 0x1000, 0x1800])),
                       min_size=1, max_size=8),
       mode=st.sampled_from(["linear", "per-range"]), cache=st.sampled_from([0, 1 << 14]),
       iommu=st.sampled_from([None, "strict"]),
       rounds=st.integers(1, 4))  # fmt: skip
def test_registered_requests_carry_every_byte(
    ranges: list[tuple[int, int]], mode: Any, cache: int, iommu: str | None, rounds: int
) -> None:
    memory, hca = PhysMemory(SIZE, layout="contiguous"), Rnic()
    below = Device(memory=memory, iommu=None if iommu is None else Iommu(iommu), **hca.limits)
    hca.attach(below)
    before = live(below)
    with Context(hca, below) as context:
        pd = Pd(context)
        with Registered(pd, mode=mode, cache=0 if mode == "linear" else cache, slots=16) as keys:
            dev = Device(backend=keys, memory=memory, **hca.limits)
            near, far = loopback(pd)
            with near, far, Mr(pd, memory, SIZE // 2, SIZE // 2, access=ALL) as its:
                for turn in range(rounds):
                    memoryview(memory)[:] = os.urandom(SIZE)
                    bio = Bio.from_memory(memory, [(i * 0x4000 + off, n) for i, (off, n) in enumerate(ranges)], op="write")
                    want = b"".join(memory.read(p, n) for p, n in bio.vecs)
                    with dev.map(bio) as m:
                        assert all(s.lkey for s in m)
                        assert mode == "per-range" or len({s.lkey for s in m}) == 1
                        near.write(m, its.addr, its.rkey)
                    assert bytes(memoryview(memory)[SIZE // 2 :][: len(want)]) == want
                    back = Bio.from_memory(memory, [(i * 0x4000 + off, n) for i, (off, n) in enumerate(ranges)], op="read")
                    other = bytes(memoryview(memory)[SIZE // 2 + 77 :][: len(want)])
                    with dev.map(back) as m:
                        near.read(m, int(its.addr) + 77, its.rkey)
                    assert b"".join(memory.read(p, n) for p, n in back.vecs) == other
                    del turn
            assert (
                keys.counters()["registrations"] - keys.counters()["registered_live"] == keys.counters()["deregistrations"]
            )
            if mode == "linear":
                assert keys.counters()["iova_live"] == 0
    assert live(below) == before


def test_registered_is_checked_and_bounded(sides: tuple[Side, Side]) -> None:
    near, _ = sides
    for wrong in ({"mode": "direct"}, {"mode": "linear", "cache": 5}, {"slots": 0}, {"max_pages": 5000}):
        with pytest.raises(DmaValueError):
            Registered(near.pd, **wrong)
    with Registered(near.pd, slots=2, mode="per-range", cache=8192) as keys:
        dev = Device(backend=keys, memory=near.memory)
        a, b = (dev.map_phys(near.memory.phys(i * 4096), 4096, "from_device") for i in range(2))
        with pytest.raises(NoMemoryError):
            dev.map_phys(near.memory.phys(8192), 4096, "from_device")
        with pytest.raises(StateError, match="still mapped"):
            keys.close()
        dev.unmap_phys(a, 4096, "from_device")
        dev.unmap_phys(b, 4096, "from_device")
        assert keys.counters()["registered_live"] == 2
        c = dev.map_phys(near.memory.phys(8192), 4096, "from_device")  # an idle one makes room
        dev.unmap_phys(c, 4096, "from_device")
        assert dev.map_phys(near.memory.phys(8192), 4096, "from_device") == c
        assert keys.counters()["cache_hits"] == 1
        dev.unmap_phys(c, 4096, "from_device")
        with pytest.raises(StateError):
            dev.unmap_phys(c, 4096, "from_device")
        keys.flush()
        assert keys.counters()["registered_live"] == 0


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(
        st.tuples(
            st.sampled_from(["write", "read", "send", "add", "swap"]),
            st.integers(0, 40_000),
            st.integers(0, 20_000),
            st.integers(0, 40_000),
        ),
        min_size=1,
        max_size=12,
    ),
    keyed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_work_against_plain_memory(work: list[tuple[str, int, int, int]], keyed: bool, seed: int) -> None:
    """Any work requests posted together, through scattered memory on both sides: both memories are what plain copies in
    their order make of them.
    """
    rng, made = random.Random(seed), []
    for end in (1, 2):
        memory, hca = PhysMemory(1 << 16, layout="scattered", seed=seed + end), Rnic()
        device = Device(memory=memory, iommu=Iommu("strict") if end == 1 else None, **hca.limits)
        hca.attach(device)
        memoryview(memory)[:] = rng.randbytes(1 << 16)
        context = Context(hca, device)
        made.append(Side(memory, hca, device, context, Pd(context)))
    near, far = made
    near.hca.connect(far.hca)
    mine, its = bytearray(near.memory), bytearray(far.memory)
    with Qp(near.pd) as a, Qp(far.pd) as b, Mr(near.pd, near.memory) as local, Mr(far.pd, far.memory, access=ALL) as remote:
        a.connect(b.qp_num)
        b.connect(a.qp_num)
        plain = near.device.map(MemoryRegion.from_memory(near.memory, 0, 1 << 16)) if not keyed else None
        for op, at, n, there in work:
            n = 8 if op in ("add", "swap") else n
            there = there & ~7 if op in ("add", "swap") else there
            # under a key, or by bus addresses where one range holds it all
            where = local.segment(at, n) if plain is None else (int(plain.segments[0].addr) + at, n, 0)
            if op in ("write", "send"):
                if op == "send":
                    b.recv([remote.segment(there, n)])
                    a.post("send", [where])
                else:
                    a.post("write", [where], there, remote.rkey)
                its[there : there + n] = mine[at : at + n]
            elif op == "read":
                a.post("read", [where], there, remote.rkey)
                mine[at : at + n] = its[there : there + n]
            else:
                old = int.from_bytes(its[there : there + 8], "little")
                if op == "add":
                    a.fetch_add(where, there, remote.rkey, 2**63 + 5)
                    new = (old + 2**63 + 5) % 2**64
                else:
                    a.cmp_swp(where, there, remote.rkey, old if at % 2 else old ^ 1, 77)
                    new = 77 if at % 2 else old
                mine[at : at + 8], its[there : there + 8] = old.to_bytes(8, "little"), new.to_bytes(8, "little")
        for done in range(len(work)):
            a.wait(done)
        if plain is not None:
            plain.unmap()
    assert (bytes(near.memory), bytes(far.memory)) == (bytes(mine), bytes(its))
    for side in made:
        side.context.close()
        assert not any(live(side.device).values())
