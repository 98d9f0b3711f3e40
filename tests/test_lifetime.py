"""Objects are destroyed in any order: as garbage, at the interpreter's end, half made, or made by ``__new__`` alone.

Cases and the ways in which they end are in lifetime_cases.py; each ends in a child process. The rule that classes follow is
in CONTRIBUTING.md, and read from the sources here.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifetime_cases import DEVICES, MODES, OWNERS, everything

import dmapath
from dmapath import DmaError, GrantTable, HostBuffer, Iommu, PhysMemory, Swiotlb, XenDomain

HERE = Path(__file__).parent
SRC = Path(os.environ.get("DMAPATH_SRC", HERE.parent))


@pytest.mark.parametrize("mode", sorted(MODES))
def test_objects_that_end(mode: str) -> None:
    """Status 0 and nothing on standard error, for each owner on each back end."""
    command = [sys.executable, str(HERE / "lifetime_cases.py"), mode]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 0 wrong\n"), done.stdout
    assert int(done.stdout.rsplit("\n", 2)[-2].split()[0]) >= len(DEVICES) * len(OWNERS)


def test_a_crash_would_be_seen() -> None:
    """The harness reports a child that dies of a signal, and one that says something."""
    code = ("import lifetime_cases as c, os, sys; sys.argv = ['x', 'in_a_cycle'];"
            "c.everything = lambda: {'dies': os.abort, 'talks': lambda: 1 / 0}; c.main()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False, cwd=HERE)
    assert "dies: status 0x" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "2 cases, 2 wrong" in done.stdout


# "peers" keeps its fabric by a Function of the device's, which is a plain object
@pytest.mark.parametrize("name", sorted(everything()))
def test_cycles_are_collected(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is kept for ever because two classes will not let the collector clear them."""
    c = everything()[name]()
    devices = [x for x in c if isinstance(x, dmapath.Device)]
    seen = [weakref.ref(x) for x in devices] + [weakref.ref(d.memory) for d in devices]
    c.append(c)
    del c, devices
    gc.collect()
    assert [r() for r in seen] == [None] * len(seen)
    recwarn.clear()  # a mapping that is dropped says so


def test_garbage_does_not_pile_up(recwarn: pytest.WarningsRecorder) -> None:
    def once() -> None:
        for name in ("strict/map", "swiotlb/coherent", "python/map", "lazy/buffer-mapped"):
            c = everything()[name]()
            c.append(c)

    for _ in range(20):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        once()
        gc.collect()
    recwarn.clear()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


def test_memory_that_outlives_a_pool_has_no_frames_of_it() -> None:
    """Frames of a pool or a buffer in a cycle leave the machine's memory before their bytes go."""
    memory = PhysMemory(1 << 20, base=1 << 32)
    frames = memory.frames
    for make in (lambda: Swiotlb(memory, slots=512), lambda: HostBuffer(bytearray(9000), memory)):
        c: list[Any] = [make()]
        assert memory.frames > frames
        c.append(c)
        del c
        gc.collect()
        assert memory.frames == frames


# ---- half made

MADE_OF: dict[Any, dict[str, Any]] = {
    PhysMemory: {}, Iommu: {}, Swiotlb: {}, GrantTable: {}, dmapath.Device: {},
    HostBuffer: {"obj": bytearray(64), "memory": PhysMemory(4096)},
    XenDomain: {"memory": PhysMemory(4096)},
    dmapath.MemoryRegion: {"pages": [(0x1000, 4096)], "length": 4096},
    dmapath.Bio: {"vecs": [(0x1000, 4096)]},
    dmapath.HmmMap: {"device": dmapath.Device(iommu=Iommu()), "nr": 4},
}  # fmt: skip
WRONG: list[Any] = [object(), "x", -1, None, 2**70, 1.5, (), {}]


def _parameters(cls: type) -> list[str]:
    """Names of a constructor's parameters, as its source has them."""
    [body] = [body for name, (_, body) in _extension_classes().items() if name.endswith(f".{cls.__name__}")
              and "/rnic" not in name]  # fmt: skip
    head = re.search(r"def __c?init__\(self,?(.*?)\):\n", body, re.S)
    assert head is not None
    return re.findall(r"(?:^|,)\s*(?:\w+ )?(\w+)(?: not None)?(?=\s*[=,]|\s*$)", re.sub(r"\([^()]*\)", "0", head[1]))


@pytest.mark.parametrize("cls", MADE_OF, ids=lambda c: c.__name__)
def test_a_constructor_that_refuses_leaves_the_process_whole(cls: Any) -> None:
    fds = {fd: os.fstat(fd).st_ino for fd in (0, 1, 2)}
    kept = sorted(os.listdir("/proc/self/fd"))
    names = set(_parameters(cls)) | set(MADE_OF[cls])
    assert names
    for name in sorted(names):
        for value in WRONG:
            with contextlib.suppress(DmaError, TypeError, ValueError, OverflowError, MemoryError):
                cls(**{**MADE_OF[cls], name: value})
            gc.collect()
            assert {fd: os.fstat(fd).st_ino for fd in (0, 1, 2)} == fds, (name, value)
    assert len(os.listdir("/proc/self/fd")) <= len(kept) + 1


def _classes() -> Iterator[type]:
    """Every class of the package's extension modules."""
    for info in pkgutil.walk_packages(dmapath.__path__, "dmapath."):
        if info.name.startswith("dmapath.verbs") or "cli" in info.name or info.name == "dmapath.pytest_plugin":
            continue  # verbs: tests/verbs, where there is a device
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == info.name and not issubclass(cls, BaseException):
                yield cls


def _use(cls: type, log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    for args in ((), (None,), (None, None), (None, None, None)):
        for make in (lambda a: cls.__new__(cls, *a), lambda a: cls(*a)):
            try:
                x = make(args)
            except Exception:
                continue
            for name in dir(cls):
                if name in ("__class__", "__reduce__", "__reduce_ex__", "__init_subclass__", "__subclasshook__"):
                    continue
                for more in ((), (None,), (1,), (1, 1), (1, 1, 1), ([(0, 1)],)):
                    try:
                        got = getattr(x, name)
                        if callable(got):
                            got(*more)
                    except SystemError:
                        os.abort()
                    except Exception:
                        pass
            with contextlib.suppress(Exception):
                repr(x), len(x), list(x)  # type: ignore[arg-type]


def test_what_new_alone_made_or_none_was_given_to_does_not_crash() -> None:
    bad = []
    seen = 0
    for cls in _classes():
        seen += 1
        with tempfile.TemporaryFile() as log:
            pid = os.fork()
            if pid == 0:
                signal.alarm(30)
                _use(cls, log.fileno())
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
        if status:
            bad.append((cls, hex(status)))
    assert not bad
    assert seen > 60


# ---- the rule, read from the sources

_CLASS = re.compile(r"((?:^@.*\n)*)^cdef class (\w+)(?:\((\w+)\))?:\n((?:^(?:[ \t].*)?\n)*)", re.M)


def _extension_classes() -> dict[str, tuple[str, str]]:
    """"module.Class" -> (decorators, body)."""
    out = {}
    for path in sorted((SRC / "dmapath").rglob("*.pyx")):
        for m in _CLASS.finditer(path.read_text()):
            out[f"{path.relative_to(SRC / 'dmapath').with_suffix('')}.{m[2]}"] = (m[1], m[4])
    return out


def test_classes_that_others_native_code_needs_are_not_cleared() -> None:
    """Who frees through others, or is reached by who does, keeps its references (no_gc_clear)."""
    classes = _extension_classes()
    assert len(classes) > 40
    plain = {  # they free memory of their own alone, or none
        "request.Mappable", "drivers/nvme.Io", "verbs/queue.Batch", "verbs/_plain.Writer",
    }  # fmt: skip
    wrong = [name for name, (decorators, body) in classes.items()
             if re.search(r"def __(dealloc|del)__", body) and "no_gc_clear" not in decorators and name not in plain]
    assert not wrong
    infrastructure = {
        "device.Device", "memory.PhysMemory", "swiotlb.Swiotlb", "xen.XenDomain", "tap.Tap", "backends/iommu.Iommu",
        "backends/iommu.IommuDomain", "backends/direct.DirectBackend", "backends/grant.GrantBackend",
        "backends/grant.GrantTable", "backends/python.PythonBackend", "backends/base.CapsuleBackend",
        "devices/nvme.NvmeController", "devices/rnic.Rnic", "drivers/rnic.Pd", "drivers/rnic.Context",
    }  # fmt: skip
    assert infrastructure <= set(classes)
    assert not [name for name in infrastructure if "no_gc_clear" not in classes[name][0]]


def test_native_fields_are_set_before_a_constructor_can_fail() -> None:
    """A field whose zero is a resource (a file descriptor) is -1 in the first statement."""
    for name, (_, body) in _extension_classes().items():
        if "self.fd = -1" in body:
            init = re.search(r"def __cinit__\(.*?\):\n(.*)", body, re.S)
            assert init is not None
            assert init[1].lstrip().startswith("self.fd = -1"), name


def test_every_allocation_is_looked_at() -> None:
    """malloc and its kin: the next lines test for NULL."""
    wrong = []
    for path in [*(SRC / "dmapath").rglob("*.pyx"), *(SRC / "ext").rglob("*.c")]:
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            m = re.search(r"=[^=].*(?<!\.)\b(?:malloc|calloc|realloc|aligned_alloc|core_alloc|take)\(", line)
            if m is None or line.lstrip().startswith(("#", "/*", "*")):
                continue
            if not re.search(r"NULL|if \(!|if \(t->e && |!\*?\w|\? |not \(", " ".join(lines[i : i + 9])):
                wrong.append(f"{path.name}:{i + 1}: {line.strip()}")
    assert not wrong
