"""Devices, domains, regions and windows: what they refuse, what they give back, whose they are."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import resource
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import pytest
from rdma import RIGHTS, pinned

from dmapath import Bio, Device, DmaError, DmaValueError, NotSupportedError, PhysMemory, StateError
from dmapath.errors import AddressTypeError, CompletionError, VerbsError
from dmapath.verbs import (
    FEATURES,
    LOCAL_WRITE,
    MW_BIND,
    ON_DEMAND,
    REMOTE_WRITE,
    Context,
    Cq,
    Mr,
    Mw,
    Pd,
    Qp,
    Verbs,
    loopback,
    memlock,
    self_test,
)


def test_a_device_says_its_limits(ctx: Context) -> None:
    assert ctx.is_rxe
    assert {ctx.attr[k] for k in ("mtu", "port_state")} == {4096, 4}
    assert ctx.attr["max_sge"] >= 16
    index, gid = next(g for g in ctx.gids() if g[0] == ctx.gid_index())
    assert gid[-4:] == bytes([10, 10, 0, 1])
    assert index > 0
    assert ctx.events() == []


def test_no_such_device() -> None:
    with pytest.raises(NotSupportedError, match=r"no such RDMA device here.*guest run --rxe") as e:
        Context("mlx5_9")
    assert e.value.errno == errno.ENODEV
    with pytest.raises(AddressTypeError):
        Context(7)


def test_what_is_open_keeps_its_owner_open() -> None:
    ctx = Context()
    pd = Pd(ctx)
    mr = Mr(pd, bytearray(64))
    with pytest.raises(VerbsError, match="1 domains or queues of it are open"):
        ctx.close()
    with pytest.raises(VerbsError, match="regions, windows or queue pairs of it are open"):
        pd.close()
    mr.dereg()
    pd.close()
    cq = Cq(ctx, 4)
    with pytest.raises(VerbsError):
        ctx.close()
    cq.close()
    ctx.close()
    ctx.close()
    with pytest.raises(StateError, match="closed"):
        Pd(ctx)
    assert repr(ctx) == "Context(closed)"


def test_dropped_objects_are_destroyed_in_any_order() -> None:
    ctx = Context()
    first, second = loopback(Pd(ctx))
    mr = Mr(first.pd, bytearray(4096), access=RIGHTS)
    dead = weakref.ref(first.pd)
    del first, second, mr
    gc.collect()
    assert dead() is None
    ctx.close()


def test_self_tests(pd: Pd) -> None:
    found = {feature: self_test(pd, feature) for feature in FEATURES}
    assert found["mr"] is found["atomic"] is found["window"] is None
    assert "past a memory window's end" in str(found["window-bounds"])  # soft-RoCE of 6.1 and 7.3; a mended one may say None
    assert "bound again" in str(found["window-rebind"])
    assert found["odp"] is not None
    if pd.context.attr["odp"]:  # Linux 7.3: success, and wrong bytes
        assert "completed with success and" in found["odp"]
    with pytest.raises(NotSupportedError, match="rxe0: ") as e:
        Mr(pd, bytearray(4096), access=RIGHTS | ON_DEMAND)
    assert found["odp"] in str(e.value)
    with pytest.raises(NotSupportedError, match="rxe0: "):
        Verbs(pd, PhysMemory(4096), access=RIGHTS | ON_DEMAND)
    assert pinned() == 0


def test_regions(pd: Pd) -> None:
    memory = PhysMemory(1 << 16)
    with Mr(pd, memory, 4095, 5000, access=RIGHTS) as mr:
        assert (mr.length, mr.access) == (5000, RIGHTS)
        assert mr.lkey
        assert mr.segment(10, 20) == (int(mr.addr) + 10, 20, mr.lkey)
        assert pinned() == 3 * 4096
        with pytest.raises(DmaValueError, match="1 to 0x"):
            mr.segment(0, 0)
        with pytest.raises(NotSupportedError, match="stays as it was"):  # soft-RoCE has no rereg
            mr.rereg(LOCAL_WRITE)
        assert mr.access == RIGHTS
    assert pinned() == 0
    with pytest.raises(StateError, match="deregistered already"):
        mr.dereg()
    with pytest.raises(DmaValueError, match="within 65536 bytes"):
        Mr(pd, memory, 65530, 7)
    with pytest.raises(BufferError):
        Mr(pd, b"read-only", access=LOCAL_WRITE)
    with Mr(pd, b"read-only is fine to send", access=0) as mr:
        assert mr.length == 25
    with pytest.raises(DmaValueError, match="needs LOCAL_WRITE") as e:  # ib_check_mr_access
        Mr(pd, bytearray(64), access=REMOTE_WRITE)
    assert (e.value.errno, e.value.argument) == (errno.EINVAL, "access")
    with pytest.raises(VerbsError):
        Mr(pd, pages_that_may_not_be_written(), access=LOCAL_WRITE)


def pages_that_may_not_be_written() -> Any:
    buf = mmap.mmap(-1, 8192)
    libc = ctypes.CDLL(None, use_errno=True)
    at = ctypes.addressof(ctypes.c_char.from_buffer(buf))
    assert libc.mprotect(ctypes.c_void_p(at), 8192, 1) == 0
    return buf


def test_a_region_in_use_stays(pd: Pd, pair: tuple[Qp, Qp]) -> None:
    first, _ = pair
    buf = bytearray(4096)
    mr = Mr(pd, buf, access=RIGHTS)
    first.recv([mr.segment(0, 64)])
    assert mr.in_use() == 1
    with pytest.raises(StateError, match="1 outstanding work requests name it") as e:
        mr.dereg()
    assert e.value.errno == errno.EBUSY
    with pytest.raises(BufferError):  # nor can its memory go
        buf.extend(b"more")
    first.reset()
    mr.dereg()
    buf.extend(b"more")


def test_windows_of_both_types(pd: Pd, pair: tuple[Qp, Qp]) -> None:
    first, second = pair
    target, data = bytearray(8192), bytearray(range(256)) * 16
    with Mr(pd, data) as local, Mr(pd, target, access=RIGHTS | MW_BIND) as mr:
        for kind in (1, 2):
            target[:] = bytes(8192)
            with Mw(pd, kind) as mw:
                second.bind(mw, mr, 4000, 512)
                first.write([local.segment(1, 512)], int(mr.addr) + 4000, mw.rkey)
                assert target[4000:4512] == data[1:513]
                assert not any(target[:4000])
                with pytest.raises(StateError, match="1 memory windows are bound"):
                    mr.dereg()
                if kind == 2:
                    old = mw.rkey
                    second.unbind(mw)
                    with pytest.raises(CompletionError) as e:
                        first.write([local.segment(0, 1)], int(mr.addr) + 4000, old)
                    assert e.value.status == 10
                    first.recover()
                    second.recover()
                    if self_test(pd, "window-rebind") is None:
                        second.bind(mw, mr)
                        assert mw.rkey != old
                    else:
                        with pytest.raises(CompletionError, match="bind_mw"):
                            second.bind(mw, mr)
                        assert mw.bound is None
                        first.recover()
                        second.recover()
                else:
                    with pytest.raises(NotSupportedError):
                        second.unbind(mw)
    assert pinned() == 0


def test_local_invalidate_of_a_region_is_refused(pd: Pd, pair: tuple[Qp, Qp]) -> None:
    first, second = pair
    with Mr(pd, bytearray(64), access=RIGHTS) as mr:
        with pytest.raises(CompletionError, match="local_inv"):
            first.wait(first.local_inv(mr.rkey))
        first.recover()
        second.recover()


def test_memlock_is_named(tmp_path: Any) -> None:
    """Root may pin without limit, so this one gives the right up first."""
    code = """
        import ctypes, resource
        from dmapath import Bio, Device, NoMemoryError, PhysMemory
        from dmapath.errors import VerbsError
        from dmapath.verbs import Mr, Pd, Verbs
        pd = Pd()
        memory = PhysMemory(1 << 22, layout="scattered")
        verbs = Verbs(pd, memory)
        dev = Device(backend=verbs, memory=memory)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(24, 14, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_IPC_LOCK
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        data[0] &= ~(1 << 14)
        data[1] &= ~(1 << 14)
        assert libc.capset(header, data) == 0
        with Mr(pd, memory, 0, 1 << 19):
            try:
                Mr(pd, bytearray(1 << 20))
                raise SystemExit("pinned beyond the limit")
            except VerbsError as e:
                assert e.errno == 12 and "RLIMIT_MEMLOCK is 1048576 bytes, 524288 are pinned" in str(e), e
            try:
                dev.map(Bio.from_memory(memory, [(1 << 21, 1 << 20)], "read"))
                raise SystemExit("pinned beyond the limit")
            except NoMemoryError as e:
                assert "RLIMIT_MEMLOCK is 1048576 bytes" in str(e), e
            assert not any(dev.counters()[k] for k in ("iova_live", "mapped_bytes", "registered_live"))
        verbs.close()
        print("named")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], text=True, capture_output=True, check=False)
    assert done.stdout == "named\n", done.stderr
    assert memlock()[0] == pinned()
    assert memlock()[1] in (None, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def test_a_child_does_not_own_what_its_parent_opened(pd: Pd) -> None:
    buf = mmap.mmap(-1, 4096)
    mr = Mr(pd, buf, access=RIGHTS)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            wrong = 0
            for call in (mr.dereg, lambda: mr.lkey, lambda: Mr(pd, bytearray(8)), lambda: Pd(pd.context), pd.context.close):
                try:
                    call()
                    wrong += 1
                except StateError as e:
                    wrong += "child" not in str(e)
            buf[:4] = b"mine"  # copied for the child at the fork, so that the parent's stays where it is pinned
            code = wrong
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    first, second = loopback(pd)
    with Mr(pd, bytearray(b"parent's")) as local:
        first.write(local, mr.addr, mr.rkey)
    assert buf[:8] == b"parent's"
    first.close()
    second.close()
    mr.dereg()


WITHOUT_PYVERBS = "pyverbs is missing: apt-get install python3-pyverbs, and use the system's Python"

# ---- pyverbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs() -> Any:
    """A user's own pyverbs Context, PD, CQ, connected QPs and MR."""
    pytest.importorskip("pyverbs.device", reason=WITHOUT_PYVERBS, exc_type=ImportError)
    from pyverbs.cq import CQ
    from pyverbs.device import Context as TheirContext
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.qp import QP, QPCap, QPInitAttr

    ctx = TheirContext(name="rxe0")
    pd = PD(ctx)
    cq = CQ(ctx, 64)
    cap = QPCap(max_send_wr=16, max_recv_wr=16, max_send_sge=2, max_recv_sge=2)
    qps = [QP(pd, QPInitAttr(qp_type=2, scq=cq, rcq=cq, cap=cap)) for _ in range(2)]
    mr = MR(pd, 4096, RIGHTS)
    yield ctx, pd, cq, qps, mr
    ctx.close()


def test_a_users_own_objects(theirs: Any) -> None:
    their_ctx, their_pd, their_cq, their_qps, their_mr = theirs
    ctx = Context(their_ctx)
    pd = Pd(their_pd, context=ctx)
    cq = Cq(their_cq, context=ctx)
    first, second = (Qp(pd, cq, of=qp) for qp in their_qps)
    first.connect(second.info)
    second.connect(first.info)
    their_mr.write(b"through pyverbs' own region", 27)
    target = bytearray(64)
    with Mr(pd, target, access=RIGHTS) as mr, Mr(pd, their_mr) as adopted:
        assert (adopted.lkey, adopted.length) == (their_mr.lkey, 4096)
        first.write([adopted.segment(8, 19)], int(mr.addr) + 3, mr.rkey)
        assert target[3:22] == b"pyverbs' own region"
        with pytest.raises(StateError, match="closed by its owner"):
            adopted.dereg()
    memory = PhysMemory(1 << 16, layout="scattered", seed=1)
    with Verbs(pd, memory) as verbs:
        dev = Device(backend=verbs, memory=memory)
        bio = Bio.from_memory(memory, [(0, 4096), (20480, 4096)], "read")
        with dev.map(bio) as m:
            [segment] = m
            real = verbs.pyverbs(segment)  # a real pyverbs MR, for code that wants one
            real.write(b"x" * 5000, 5000)
            assert (real.length, bytes(memoryview(memory)[20480:20484])) == (8192, b"xxxx")
            assert real.lkey != segment.lkey
            real.close()
    assert their_qps[0].qp_num == first.info.qp_num  # pyverbs' own API goes on
    first.close()
    second.close()
    cq.close()
    their_mr.read(4, 0)


def test_the_bridge_fails_closed(theirs: Any, pd: Pd) -> None:
    their_ctx, their_pd, their_cq, their_qps, their_mr = theirs
    ctx = Context(their_ctx)
    with pytest.raises(AddressTypeError, match="a pyverbs PD is wanted"):
        Pd(their_cq, context=ctx)
    with pytest.raises(AddressTypeError, match="a pyverbs MR is wanted"):
        Mr(pd, their_pd)
    with pytest.raises(DmaValueError, match="context"):
        Pd(their_pd)
    with pytest.raises(DmaValueError, match="the Context that the PD was made in"):
        Pd(their_pd, context=pd.context)
    mine = Pd(their_pd, context=ctx)
    other = Cq(ctx, 8)
    with pytest.raises(DmaValueError, match="a QP made with these queues"):
        Qp(mine, other, of=their_qps[0])
    other.close()
    their_mr.close()
    with pytest.raises(StateError, match="it is closed"):
        Mr(mine, their_mr)
    with pytest.raises(NotSupportedError, match="pyverbs' own"), Mr(pd, bytearray(64)) as own:
        own.pyverbs()
    theirs[0].close()  # takes everything with it
    for use in (lambda: Mr(mine, bytearray(8)), lambda: Pd(their_pd, context=ctx), lambda: ctx.gids()):
        with pytest.raises(StateError, match="it is closed"):
            use()


def test_a_domain_that_its_owner_closed_behind_the_back_end(theirs: Any) -> None:
    their_ctx, their_pd, _, their_qps, their_mr = theirs
    pd = Pd(their_pd, context=Context(their_ctx))
    memory = PhysMemory(1 << 16)
    for mode in ("linear", "per-range"):
        verbs = Verbs(pd, memory, mode=mode)
        dev = Device(backend=verbs, memory=memory)
        bio = Bio.from_memory(memory, [(0, 4096)], "read")
        with dev.map(bio):
            pass
        if mode == "per-range":
            their_mr.close()
            for qp in their_qps:
                qp.close()
            their_pd.close()
            with pytest.raises(DmaError, match="its owner closed the protection domain"):
                dev.map(bio)
        verbs.close()


def test_what_the_pointer_leads_to_is_compared_with_what_the_object_says(theirs: Any) -> None:
    """As an unknown layout would show: the place holds a pointer, but not to this object's struct."""
    from pyverbs.cq import CQ
    from pyverbs.pd import PD

    ctx = Context(theirs[0])

    class OtherPd(PD):  # type: ignore[misc]
        handle = 12345

    class OtherCq(CQ):  # type: ignore[misc]
        cqe = 7

    with pytest.raises(NotSupportedError, match="unknown pyverbs layout"):
        Pd(OtherPd(theirs[0]), context=ctx)
    with pytest.raises(NotSupportedError, match="unknown pyverbs layout"):
        Cq(OtherCq(theirs[0], 64), context=ctx)


def test_objects_that_only_look_like_pyverbs(pd: Pd) -> None:
    pytest.importorskip("pyverbs.device", reason=WITHOUT_PYVERBS, exc_type=ImportError)
    from pyverbs.device import Context as TheirContext

    class Fake:
        __module__ = "pyverbs.device"

    with pytest.raises(AddressTypeError):
        Context(Fake())
    hollow = TheirContext.__new__(TheirContext)  # never opened: its pointer is NULL
    with pytest.raises(DmaError):
        Context(hollow)
    with pytest.raises(TypeError):
        Context(object())
