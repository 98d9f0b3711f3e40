"""The six cases: one driver, six set-ups; the case, the segments, what is kept, and every byte in both directions."""

from __future__ import annotations

import os
from typing import Any

import pytest
from conftest import live

from dmapath import Bio, DmaDebug, DmaEngine, Mapping, compare

# number -> case, layout, segments, bytes kept for unmap
WANT = {
    1: ("direct", "direct", 3, 0),
    2: ("iommu-aligned", "linear", 1, 16),
    3: ("iommu-aligned-p2p", "linear", 3, 16),
    4: ("swiotlb-single", "bounced", 1, 16),
    5: ("swiotlb-multi", "bounced", 3, 48),
    6: ("iommu-unaligned", "gapped", 3, 16),
}


@pytest.mark.parametrize("number", WANT)
def test_one_driver_serves_each_case(number: int) -> None:
    case = compare.six_cases()[number - 1]
    device, engine = case.device, DmaEngine(case.device)
    before = live(device)
    for p, n in case.vecs:
        case.memory.write(p, os.urandom(n))
    sent: list[bytes] = []
    arriving = os.urandom(sum(n for _, n in case.vecs))

    def fetch(m: Mapping) -> int:
        sent.append(engine.read(m.segments))
        return 0

    out = compare.transfer(device, Bio.from_phys(case.vecs, op="write"), "unified", fetch)
    assert sent == [case.bytes()]
    back = Bio.from_phys(case.vecs, op="read")
    into = compare.transfer(device, back, "unified", lambda m: engine.write(m.segments, arriving))
    assert case.bytes() == arriving
    for m in (out, into):
        assert (m.case, m.layout, m.unmap_state_bytes) == (WANT[number][0], WANT[number][1], WANT[number][3])
    # case 3: host page, peer, two host pages that the one range holds side by side
    assert len(out.segments) == WANT[number][2]
    assert live(device) == before
    assert case.number == number


@pytest.mark.parametrize("number", WANT)
def test_no_case_misuses_the_api(number: int) -> None:
    """dma-debug finds nothing to say, though it makes direct devices keep their addresses."""
    case = compare.six_cases()[number - 1]
    engine = DmaEngine(case.device)
    with DmaDebug(case.device):
        compare.transfer(case.device, Bio.from_phys(case.vecs, op="write"), "unified", lambda m: engine.read(m.segments))


def test_compare_shows_all_six_and_explain_names_them() -> None:
    rows = {(r["number"], r["policy"]): r for r in compare.six_rows()}
    assert len(rows) == 12
    for number, (case, layout, segments, kept) in WANT.items():
        r: dict[str, Any] = rows[number, "unified"]
        shown = tuple(r[k] for k in ("case", "layout", "segments", "unmap_state_bytes", "verified"))
        assert shown == (case, layout, segments, kept, True)
    assert rows[6, "linux"]["layout"] == "per-range"
    assert rows[6, "linux"]["unmap_state_bytes"] == 48
    assert rows[3, "linux"]["error"].startswith("EINVAL: Linux's bios hold memory of one kind")
