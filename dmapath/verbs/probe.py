"""What a device claims is not believed: each feature is tried before it is used, with odd offsets and lengths, and the bytes
are compared, those around the target too.

Linux 7.3's soft-RoCE is why: its on-demand paging completes with success and the wrong bytes (rxe_odp.c drops the offset
inside a page).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

from dmapath.errors import DmaError, NotSupportedError
from dmapath.mr import LOCAL_WRITE, MW_BIND, ON_DEMAND, REMOTE_ATOMIC, REMOTE_READ, REMOTE_WRITE
from dmapath.verbs.queue import Qp, loopback
from dmapath.verbs.resources import Mr, Mw, Pd

__all__ = ["FEATURES", "require", "self_test"]

SIZE = 5 * 4096
#: (offset, bytes): inside a page, over its end, over several, one packet and more.
PLACES = ((0, 64), (0, 1025), (64, 64), (1, 1), (4095, 2), (4064, 64), (1024, 8192), (63, 4097), (7, 3 * 4096 + 5))
_RIGHTS = LOCAL_WRITE | REMOTE_READ | REMOTE_WRITE


def _pattern(n: int, seed: int) -> bytes:
    return bytes((i * 7 + (i >> 8) + seed) & 255 for i in range(n))


def _moves(pd: Pd, access: int) -> Iterator[str]:
    """Write to and read from a region at every place, and give what went wrong, if anything."""
    target, staging = mmap.mmap(-1, SIZE), bytearray(SIZE)
    first, second = loopback(pd, max_send_wr=8, max_recv_wr=1, max_sge=1)
    try:
        with Mr(pd, target, access=access, trust=True) as remote, Mr(pd, staging, access=LOCAL_WRITE) as local:
            for seed, (at, n) in enumerate(PLACES):
                target[:] = b"\xa5" * SIZE
                data = staging[:n] = _pattern(n, seed)
                first.write([local.segment(0, n)], int(remote.addr) + at, remote.rkey)
                want = b"\xa5" * at + data + b"\xa5" * (SIZE - at - n)
                if target[:] != want:
                    wrong = [i for i in range(SIZE) if target[i] != want[i]]
                    yield (f"a write of {n} bytes at offset {at} completed with success and {len(wrong)} wrong bytes, from "
                           f"{wrong[0]} on")  # fmt: skip
                    return
                target[at : at + n] = data = _pattern(n, seed + 1)
                staging[:n] = bytes(n)
                first.read([local.segment(0, n)], int(remote.addr) + at, remote.rkey)
                if staging[:n] != data:
                    yield f"a read of {n} bytes at offset {at} completed with success and wrong bytes"
                    return
    finally:
        first.close()
        second.close()
        target.close()


def _test_mr(pd: Pd) -> Iterator[str]:
    yield from _moves(pd, _RIGHTS)


def _test_odp(pd: Pd) -> Iterator[str]:
    if not pd.context.attr["odp"]:
        yield "the device has no on-demand paging"
        return
    yield from _moves(pd, _RIGHTS | ON_DEMAND)


def _test_atomic(pd: Pd) -> Iterator[str]:
    if not pd.context.attr["atomic"]:
        yield "the device has no atomics"
        return
    target, old = bytearray(64), bytearray(8)
    first, second = loopback(pd, max_send_wr=8, max_recv_wr=1, max_sge=1)
    try:
        with Mr(pd, target, access=_RIGHTS | REMOTE_ATOMIC) as remote, Mr(pd, old, access=LOCAL_WRITE) as local:
            base = int(remote.addr) + (-int(remote.addr) & 7)
            at = base - int(remote.addr) + 8
            target[at : at + 8] = (2**40 + 5).to_bytes(8, "little")
            first.wait(first.fetch_add(local.segment(), base + 8, remote.rkey, 7))
            first.wait(first.cmp_swp(local.segment(), base + 8, remote.rkey, 2**40 + 12, 99))
            if int.from_bytes(old, "little") != 2**40 + 12 or int.from_bytes(target[at : at + 8], "little") != 99:
                yield "fetch-and-add, then compare-and-swap, left other values than they should"
            elif any(target[:at]) or any(target[at + 8 :]):
                yield "an atomic changed bytes beside its eight"
    finally:
        first.close()
        second.close()


def _test_window(pd: Pd) -> Iterator[str]:
    if not pd.context.attr["max_mw"]:
        yield "the device has no memory windows"
        return
    target, staging = bytearray(SIZE), bytearray(_pattern(SIZE, 3))
    first, second = loopback(pd, max_send_wr=8, max_recv_wr=1, max_sge=1)
    try:
        with (
            Mr(pd, target, access=_RIGHTS | MW_BIND) as remote,
            Mr(pd, staging, access=LOCAL_WRITE) as local,
            Mw(pd) as window,
        ):
            second.bind(window, remote, 100, 5001)
            first.write([local.segment(0, 5001)], int(remote.addr) + 100, window.rkey)
            if bytes(target[100:5101]) != bytes(staging[:5001]) or any(target[:100]) or any(target[5101:]):
                yield "a write through a window put wrong bytes"
            pd.context.verified["window-bounds"] = (
                "a write past a memory window's end, inside its region, goes through"
                if _allowed(first, second, local.segment(0, 2), int(remote.addr) + 5100, window.rkey) else None)  # fmt: skip
            second.unbind(window)
            if _allowed(first, second, local.segment(0, 1), int(remote.addr) + 100, window.rkey):
                yield "a write through an invalidated window went through"
            pd.context.verified["window-rebind"] = _rebinds(first, second, window, remote)
    finally:
        first.close()
        second.close()


def _rebinds(qp: Qp, other: Qp, window: Mw, region: Mr) -> str | None:
    try:
        other.bind(window, region, 0, 64)
        other.unbind(window)
    except DmaError:
        qp.recover()
        other.recover()
        return "a memory window that was invalidated cannot be bound again: allocate a new one"
    return None


def _allowed(qp: Qp, other: Qp, segment: tuple[int, int, int], addr: int, rkey: int) -> bool:
    try:
        qp.write([segment], addr, rkey)
    except DmaError:
        qp.recover()
        other.recover()
        return False
    return True


#: Feature -> its test: a generator of what is wrong.
FEATURES: dict[str, Callable[[Pd], Iterator[str]]] = {
    "mr": _test_mr, "odp": _test_odp, "atomic": _test_atomic, "window": _test_window, "window-bounds": _test_window,
    "window-rebind": _test_window,
}  # fmt: skip


def self_test(pd: Pd, feature: str) -> str | None:
    """Try a feature of FEATURES on a device: what is wrong with it, or None. Once for each Context.

    "window" is whether memory windows carry the right bytes and are void once invalidated, "window-bounds" whether they end
    where they were told to, and "window-rebind" whether one can be bound again after that. Soft-RoCE of Linux 6.1 and 7.3
    passes the first and fails the other two: it checks the region's end, and leaves an invalidated window unusable.
    """
    verified = pd.context.verified
    if feature not in verified:
        try:
            problem = next(FEATURES[feature](pd), None)
            verified.setdefault(feature, problem)
        except DmaError as e:
            verified[feature] = f"its self-test failed: {e}"
    found: str | None = verified[feature]
    return found


def require(pd: Pd, feature: str) -> None:
    """NotSupportedError, with the failing case, where a device's feature does not do what it says."""
    problem = self_test(pd, feature)
    if problem is not None:
        raise NotSupportedError(f"{pd.context.name}: {problem}", argument="feature", value=feature)
