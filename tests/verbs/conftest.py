"""Tests on a real RDMA device: ``dmapath rxe test`` runs them on soft-RoCE in a throw-away guest, as scripts/test does."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmapath.verbs import Context, Pd, Qp, devices, loopback

HERE = Path(__file__).parent
WANTED = "an RDMA device is wanted: `dmapath rxe test` brings soft-RoCE in a guest"
if not devices() and "DMAPATH_GUEST" in os.environ:
    pytest.exit(WANTED, returncode=2)  # a guest without one has failed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not devices():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=WANTED))

@pytest.fixture(scope="session")
def ctx() -> Iterator[Context]:
    yield Context()


@pytest.fixture
def pd(ctx: Context) -> Iterator[Pd]:
    with Pd(ctx) as made:
        yield made
        gc.collect()  # closing it proves that nothing of it was left


@pytest.fixture
def pair(pd: Pd) -> Iterator[tuple[Qp, Qp]]:
    first, second = loopback(pd)
    yield first, second
    first.close()
    second.close()
