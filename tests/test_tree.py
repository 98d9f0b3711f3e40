"""The source tree: dependencies point one way, hot functions cross no Python, the README's program prints what it says.

These read the sources, found through DMAPATH_SRC (scripts/test sets it) or beside this folder.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SRC = Path(os.environ.get("DMAPATH_SRC", HERE.parent))

#: Layers from the bottom up; a module may use its own layer and those below. Nobody below knows a backend's insides.
LAYERS = [
    ["_version", "errors", "addr", "abi", "_core", "_clock", "_nvme", "_rnic", "costs", "nvme_status", "verbs.ibv"],
    ["request", "memory", "backends.base", "descriptors", "limits", "mmio", "plugins", "rdma", "verbs.bridge",
     "guest.packages"],
    ["swiotlb", "pci", "xen", "tap"],
    ["backends.direct", "backends.iommu", "backends.grant", "backends.python", "bio", "mr", "wrapper"],
    ["rules", "verbs.resources", "guest.image"],
    ["device", "verbs.queue", "guest.vm"],
    ["explain", "engine", "_bench", "hmm", "debug", "observe", "adversary", "tracer",
     "devices.nvme", "devices.rnic", "drivers.nvme", "drivers.rblk", "drivers.rnic", "verbs.probe", "verbs.exchange"],
    ["trace", "drivers.registered", "verbs.backend", "verbs._plain"],
    ["verbs.ping", "verbs.flows", "machines", "doctor"],
    ["compare", "matrix", "pytest_plugin", "replay", "plot", "reg"],
    ["cli_common"],
    ["cli_guest"],
    ["cli_verbs"],
    ["cli_matrix"],
    ["cli"],
]
#: Arrows that point up, taken at call time only: Device.explain builds its answer one layer above, and a region that wants
#: on-demand paging is made only where the self-test passes.
ALLOWED = {("device", "explain"), ("verbs.resources", "verbs.probe")}
IMPORT = re.compile(r"^\s*(?:from (dmapath[\w.]*) c?import ([^#\n(]*)|c?import (dmapath[\w.]+))", re.M)


def level(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def uses(path: Path) -> set[str]:
    out = set()
    text = re.sub(r"if TYPE_CHECKING:\n(?:    .*\n)+", "", path.read_text())
    for package, names, plain in IMPORT.findall(text):
        module = (package or plain).removeprefix("dmapath").lstrip(".")
        if module:
            out.add(module)
        else:
            out |= {n.split(" as ")[0].strip() for n in names.split(",")}
    return {m for m in out if any(m in layer for layer in LAYERS)}


def sources() -> list[Path]:
    found = [p for p in (SRC / "dmapath").rglob("*") if p.suffix in (".py", ".pyx", ".pxd")]
    return [p for p in found if p.stem != "__init__"]


def test_there_are_sources() -> None:
    assert len(sources()) > 25, f"no source tree at {SRC}: set DMAPATH_SRC to a checkout"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(SRC / "dmapath").with_suffix("").parts)
    for used in uses(path):
        assert level(used) <= level(module) or (module, used) in ALLOWED, f"{module} uses {used}"


def test_the_wrapper_and_the_requests_know_no_backend() -> None:
    for name in ("wrapper.pyx", "request.pyx", "bio.pyx", "mr.pyx"):
        assert not re.search(r"backends|_core|iommu_domain", (SRC / "dmapath" / name).read_text()), name


def test_devices_and_drivers_meet_at_registers_alone() -> None:
    """A driver knows no device model, and a device no driver."""
    for path in (SRC / "dmapath" / "drivers").glob("*.p*"):
        assert not {m for m in uses(path) if m.startswith("devices.")}, path
    for path in (SRC / "dmapath" / "devices").glob("*.p*"):
        assert not {m for m in uses(path) if m.startswith("drivers.")}, path
    for path in (SRC / "ext" / "devices").iterdir():
        assert not re.search(r"dma_ops|map_phys|core/|phys_mem|iommu_", path.read_text()), path


def test_the_core_needs_no_python() -> None:
    for path in (SRC / "ext").rglob("*.[ch]"):
        assert "Python.h" not in path.read_text(), path


HOT = {
    "wrapper": ["map_start", "cannot_link", "heads_lose_their_place", "start_unified", "start_linux", "start_each",
                "link_all", "link_pieces", "load_pieces", "measure", "measure_linked", "device_takes", "check_segment",
                "hand_out", "map_next", "next_gapped", "next_cut", "next_run", "map_vector", "map_part", "unmap",
                "unmap_saved"],
    "request": ["vec_fill"],
    "backends/iommu": ["iommu_try_alloc", "link_ranges", "iommu_link", "iommu_link_vec", "iommu_link_gapped", "iommu_sync",
                       "iommu_unlink", "iommu_free", "iommu_map_phys", "iommu_unmap_phys", "iommu_access"],
    "backends/direct": ["direct_map_phys", "direct_unmap_phys", "direct_map_sg", "direct_access"],
    "backends/grant": ["map_run", "unmap_run", "grant_access"],
    "verbs/backend": ["take_slot", "enter", "undo", "leave", "dissolve", "release", "new_range", "cached_range",
                      "find_cached", "idle_window", "link_run", "link_pages", "place_pages", "register_window",
                      "verbs_try_alloc", "verbs_link", "verbs_sync", "verbs_unlink", "verbs_free", "verbs_map_phys",
                      "verbs_unmap_phys", "verbs_keys_of"],
    "descriptors": ["prp_gap", "nvme_form", "prp_more", "desc_pages", "fill_list", "describe", "describe_metadata"],
    "drivers/nvme": ["pool_take", "pool_give", "map_request", "let_go", "describe_data", "describe_meta", "load", "issue",
                     "issue_more", "retire", "reap", "drive"],
    "drivers/rnic": ["run_command"],
    "drivers/registered": ["register", "deregister", "unlink", "link_range", "forget", "forget_oldest", "take",
                           "map_range", "unmap_range",
                           "reg_try_alloc", "reg_link", "reg_link_gapped", "reg_sync", "reg_unlink", "reg_keys_of"],
    "hmm": ["hmm_dma_map_alloc", "hmm_dma_map_pfn", "hmm_dma_unmap_pfn"],
}  # fmt: skip


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """(Python score, source) of each line, as ``cython -a`` gives them."""
    out = {}
    where = tmp_path_factory.mktemp("annotated")
    for module in HOT:
        target = where / f"{Path(module).name}.c"
        subprocess.run([sys.executable, "-m", "cython", "-3", "-a", "-o", str(target), f"dmapath/{module}.pyx"], cwd=SRC,
                       check=True, capture_output=True)  # fmt: skip
        lines = re.findall(r'<pre class="cython line score-(\d+)"[^>]*>(.*?)</pre>', target.with_suffix(".html").read_text())
        text = (SRC / "dmapath" / f"{module}.pyx").read_text().splitlines()
        assert len(lines) == len(text)
        out[module] = [(int(score), html.unescape(source)) for (score, _), source in zip(lines, text, strict=True)]
    return out


@pytest.mark.parametrize(("module", "function"), [(m, f) for m, fs in HOT.items() for f in fs])
def test_hot_functions_cross_no_python(scores: dict[str, list[tuple[int, str]]], module: str, function: str) -> None:
    lines = scores[module]
    start = next(i for i, (_, text) in enumerate(lines) if re.match(rf"cdef .*\b{function}\(", text))
    body = 0
    for score, text in lines[start:]:
        if body and text and not text[0].isspace() and not text.startswith(")"):
            break
        body += 1
        assert score == 0, text
    assert body > 2


def blocks(kind: str) -> list[str]:
    root = SRC if (SRC / "README.md").exists() else HERE.parent
    return re.findall(rf"```{kind}\n(.*?)```", (root / "README.md").read_text(), re.S)


def test_the_readme_program_prints_what_the_readme_says(tmp_path: Path) -> None:
    program = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout == blocks("text")[0]


def test_the_readme_names_both_commands() -> None:
    assert any("scripts/demo" in b for b in blocks("sh"))
    assert any("scripts/test" in b for b in blocks("sh"))


def test_documented_code_runs(tmp_path: Path) -> None:
    root = SRC if (SRC / "docs").exists() else HERE.parent
    ran = 0
    for path in sorted((root / "docs").glob("*.md")):
        if path.name == "verbs.md":  # wants an RDMA device: tests/verbs/test_docs.py runs it
            continue
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
            done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=False)
            assert done.returncode == 0, f"{path.name}: {done.stderr}"
            ran += 1
    assert ran >= 3


def test_importing_and_exiting_is_silent() -> None:
    code = (
        "import dmapath; d = dmapath.Device(iommu=dmapath.Iommu('lazy'), memory=dmapath.PhysMemory(8192));"
        "s = d.iova_try_alloc(0, 8192); d.iova_link(s, 1 << 32, 0, 8192); d.map_phys(0, 1)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
