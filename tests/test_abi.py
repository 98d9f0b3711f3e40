"""What an outsider builds against an installed dmapath: a driver and a backend in Cython, C that must not compile."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import live, strict

import dmapath
from dmapath import Bio, Device, Iommu

HERE = Path(__file__).parent
BUILD = """
from Cython.Build import cythonize
from setuptools import Extension, setup
import dmapath
setup(name="outsider", ext_modules=cythonize(
    [Extension(n, [n + ".pyx"], include_dirs=[dmapath.get_include()]) for n in {names!r}], quiet=True))
"""


def build(where: Path, *names: str) -> dict[str, ModuleType]:
    for name in names:
        (where / f"{name}.pyx").write_bytes((HERE / "abi" / f"{name}.pyx").read_bytes())
    (where / "setup.py").write_text(BUILD.format(names=names))
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=where, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = {}
    for name in names:
        [path] = where.glob(f"{name}.*.so")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        out[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(out[name])
    return out


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return build(tmp_path_factory.mktemp("outsider"), "driver", "backend")


def test_a_cython_driver_links_pages_by_index(outsider: Any) -> None:
    dev = strict()
    got, undone = outsider["driver"].pages_by_index(dev.capsule, [0x100000, 0x555000, 0x123, 0x101000])
    assert (undone, got[2]) == (3, -22)  # 0x123 is no page
    assert [a - got[0] for a in (got[1], got[3])] == [0x1000, 0x3000]
    assert not any(live(dev).values())


def test_a_cython_driver_maps_through_the_wrapper(outsider: Any) -> None:
    dev = strict()
    for n, length, offset, layout, segments in ((1, 4096, 0, 2, 1), (200, 4096, 0, 2, 1), (200, 512, 64, 3, 200)):
        segs, got = outsider["driver"].map_stripes(dev.capsule, n, length, offset)
        assert (got, len(segs)) == (layout, segments)
        assert sum(k for _, k in segs) == n * length
    assert not any(live(dev).values())
    segs, layout = outsider["driver"].map_stripes((direct := Device()).capsule, 3, 512, 64)
    assert (layout, segs) == (1, [(0x100040 + i * 0x2000, 512) for i in range(3)])
    assert direct.counters()["maps"] == 3


def test_a_driver_may_ask_for_keys_on_every_back_end(outsider: Any) -> None:
    for dev in (strict(), Device(), Device(backend=outsider["backend"].Backend("one-shot"))):
        addr = dev.map_phys(0x100000, 4096)
        assert outsider["driver"].keys(dev.capsule, int(addr), 4096) == (0, 0)
        dev.unmap_phys(addr, 4096)


def test_a_cython_driver_takes_the_two_steps(outsider: Any) -> None:
    dev = strict()
    assert outsider["driver"].two_steps(dev.capsule, 0x12345200, 0x1000) == 0xFFFFE200
    assert not any(live(dev).values())


def test_a_backend_of_two_functions_serves_every_call(outsider: Any) -> None:
    dev = Device(backend=outsider["backend"].Backend("one-shot"))
    gapped = [(0x100200, 0x600), (0x205000, 0x1000)]
    with dev.map(Bio(gapped)) as m:
        assert (m.layout, [(int(s.addr), s.length) for s in m]) == ("direct", [(p + (1 << 40), n) for p, n in gapped])
    assert dev.iova_try_alloc(0, 4096) is None
    segs = dev.map_sg(Bio(gapped))
    assert len(segs) == 2
    dev.unmap_sg(segs)
    c = dev.counters()
    assert (c["maps"], c["unmaps"], c["iova_allocs"]) == (4, 4, 0)
    assert set(dmapath.COUNTERS) <= set(c)


def test_a_two_step_backend_gets_every_layout(outsider: Any) -> None:
    dev = Device(backend=outsider["backend"].Backend("two-step"))
    with dev.map(Bio([(0x100200, 0xE00), (0x205000, 0x1000)])) as m:
        assert (m.layout, len(m)) == ("linear", 1)
    with dev.map(Bio([(0x100200, 0x600), (0x205000, 0x1000)])) as m:
        assert (m.layout, [int(s.addr) & 0xFFF for s in m]) == ("gapped", [0x200, 0])
    assert (dev.counters()["links"], dev.counters()["unlinks"]) == (4, 2)
    with pytest.raises(dmapath.NotSupportedError, match="two-step"):
        dev.explain(Bio([(0, 1)]))


def test_a_table_of_another_abi_is_refused(outsider: Any) -> None:
    with pytest.raises(dmapath.DmaValueError, match="ABI 2"):
        Device(backend=outsider["backend"].Backend("too-new"))


HEADER = "#include <dmapath/dmapath.h>\n"
GOOD = HEADER + """
int driver(struct dma_device *d, phys_addr_t p)
{ struct dma_iova_state s; dma_addr_t a;
  if (!dma_iova_try_alloc(d, &s, p, 4096)) return dma_map_phys(d, p, 4096, DMA_TO_DEVICE, 0, &a);
  dma_iova_link(d, &s, p, 0, 4096, DMA_TO_DEVICE, 0); dma_iova_sync(d, &s, 0, 4096);
  return dma_iova_destroy(d, &s, 4096, DMA_TO_DEVICE, 0); }
"""
BAD_C = {
    "phys for dma": "void f(struct dma_device *d, phys_addr_t p) { dma_unmap_phys(d, p, 1, DMA_TO_DEVICE, 0); }",
    "dma for phys": "void f(struct dma_device *d, dma_addr_t a) { dma_map_phys(d, a, 1, DMA_TO_DEVICE, 0, &a); }",
    "address for length": "void f(struct dma_device *d, struct dma_iova_state *s, phys_addr_t p)"
    " { dma_iova_try_alloc(d, s, 1, p); }",
    "iova for dma": "dma_addr_t f(iova_t i) { return i; }",
    "assigned": "void f(dma_addr_t *a, phys_addr_t p) { *a = p; }",
    "integer": "void f(struct dma_seg *s) { s->addr = 4096; }",
}


def compile_c(text: str, compiler: str = "gcc", *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [compiler, "-I", dmapath.get_include(), "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *flags, "-"],
        input=text, text=True, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [("gcc", "-xc", "-std=c11"), ("gcc", "-xc", "-std=gnu17")])
def test_the_header_compiles_alone(flags: tuple[str, ...]) -> None:
    done = compile_c(GOOD, *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BAD_C)
def test_c_refuses_to_mix_addresses(name: str) -> None:
    done = compile_c(HEADER + BAD_C[name], "gcc", "-xc", "-std=c11")
    assert done.returncode != 0
    assert "incompatible type" in done.stderr, done.stderr


BAD_CYTHON = {
    "phys for dma": "cdef dma_addr_t f(phys_addr_t p) noexcept nogil:\n    return p",
    "dma for phys": "cdef int f(dma_device *d, dma_addr_t a) noexcept nogil:\n"
    "    return dma_map_phys(d, a, 1, DMA_TO_DEVICE, 0, &a)",
    "swapped": "cdef int f(dma_device *d, dma_iova_state *s, phys_addr_t p) noexcept nogil:\n"
    "    return dma_iova_try_alloc(d, s, 1, p)",
    "iova for dma": "cdef dma_addr_t f(iova_t i) noexcept nogil:\n    return i",
}


@pytest.mark.parametrize("name", BAD_CYTHON)
def test_cython_refuses_to_mix_addresses(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pyx").write_text("# cython: language_level=3\nfrom dmapath.abi cimport *\n" + BAD_CYTHON[name] + "\n")
    command = [sys.executable, "-m", "cython", "bad.pyx"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert "Cannot assign type" in done.stderr, done.stderr


def test_the_backend_capsule_must_be_one() -> None:
    with pytest.raises(dmapath.AddressTypeError, match="capsule"):
        Device(backend=Iommu())


def test_simulated_devices_reach_an_outsiders_back_end_through_its_bus(outsider: Any) -> None:
    dev = Device(backend=outsider["backend"].Backend("two-step"), memory=dmapath.PhysMemory(4096))
    with dev.map(Bio([(0x100000, 0x1000)], op="write")) as m:
        read = dmapath.DmaEngine(dev).read([(int(m.segments[0].addr), 4)])
        assert read == bytes((int(m.segments[0].addr) + i) & 255 for i in range(4))
    with pytest.raises(dmapath.DmaFault, match="not present"):
        dmapath.DmaEngine(dev).read([(0, 4)])
    with pytest.raises(dmapath.NotSupportedError):
        dmapath.DmaEngine(Device(backend=outsider["backend"].Backend("one-shot"), memory=dmapath.PhysMemory(4096)))
