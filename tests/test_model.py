"""The library against the reference model: random calls, the same addresses, errors, counts and bytes.

DMAPATH_STEPS sets the steps of the state machine (100,000 by default; ten million take some hours).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import model
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from dmapath import Bio, Device, DmaEngine, DmaError, DmaFault, Iommu, PhysMemory

STEPS = int(os.environ.get("DMAPATH_STEPS", "100000"))
RUN = 200
PAGE = 4096
MEMORY = PhysMemory(4 << 20, base=1 << 32)  # contiguous: phys = base + offset
BASE = 1 << 32

# page offsets that matter: aligned often, everything now and then
offsets = st.one_of(st.just(0), st.sampled_from([0x1, 0x200, 0x800, 0xFFF]), st.integers(0, PAGE - 1))
sizes = st.one_of(
    st.sampled_from([1, 0x200, 0x1000, 0x2000, 0x3000, 0x10000, 0x20000, 0x21000, 0x200000]), st.integers(1, 0x8000)
)
pages = st.integers(0, 63).map(lambda i: BASE + i * PAGE)


def phys_of(page: int, off: int) -> int:
    return page + off


class Machine(RuleBasedStateMachine):
    """Both sides get every call; whatever one answers, the other must answer too."""

    states = Bundle("states")
    singles = Bundle("singles")
    mappings = Bundle("mappings")

    @initialize(lazy=st.booleans(), where=st.sampled_from(["anywhere", "small", "top"]))
    def make(self, lazy: bool, where: str) -> None:
        mask, top = 0xFFFFFF if where == "small" else 2**64 - 1, where == "top"
        self.dev = Device(iommu=Iommu("lazy" if lazy else "strict", cpus=1), memory=MEMORY, dma_mask=mask, forcedac=top)
        self.ref = model.Device(mask=mask, lazy=lazy, forcedac=top)
        self.engine = DmaEngine(self.dev)
        self.open: list[Any] = []

    def both(self, real: Callable[[], Any], ref: Callable[[], Any]) -> tuple[Any, Any]:
        try:
            want = ref()
        except model.ModelError as e:
            with pytest.raises(DmaError) as got:
                real()
            assert got.value.errno == e.errno
            return None, None
        return real(), want

    # ---- two steps

    @rule(target=states, off=offsets, size=sizes)
    def alloc(self, off: int, size: int) -> Any:
        got, want = self.both(lambda: self.dev.iova_try_alloc(off, size), lambda: self.ref.iova_try_alloc(off, size))
        assert (got is None) == (want is None)
        if got is None:
            return multiple()
        assert (int(got.addr), got.size) == (want.addr, want.size)
        return got, want

    @rule(s=states, page=pages, size=sizes, linked=st.integers(0, 8), fit=st.booleans(), off=offsets)
    def link(self, s: Any, page: int, size: int, linked: int, fit: bool, off: int) -> None:
        got, want = s
        if fit:  # a link that has a chance: at a granule of the state, like it inside the granule, within its size
            offset = min(linked * PAGE, max(0, want.size - 1) & ~(PAGE - 1))
            offset -= model.off(want.addr) if offset else 0
            phys = page + (model.off(want.addr) if not offset else 0)
            size = max(1, min(size, want.size - offset))
        else:
            offset, phys = linked * 0x800, page + off
        self.both(
            lambda: self.dev.iova_link(got, phys, offset, size), lambda: self.ref.iova_link(want, phys, offset, size)
        )

    @rule(s=states, offset=st.integers(0, 8).map(lambda i: i * 0x800), size=sizes)
    def sync(self, s: Any, offset: int, size: int) -> None:
        got, want = s
        self.both(lambda: self.dev.iova_sync(got, offset, size), lambda: self.ref.iova_sync(want, offset, size))

    @rule(s=states, start=st.integers(0, 8), size=sizes)
    def unlink(self, s: Any, start: int, size: int) -> None:
        got, want = s
        self.both(
            lambda: self.dev.iova_unlink(got, start * PAGE, size),
            lambda: self.ref.iova_unlink(want, start * PAGE, size),
        )

    @rule(s=consumes(states), share=st.sampled_from([0.0, 0.5, 1.0]))
    def destroy(self, s: Any, share: float) -> None:
        got, want = s
        mapped = int(want.size * share)
        self.both(lambda: self.dev.iova_destroy(got, mapped), lambda: self.ref.iova_destroy(want, mapped))

    # ---- classic

    @rule(target=singles, page=pages, off=offsets, size=sizes)
    def map_phys(self, page: int, off: int, size: int) -> Any:
        got, want = self.both(lambda: self.dev.map_phys(page + off, size), lambda: self.ref.map_phys(page + off, size))
        if want is None:
            return multiple()
        assert int(got) == want
        return got, size

    @rule(s=consumes(singles))
    def unmap_phys(self, s: Any) -> None:
        addr, size = s
        self.both(lambda: self.dev.unmap_phys(addr, size), lambda: self.ref.unmap_phys(int(addr), size))

    # ---- requests

    @rule(
        target=mappings,
        vecs=st.lists(st.tuples(pages, offsets, st.sampled_from([0x200, 0x600, 0x1000, 0x2000])), min_size=1, max_size=9),
        policy=st.sampled_from(["linux", "unified"]),
        aligned=st.booleans(),
    )
    def map(self, vecs: list[tuple[int, int, int]], policy: str, aligned: bool) -> Any:
        whole = [(p, max(PAGE, n & ~(PAGE - 1))) for p, _, n in vecs]
        ranges = whole if aligned else [(p + o, n) for p, o, n in vecs]
        got, want = self.both(
            lambda: self.dev.map(Bio.from_phys(ranges), policy), lambda: self.ref.map(ranges, policy)
        )
        if got is None:
            return multiple()
        self.open.append(got)
        assert got.layout == want.layout
        assert [(int(s.addr), s.length) for s in got] == want.segments
        self.check_bytes(ranges, got.segments)
        return got, want

    def check_bytes(self, ranges: list[tuple[int, int]], segments: Any) -> None:
        spans = sorted((p, p + n) for p, n in ranges)
        overlap = any(a[1] > b[0] for a, b in itertools.pairwise(spans))
        if overlap or spans[-1][1] > BASE + len(MEMORY):
            return
        with pytest.raises(DmaFault):  # a read request: the device may only write
            self.engine.read(segments)
        data = os.urandom(sum(n for _, n in ranges))
        self.engine.write(segments, data)
        memory = memoryview(MEMORY)
        assert b"".join(bytes(memory[p - BASE : p - BASE + n]) for p, n in ranges) == data

    @rule(m=consumes(mappings))
    def unmap(self, m: Any) -> None:
        got, want = m
        self.open.remove(got)
        self.both(got.unmap, want.unmap)

    # ---- time, translation

    @rule(ms=st.integers(0, 12))
    def advance(self, ms: int) -> None:
        self.dev.iommu.advance(ms * 1_000_000)
        self.ref.advance(ms * 1_000_000)

    @rule(s=states, at=st.integers(0, 0x21000))
    def translate(self, s: Any, at: int) -> None:
        addr = min(s[1].addr + at, 2**64 - 1)
        got = self.dev.backend.iova_to_phys(addr)
        assert (None if got is None else int(got)) == self.ref.table.translate(addr)

    @invariant()
    def same_counts(self) -> None:
        if not hasattr(self, "dev"):
            return
        got = self.dev.counters()
        want = self.ref.count.to_dict()
        assert {k: got[k] for k in want} == want
        assert got["queued"] == len(self.ref.queue)

    def teardown(self) -> None:
        if not hasattr(self, "dev"):
            return
        translate = self.dev.backend.iova_to_phys
        for iova, (phys, size) in self.ref.table.leaf.items():
            assert (translate(iova), translate(iova + size - 1)) == (phys, phys + size - 1)
        for m in self.open:
            with contextlib.suppress(DmaError):  # its pages may have been unlinked under it
                m.unmap()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=max(1, STEPS // RUN),
    stateful_step_count=RUN,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
