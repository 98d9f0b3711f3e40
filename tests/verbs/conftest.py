"""Tests on a real RDMA device: ``dmapath rxe test`` runs them on soft-RoCE in a throw-away guest, as scripts/test does."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dmapath.verbs import Context, Pd, Qp, devices, loopback

if not devices():
    pytest.exit("tests/verbs wants an RDMA device: `dmapath rxe test` brings soft-RoCE in a guest", returncode=2)

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
