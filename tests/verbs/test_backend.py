"""The back end: a driver's calls become registrations, in every mode, and every byte arrives."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rdma import RIGHTS, Machine, pinned

from dmapath import (
    Bio,
    Device,
    DmaEngine,
    DmaError,
    DmaFault,
    DmaValueError,
    HmmMap,
    HostBuffer,
    Iommu,
    Mapping,
    MemoryRegion,
    NoMemoryError,
    PhysMemory,
    StateError,
)
from dmapath.compare import transfer
from dmapath.errors import CompletionError
from dmapath.rdma import cut, entries_of
from dmapath.verbs import LOCAL_WRITE, STATUS, Mr, Pd, Qp, Verbs, loopback

PAGE = 4096
KEPT = {"cache": 1 << 18}
MODES: dict[str, dict[str, int]] = {
    "direct": {}, "per-range": {}, "linear": {}, "per-range, cache": KEPT, "linear, cache": KEPT}  # fmt: skip
#: aligned, +1, +64, +512, page-crossing: (offset in a page, bytes of a range)
SHIFTS = ((0, PAGE), (1, PAGE), (64, PAGE), (512, PAGE), (PAGE - 3, 2 * PAGE))


def machine(pd: Pd, name: str, **kw: Any) -> Machine:
    return Machine(pd, name.split(",")[0], **{**MODES[name], **kw})


def places(n: int, shift: int, length: int) -> list[tuple[int, int]]:
    """Every fourth page of the arena, from the top down: neither adjacent nor in order."""
    return [(4 * PAGE * (n - 1 - i) + shift, length) for i in range(n)]


def cpu(memory: PhysMemory, where: list[tuple[int, int]]) -> bytes:
    view = memoryview(memory)
    return b"".join(bytes(view[a : a + n]) for a, n in where)


def fill(memory: PhysMemory, where: list[tuple[int, int]], data: bytes) -> None:
    view, at = memoryview(memory), 0
    for a, n in where:
        view[a : a + n] = data[at : at + n]
        at += n


@pytest.mark.parametrize("mode", MODES)
def test_every_op_alignment_and_number_of_ranges(pd: Pd, pair: tuple[Qp, Qp], mode: str) -> None:
    """WRITE, READ and SEND out of mapped segments, into them, and between two mappings; bytes around them stay."""
    peer = bytearray(32 * 2 * PAGE)
    with Mr(pd, peer, access=RIGHTS) as far, machine(pd, mode) as m:
        for shift, length in SHIFTS:
            for n in (1, 2, 16, 32):
                where = places(n, shift, length)
                total = n * length
                fill(m.memory, [(0, len(m.memory))], os.urandom(len(m.memory)))
                before, data = cpu(m.memory, where), os.urandom(total)
                with m.dev.map(Bio.from_memory(m.memory, where, "write")) as out:
                    assert sum(s.length for s in out) == total
                    pair[0].write(out, far.addr, far.rkey)
                    assert peer[:total] == before, ("write", shift, n)
                peer[:total] = data
                snapshot = bytearray(memoryview(m.memory))
                with m.dev.map(Bio.from_memory(m.memory, where, "read")) as into:
                    pair[0].read(into, far.addr, far.rkey)
                    assert cpu(m.memory, where) == data, ("read", shift, n)
                at = 0
                for a, k in where:
                    snapshot[a : a + k] = data[at : at + k]
                    at += k
                assert snapshot == memoryview(m.memory), ("neighbours", shift, n)
                if len(cut(entries_of(into.segments), pair[1].max_sge, 1 << 23)) == 1:
                    fill(m.memory, where, bytes(total))
                    with m.dev.map(Bio.from_memory(m.memory, where, "read")) as into:
                        pair[1].recv(into)
                        pair[0].wait(pair[0].post("send", [far.segment(0, total)]))
                        assert pair[1].arrived().length == total
                    assert cpu(m.memory, where) == data, ("send", shift, n)


def test_what_each_mode_costs(pd: Pd) -> None:
    """Registrations, keys and segments for 32 ranges, scattered in memory."""
    seen = {}
    for mode in MODES:
        for shift in (0, 512):
            with machine(pd, mode) as m:
                bio = Bio.from_memory(m.memory, places(32, shift, PAGE), "read")
                with m.dev.map(bio) as x:
                    c = m.dev.counters()
                    sges = sum(len(g) for g in cut(entries_of(x), 1000, 1 << 30))
                    seen[mode, shift] = (x.layout, c["registrations"], len({s.lkey for s in x}), sges)
                    assert x.case == ("direct" if mode == "direct" else "iommu-unaligned" if shift else "iommu-aligned")
    assert seen["direct", 0] == seen["direct", 512] == ("direct", 1, 1, 32)
    assert seen["per-range", 0] == ("per-range", 32, 32, 32)
    assert seen["per-range", 512] == ("per-range", 64, 64, 64)  # each range lies in two scattered frames
    assert seen["linear", 0] == ("linear", 1, 1, 1)
    assert seen["linear", 512] == ("gapped", 1, 1, 32)


def fetch(engine: DmaEngine, into: bytearray, mapping: Mapping) -> int:
    return engine.read_into(mapping.segments, into)


@pytest.mark.parametrize("mode", MODES)
def test_the_driver_of_every_other_back_end(pd: Pd, mode: str) -> None:
    """compare.transfer and DmaEngine, not a line of which knows verbs."""
    with machine(pd, mode) as m:
        engine = DmaEngine(m.dev)
        where = places(16, 512, 1500)
        data = os.urandom(16 * 1500)
        for policy in ("linux", "unified"):
            fill(m.memory, where, data)
            got = bytearray(len(data))
            transfer(m.dev, Bio.from_memory(m.memory, where, "write"), policy, partial(fetch, engine, got))
            assert got == data
            transfer(m.dev, Bio.from_memory(m.memory, where, "read"), policy, lambda x: engine.write(x.segments, data[::-1]))
            assert cpu(m.memory, where) == data[::-1]
        told = m.dev.explain(Bio.from_memory(m.memory, where, "read"))
        assert told.error is None
        assert told.exposed_bytes is not None
        assert ("registered" in [r for r, _, _ in told.rules]) == (told.layout != "none")


def test_rights_follow_the_direction(pd: Pd) -> None:
    with Machine(pd) as m:
        engine = DmaEngine(m.dev)
        with m.dev.map(Bio.from_memory(m.memory, [(0, 5000)], "write")) as x:
            engine.read(x.segments)
            with pytest.raises(DmaFault):
                engine.write(x.segments, bytes(5000))
        with m.dev.map(Bio.from_memory(m.memory, [(0, 5000)], "read")) as x:
            engine.write(x.segments, bytes(5000))
            with pytest.raises(DmaFault):
                engine.read(x.segments)
        stale = [(s.addr, s.length) for s in x.segments]
        with pytest.raises(DmaFault):  # its keys are void
            engine.write(stale, bytes(5000))
        region = MemoryRegion.from_memory(m.memory, 4095, 10000)
        with m.dev.map(region) as x:
            engine.write(x.segments, bytes(sum(s.length for s in x)))


def test_not_a_byte_more_than_the_request(pd: Pd, pair: tuple[Qp, Qp]) -> None:
    with Mr(pd, bytearray(64)) as near:
        for mode in ("per-range", "linear"):
            with Machine(pd, mode) as m, m.dev.map(Bio.from_memory(m.memory, [(100, 5000)], "read")) as x:
                last = x.segments[-1]
                pair[0].write([near.segment(0, 4)], last.addr + last.length - 4, last.rkey)
                with pytest.raises(CompletionError) as e:
                    pair[0].write([near.segment(0, 4)], last.addr + last.length - 3, last.rkey)
                assert e.value.status == STATUS["rem_access"]
                for qp in pair:
                    qp.recover()


# ---- the two steps ---------------------------------------------------------------------------------------------------


def test_the_two_steps_one_by_one(pd: Pd) -> None:
    with Machine(pd) as m:
        dev, phys = m.dev, m.memory.phys
        state = dev.iova_try_alloc(phys(512), 3 * PAGE)
        assert (int(state.addr) % PAGE, state.size) == (512, 3 * PAGE)
        dev.iova_link(state, phys(512), 0, PAGE - 512)
        for args, errno in (
            ((phys(8 * PAGE + 1), PAGE - 512, 100), 5), ((phys(8 * PAGE), 100, PAGE), 22), ((phys(512), 0, 100), 98),
            ((phys(8 * PAGE), 3 * PAGE, 1), 34), ((1 << 45, PAGE - 512, PAGE), 14),
        ):  # fmt: skip
            with pytest.raises(DmaError) as e:
                dev.iova_link(state, *args)
            assert e.value.errno == errno, args
        with pytest.raises(DmaError) as e:
            dev.iova_sync(state, 0, 2 * PAGE)  # part of it was never linked
        assert e.value.errno == 14
        dev.iova_link(state, phys(8 * PAGE), PAGE - 512, PAGE)
        dev.iova_link(state, phys(3 * PAGE), 2 * PAGE - 512, PAGE + 512 - 512)
        dev.iova_sync(state, 0, 3 * PAGE - 512)
        assert pinned() == 3 * PAGE
        engine = DmaEngine(dev)
        engine.write([(state.addr, 3 * PAGE - 512)], bytes(range(256)) * 46)
        assert memoryview(m.memory)[8 * PAGE] == (PAGE - 512) % 256
        with pytest.raises(DmaError, match="whole or gone") as e:
            dev.iova_unlink(state, PAGE - 512, PAGE)
        assert e.value.errno == 16
        dev.iova_unlink(state, 0, 3 * PAGE - 512)
        with pytest.raises(DmaError) as e:
            dev.iova_unlink(state, 0, PAGE - 512)
        assert e.value.errno == 2
        dev.iova_free(state)
        assert dev.counters()["registered_live"] == 0
        assert dev.iova_try_alloc(0, 1 << 50) is None


def test_pages_by_index(pd: Pd) -> None:
    """Each page of an HmmMap is linked, synced and registered by itself, and goes by itself."""
    with Machine(pd) as m:
        engine = DmaEngine(m.dev)
        with HmmMap(m.dev, 16) as pages:
            addrs = [pages.map_pfn(i, m.memory.phys(PAGE * (5 * i % 16))) for i in (3, 0, 7)]
            for i, addr in zip((3, 0, 7), addrs, strict=True):
                engine.write([(addr, PAGE)], bytes([i + 1]) * PAGE)
                assert memoryview(m.memory)[PAGE * (5 * i % 16)] == i + 1
            pages.unmap_pfn(0)
            with pytest.raises(DmaFault):
                engine.write([(addrs[1], 1)], b"x")
            engine.write([(addrs[0], 1)], b"y")


def test_memory_that_is_physically_one_but_not_here(pd: Pd) -> None:
    """A contiguous run of frames that this process sees in another order: map_phys makes a window for it."""
    with Machine(pd, "per-range", layout="contiguous") as m:
        m.memory.migrate(0, PAGE)
        m.memory.migrate(PAGE, PAGE)
        engine = DmaEngine(m.dev)
        spare = PhysMemory(1 << 16, base=1 << 40)
        assert spare.phys(0) == 1 << 40
        addr = m.dev.map_phys(m.memory.phys(2 * PAGE + 7), 9000, "from_device")
        engine.write([(addr, 9000)], b"z" * 9000)
        assert bytes(memoryview(m.memory)[2 * PAGE + 7 :][:9000]) == b"z" * 9000
        m.dev.unmap_phys(addr, 9000, "from_device")
        with pytest.raises(DmaError) as e:
            m.dev.unmap_phys(addr, 9000, "from_device")
        assert e.value.errno == 2
        for bad in (spare.phys(0), 1 << 49):
            with pytest.raises(NoMemoryError, match="no memory is there"):
                m.dev.map_phys(bad, 16)


def test_buffers_of_the_users(pd: Pd) -> None:
    """In place, range by range, in the linear mode too: only the arena's pages can lie where we like."""
    with Machine(pd) as m:
        buf = bytearray(5 * PAGE + 100)
        with HostBuffer(buf, m.memory) as host:
            mixed = [*host.vecs(50, 3 * PAGE), *((int(p), n) for p, n in m.memory.vecs(8 * PAGE, PAGE))]
            for vecs in (host.vecs(50, 3 * PAGE), mixed):
                for policy in ("unified", "linux"):
                    bio = Bio.from_phys(vecs, op="read")
                    with m.dev.map(bio, policy) as x:
                        assert (x.layout, "separate" in x.rules or "gap" in x.rules) == ("per-range", True)
                        data = os.urandom(bio.total)
                        DmaEngine(m.dev).write(x.segments, data)
                        assert buf[50 : 50 + 3 * PAGE] == data[: 3 * PAGE]
        with (
            Machine(pd, "direct") as d,
            HostBuffer(buf, d.memory) as host,
            pytest.raises(DmaError, match="in mode direct none of the arena"),
        ):
            d.dev.map(Bio.from_phys(host.vecs(0, PAGE), op="read"))


def test_what_a_device_on_verbs_is_refused(pd: Pd) -> None:
    memory = PhysMemory(1 << 16)
    with Verbs(pd, memory) as verbs:
        with pytest.raises(DmaValueError, match="the PhysMemory of its back end"):
            Device(backend=verbs, memory=PhysMemory(4096))
        with pytest.raises(DmaValueError, match="64 bits: an RDMA device"):
            Device(backend=verbs, memory=memory, dma_mask=2**32 - 1)
        dev = Device(backend=verbs, memory=memory)
        with pytest.raises(DmaError, match="a peer's"):
            dev.map_resource(memory.phys(0), 16)
        with pytest.raises(StateError, match="a segment that is mapped here"):
            verbs.pyverbs(type("S", (), {"addr": 1 << 40, "length": 4})())
        sim = Device(iommu=Iommu(), memory=memory)
        with sim.map(Bio.from_memory(memory, [(0, 64)], "read")) as x:
            assert (x.segments[0].lkey, x.segments[0].rkey) == (0, 0)
    for wrong in ({"mode": "fast"}, {"mode": "direct", "cache": 1}, {"cache": -1}, {"access": 1 << 40}, {"access": 2}):
        with pytest.raises(DmaError):
            Verbs(pd, memory, **wrong)


# ---- unwinding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["per-range", "linear", "per-range, cache", "linear, cache"])
def test_each_failure_unwinds(pd: Pd, mode: str) -> None:
    """Every registration and window of a request fails in turn; nothing stays."""
    with machine(pd, mode) as m:
        for shift in (0, 700):
            bio = Bio.from_memory(m.memory, places(8, shift, PAGE), "read")
            failed = 0
            for nth in range(1, 40):
                m.verbs.flush()
                m.verbs.fail_nth(nth)
                try:
                    with m.dev.map(bio):
                        pass
                except NoMemoryError:
                    failed += 1
                    assert not any(m.live().values())
                if m.verbs.fail_nth(0):
                    break  # it was never reached: all have failed once
            assert failed >= (0 if "cache" in mode else 1)
            assert nth > 1
        m.verbs.flush()
        assert pinned() == 0


def test_mappings_that_outlive_their_back_end(pd: Pd) -> None:
    memory = PhysMemory(1 << 16)
    verbs = Verbs(pd, memory)
    dev = Device(backend=verbs, memory=memory)
    m = dev.map(Bio.from_memory(memory, [(0, 64)], "read"))
    verbs.close()
    assert pinned() == 0
    with pytest.raises(DmaError):
        m.unmap()


def test_threads_register_at_once(pd: Pd) -> None:
    with Machine(pd, cache=1 << 16) as m:
        wrong: list[str] = []

        def work(seed: int) -> None:
            rnd = random.Random(seed)
            for _ in range(60):
                where = [(rnd.randrange(200) * PAGE + rnd.choice((0, 0, 9)), PAGE) for _ in range(rnd.randrange(1, 5))]
                with m.dev.map(Bio.from_memory(m.memory, where, rnd.choice(("read", "write")))) as x:
                    if not all(s.lkey for s in x):
                        wrong.append(f"{seed}: no key")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        m.verbs.flush()


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["per-range", "linear"])
def test_the_cache_is_bounded_and_counts(pd: Pd, mode: str) -> None:
    with Machine(pd, mode, cache=8 * PAGE) as m:

        def use(i: int) -> None:
            with m.dev.map(Bio.from_memory(m.memory, [(i * PAGE, PAGE)], "read")):
                pass

        for _ in range(3):
            use(0)
        c = m.dev.counters()
        assert (c["cache_misses"], c["cache_hits"], c["registrations"]) == (1, 2, 1)
        for i in range(16):
            use(i)
        c = m.dev.counters()
        assert (c["cache_bytes"], c["cache_evictions"], c["registered_live"]) == (8 * PAGE, 8, 8 * PAGE)
        use(15)  # the latest stayed
        assert m.dev.counters()["cache_hits"] == c["cache_hits"] + 1
        use(0)  # the oldest went
        assert m.dev.counters()["cache_misses"] == c["cache_misses"] + 1
        assert not any(m.live().values())
        m.verbs.flush()
        assert pinned() == 0


def test_the_cache_serves_what_lies_inside_and_joins_what_overlaps(pd: Pd) -> None:
    with Machine(pd, "per-range", cache=1 << 20, layout="contiguous") as m:

        def use(at: int, n: int, op: str = "read") -> int:
            with m.dev.map(Bio.from_memory(m.memory, [(at, n)], op)) as x:
                DmaEngine(m.dev).write(x.segments, bytes(n)) if op == "read" else DmaEngine(m.dev).read(x.segments)
            return int(m.dev.counters()["registrations"])

        assert use(0, 4 * PAGE) == 1
        assert use(PAGE + 5, 100) == 1
        assert use(3 * PAGE, 4 * PAGE) == 2  # one over both
        assert use(0, 7 * PAGE) == 2
        assert use(100, PAGE, "write") == 3  # with the rights of both
        assert use(100, PAGE) == 3
        assert m.dev.counters()["registered_live"] == 7 * PAGE
        held = m.dev.map(Bio.from_memory(m.memory, [(0, PAGE)], "read"))
        assert use(6 * PAGE, 4 * PAGE) == 4
        DmaEngine(m.dev).write(held.segments, b"!" * PAGE)  # its keys hold although a wider one took its place
        assert memoryview(m.memory)[0] == ord("!")
        held.unmap()
        assert m.dev.counters()["registered_live"] == 10 * PAGE
        m.verbs.flush()


def test_a_window_that_comes_back_with_other_pages(pd: Pd) -> None:
    """The same first page and size, other pages behind: the cached window must not be believed."""
    with Machine(pd, cache=1 << 20) as m:
        engine = DmaEngine(m.dev)
        for pages in ((1, 5, 9), (1, 5, 9), (1, 6, 9), (1, 5, 8), (1, 2, 3)):
            where = [(p * PAGE, PAGE) for p in pages]
            data = os.urandom(3 * PAGE)
            with m.dev.map(Bio.from_memory(m.memory, where, "read")) as x:
                assert x.layout == "linear"
                engine.write(x.segments, data)
            assert cpu(m.memory, where) == data
        c = m.dev.counters()
        assert (c["cache_hits"], c["registrations"]) == (1, 4)
        m.verbs.flush()


@pytest.mark.parametrize("mode", ["per-range", "linear"])
def test_the_cache_knows_when_pages_go(pd: Pd, mode: str) -> None:
    """A registration pins the pages it found: after they are given back, one that is not made anew moves the bytes of pages
    that nobody sees. First the danger, with a region that is not told; then the cache, which is."""
    with Machine(pd, mode, cache=1 << 20) as m:
        engine, view = DmaEngine(m.dev), memoryview(m.memory)
        where = [(2 * PAGE, PAGE), (7 * PAGE, PAGE)]
        far = bytearray(b"new!" * 2048)
        with Mr(pd, m.memory, 2 * PAGE, PAGE, access=RIGHTS) as unaware:
            with m.dev.map(Bio.from_memory(m.memory, where, "read")) as x:
                engine.write(x.segments, b"old!" * 2048)
            m.memory.discard(2 * PAGE, PAGE)
            assert bytes(view[2 * PAGE : 2 * PAGE + 4]) == bytes(4)
            pair = qp, _ = loopback(pd)
            with Mr(pd, far) as near:
                qp.write([near.segment(0, PAGE)], unaware.addr, unaware.rkey)
            assert bytes(view[2 * PAGE : 2 * PAGE + 4]) == bytes(4)  # success, and the bytes are nowhere
            with m.dev.map(Bio.from_memory(m.memory, where, "read")) as x:
                engine.write(x.segments, bytes(far))
            assert cpu(m.memory, where) == bytes(far)
            for each in pair:
                each.close()
        assert m.dev.counters()["cache_invalidated"] >= 1
        m.verbs.flush()
        with m.dev.map(Bio.from_memory(m.memory, where, "read")) as x:
            m.memory.discard(7 * PAGE, PAGE)  # in use: not kept after
        hits = m.dev.counters()["cache_hits"]
        with m.dev.map(Bio.from_memory(m.memory, [(7 * PAGE, PAGE)] if mode == "per-range" else where, "read")) as x:
            engine.write(x.segments, bytes(far)[: sum(s.length for s in x)])
        assert m.dev.counters()["cache_hits"] == hits
        assert bytes(view[7 * PAGE : 7 * PAGE + 4]) == b"new!"
        m.verbs.flush()


def test_a_buffer_that_its_owner_may_remap_is_never_cached(pd: Pd) -> None:
    """MADV_DONTNEED behind our back: a kept registration would write to the page that was; a fresh one finds the new."""
    buf = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with Machine(pd, "per-range", cache=1 << 20) as m, HostBuffer(buf, m.memory) as host:
        engine = DmaEngine(m.dev)
        bio = Bio.from_phys(host.vecs(), op="read")
        with Mr(pd, buf, access=RIGHTS) as kept:
            for round_ in range(3):
                with m.dev.map(bio) as x:
                    engine.write(x.segments, bytes([round_ + 1]) * PAGE)
                assert buf[0] == round_ + 1
                buf.madvise(mmap.MADV_DONTNEED)
                assert buf[0] == 0
            qp, other = loopback(pd)
            with Mr(pd, bytearray(b"lost"), access=LOCAL_WRITE) as near:
                qp.write(near, kept.addr, kept.rkey)
            assert buf[:4] == bytes(4)  # what a cache that did not know would have done
            qp.close()
            other.close()
        c = m.dev.counters()
        assert (c["uncacheable"], c["cache_hits"], c["cache_bytes"]) == (3, 0, 0)


# ---- at random -------------------------------------------------------------------------------------------------------


def test_random_requests_against_the_expected_bytes(pd: Pd) -> None:
    """DMAPATH_REQUESTS (10,000) requests of random shape, mode, direction and opcode; a plain bytearray says what must be
    in memory and at the peer."""
    rnd = random.Random(7)
    rounds = int(os.environ.get("DMAPATH_REQUESTS", "10000"))
    size = 96 * PAGE
    machines = [machine(pd, mode, size=size) for mode in MODES]
    peer = bytearray(8 * 2 * PAGE)
    models = [bytearray(size) for _ in machines]
    first, second = loopback(pd)
    with Mr(pd, peer, access=RIGHTS) as far:
        for step in range(rounds):
            i = rnd.randrange(len(machines))
            m, model = machines[i], models[i]
            slots = rnd.sample(range(48), rnd.randrange(1, 7))
            where = [(s * 2 * PAGE + rnd.choice((0, 0, 1, 64, 512, 4095)), rnd.choice((1, 64, 700, PAGE, PAGE, PAGE + 1)))
                     for s in slots]  # fmt: skip
            total = sum(n for _, n in where)
            at = rnd.randrange(100)
            op = rnd.choice(("write", "read"))
            with m.dev.map(Bio.from_memory(m.memory, where, op), rnd.choice(("unified", "linux"))) as x:
                if op == "write":
                    first.write(x, int(far.addr) + at, far.rkey)
                    assert peer[at : at + total] == b"".join(model[a : a + n] for a, n in where), step
                else:
                    data = rnd.randbytes(total)
                    peer[at : at + total] = data
                    first.read(x, int(far.addr) + at, far.rkey)
                    done = 0
                    for a, n in where:
                        model[a : a + n] = data[done : done + n]
                        done += n
            if step % 500 == 499 or step == rounds - 1:
                for k, each in enumerate(machines):
                    assert memoryview(each.memory) == models[k], (step, k)
    first.close()
    second.close()
    for each in machines:
        each.verbs.flush()
        with each:
            pass


def test_a_window_whose_page_went_is_not_believed_by_a_later_sync(pd: Pd) -> None:
    """Linked again in the same place of a state that was kept: the registration of the page that was must not serve it."""
    with Machine(pd, cache=1 << 20) as m:
        engine, phys = DmaEngine(m.dev), [m.memory.phys(i * PAGE) for i in (3, 9)]
        state = m.dev.iova_try_alloc(phys[0], 2 * PAGE)
        for round_ in range(2):
            for i in (0, 1):
                m.dev.iova_link(state, phys[i], i * PAGE, PAGE, "from_device")
            m.dev.iova_sync(state, 0, 2 * PAGE)
            engine.write([(state.addr, 2 * PAGE)], bytes([round_ + 1]) * 2 * PAGE)
            assert memoryview(m.memory)[9 * PAGE] == round_ + 1
            m.dev.iova_unlink(state, 0, 2 * PAGE, "from_device")
            m.memory.discard(9 * PAGE, PAGE)
        m.dev.iova_free(state)
        assert m.dev.counters()["cache_bytes"] == 0


def test_syncs_side_by_side_do_not_undo_each_other(pd: Pd) -> None:
    with Machine(pd) as m:
        state = m.dev.iova_try_alloc(m.memory.phys(0), PAGE)
        m.dev.iova_link(state, m.memory.phys(0), 0, PAGE, "from_device")
        m.dev.iova_sync(state, 0, 100)
        m.dev.iova_sync(state, 100, PAGE - 100)
        engine = DmaEngine(m.dev)
        engine.write([(state.addr, 100)], b"a" * 100)
        engine.write([(state.addr + 100, PAGE - 100)], b"b" * (PAGE - 100))
        assert m.dev.counters()["registrations"] == 2
        m.dev.iova_sync(state, 0, PAGE)  # over both: one takes their place
        engine.write([(state.addr, PAGE)], b"c" * PAGE)
        assert m.dev.counters()["registered_live"] == PAGE
        m.dev.iova_destroy(state, PAGE, "from_device")


def test_a_child_neither_maps_nor_unmaps_for_its_parent(pd: Pd) -> None:
    with Machine(pd) as m:
        bio = Bio.from_memory(m.memory, places(3, 0, PAGE), "read")
        held = m.dev.map(bio)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                held.unmap()  # of its own copy
                try:
                    m.dev.map(bio)
                except DmaError as e:
                    code = 0 if "a child of the process" in str(e) else 2
            os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        DmaEngine(m.dev).write(held.segments, b"parent" * 2048)
        held.unmap()


# ---- huge pages ------------------------------------------------------------------------------------------------------


def test_huge_pages(pd: Pd) -> None:
    """An arena on 2 MiB pages of this machine: windows are made of them, and requests inside them register in place."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    with pytest.raises(NoMemoryError, match="too few free huge pages"):
        PhysMemory((before + 4096) << 21, backing="2m", layout="huge")
    with pytest.raises(DmaValueError, match="lie whole"):
        PhysMemory(1 << 21, backing="2m", layout="scattered")
    pool.write_text(str(before + 8))
    try:
        assert int(pool.read_text()) == before + 8, "the guest has no memory for 8 huge pages"
        with Machine(pd, layout="huge", size=8 << 21, backing="2m") as m:
            assert m.dev.merge_boundary == (1 << 21) - 1
            engine = DmaEngine(m.dev)
            where = [(5 << 21, 1 << 21), (1 << 21, 1 << 21), (0, 1 << 20)]
            data = os.urandom(5 << 20)
            with m.dev.map(Bio.from_memory(m.memory, where, "read")) as x:
                assert (x.layout, len(x), m.dev.counters()["registrations"]) == ("linear", 1, 1)
                engine.write(x.segments, data)
            assert cpu(m.memory, where) == data
            inside = [((3 << 21) + 512, 3 * PAGE), ((7 << 21) + 5 * PAGE + 1, 100)]
            with m.dev.map(Bio.from_memory(m.memory, inside, "read")) as x:
                assert (x.layout, len({s.lkey for s in x})) == ("gapped", 1)
                engine.write(x.segments, data[: 3 * PAGE + 100])
            assert cpu(m.memory, inside) == data[: 3 * PAGE + 100]
    finally:
        pool.write_text(str(before))
