"""Invariants of IOVA (row 78): live ranges are disjoint, aligned to their size, within the mask, never page 0, never
reserved."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmapath import Device, Iommu

RESERVED = [(0xFEE00000, 0xFEEFFFFF), (0x8000000, 0x8100FFF), (0x0, 0xFFFF)]


def check(dev: Device, live: dict[int, int], mask: int, reserved: list[tuple[int, int]]) -> None:
    spans = sorted((a, a + n - 1) for a, n in live.items())
    assert all(x[1] < y[0] for x, y in itertools.pairwise(spans))
    for first, last in spans:
        pages = (last + 1 - first) // 4096
        assert first % (4096 << max(0, (pages - 1).bit_length())) == 0
        assert first >= 4096
        assert last <= mask
        assert not any(first <= hi and last >= lo for lo, hi in reserved)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=120),
    bits=st.sampled_from([20, 24, 28, 32, 39, 64]),
    forcedac=st.booleans(),
    seed=st.integers(0, 99),
)
def test_row_78(sizes: list[int], bits: int, forcedac: bool, seed: int) -> None:
    mask = (1 << bits) - 1
    dev = Device(iommu=Iommu(reserved=RESERVED), dma_mask=mask, forcedac=forcedac)
    rng, states, live = random.Random(seed), [], {}
    for pages in sizes:
        st_ = dev.iova_try_alloc(0, pages * 4096)
        if st_ is not None:
            states.append(st_)
            live[int(st_.addr)] = pages * 4096
        if states and rng.random() < 0.4:
            gone = states.pop(rng.randrange(len(states)))
            del live[int(gone.addr)]
            dev.iova_free(gone)
        check(dev, live, mask, RESERVED)
    for left in states:
        dev.iova_free(left)
    assert dev.counters()["iova_live_bytes"] == 0


def test_ten_thousand_ranges_in_a_random_order() -> None:
    dev = Device(iommu=Iommu())
    rng = random.Random(4)
    live: dict[int, Any] = {}
    for _ in range(10000):
        st_ = dev.iova_try_alloc(0, 4096 * rng.choice([1, 2, 33, 64, 100]))
        assert st_ is not None
        assert int(st_.addr) not in live
        live[int(st_.addr)] = st_
    check(dev, {a: -(-s.size // 4096) * 4096 for a, s in live.items()}, 2**64 - 1, [])
    order = list(live.values())
    rng.shuffle(order)
    for s in order:
        dev.iova_free(s)
    assert dev.counters()["iova_live_bytes"] == 0


@pytest.mark.parametrize("aperture", [(0x100000, 0x1FFFFF), (1 << 33, (1 << 33) + 0xFFFF)])
def test_an_aperture_bounds_both_ends(aperture: tuple[int, int]) -> None:
    dev = Device(iommu=Iommu(aperture=aperture))
    got = []
    while (st_ := dev.iova_try_alloc(0, 0x1000)) is not None:
        got.append(int(st_.addr))
    assert (min(got), max(got)) == (aperture[0], aperture[1] & ~0xFFF)
    assert len(got) == (aperture[1] + 1 - aperture[0]) // 4096


def test_depots_shrink_with_time() -> None:
    dev = Device(iommu=Iommu(cpus=1))
    states = [dev.iova_try_alloc(0, 0x1000) for _ in range(127 * 6)]
    for s in states:
        dev.iova_free(s)
    before = dev.backend.stats()
    assert before["iova_depot"] == 4
    dev.iommu.advance(100_000_000)
    assert dev.backend.stats()["iova_depot"] == 3
    dev.iommu.advance(1_000_000_000)
    after = dev.backend.stats()
    assert after["iova_depot"] == 1
    assert before["iova_nodes"] - after["iova_nodes"] == 3 * 127


def test_a_granule_of_2_mib() -> None:
    dev = Device(iommu=Iommu(page_sizes=(2 << 20, 1 << 30)))
    assert dev.merge_boundary == (2 << 20) - 1
    addr = dev.map_phys(0x40001234, 0x1000)
    assert int(addr) % (2 << 20) == 0x1234
    assert dev.counters()["ptes_2m"] == 1
    dev.unmap_phys(addr, 0x1000)
    assert dev.counters()["mapped_bytes"] == 0
