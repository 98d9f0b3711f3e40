"""After its end every method of every object with a life raises StateError, or stands in the table below with the reason.

The members are found by introspection, so a new one fails here until somebody has decided what it does after the end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from publics import surface

from dmapath import Bio, Device, HmmMap, HostBuffer, Iommu, OdpRegion, PhysMemory, StateError
from dmapath.devices.nvme import NvmeController
from dmapath.devices.rnic import Rnic
from dmapath.drivers.nvme import Nvme
from dmapath.drivers.rblk import Rblk
from dmapath.drivers.registered import Registered
from dmapath.drivers.rnic import Context, Cq, FastMr, Mr, Pd, Qp, loopback
from dmapath.errors import DmaError

# what is left to be dropped here says so
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

PAGE = 4096
ENDINGS = {"close", "free", "unmap", "dereg", "release", "detach", "stop", "shutdown", "__exit__"}
VALUE = "a plain value: what it was made with, or what it counted"
AGAIN = "ending it again does nothing"
LEAVE = "the end of a with block in which it was ended already"


class World:
    """A machine for one object: memory, a device behind an IOMMU, an NVMe controller, an HCA with its context."""

    def __init__(self) -> None:
        self.memory = PhysMemory(1 << 20, layout="scattered", seed=5)
        self.device = Device(memory=self.memory, iommu=Iommu("strict"))
        self.bio = Bio.from_memory(self.memory, [(0x200, 0x600), (0x5000, 0x1000)], op="write")
        self.keep: list[Any] = []
        self.io: Any = None

    def context(self) -> Context:
        hca = Rnic()
        hca.attach(Device(memory=self.memory, iommu=Iommu("strict"), **hca.limits))
        self.keep.append(hca)
        return Context(hca, hca.device)

    def pd(self) -> Pd:
        return Pd(self.context())

    def nvme(self) -> Nvme:
        controller = NvmeController(1 << 20)
        controller.attach(Device(memory=self.memory, iommu=Iommu("strict"), **controller.limits))
        self.keep.append(controller)
        return Nvme(controller, controller.device)

    def qp(self) -> Qp:
        self.far, near = loopback(self.pd())
        return near

    def rblk(self) -> Rblk:
        qp = self.qp()
        self.mr = Mr(qp.pd, self.memory, 0, 1 << 16, access=15)
        keys = Registered(qp.pd)
        self.keep += [qp, keys]
        return Rblk(Device(memory=self.memory, backend=keys), qp, self.mr.addr, self.mr.rkey, 1 << 16)


def freed_state(w: World) -> Any:
    return w.device.iova_try_alloc(w.memory.phys(0), PAGE)


@dataclass
class Life:
    """How an object is made and ended, plausible arguments of its methods, and what it may still do afterwards, and why."""

    make: Callable[[World], Any]
    end: Callable[[World, Any], object]
    arguments: dict[str, Callable[[World], tuple[Any, ...]]] = field(default_factory=dict)
    allowed: dict[str, str] = field(default_factory=dict)
    #: public functions that take such an object: full name -> a call with it
    uses: dict[str, Callable[[World, Any], object]] = field(default_factory=dict)


def values(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, VALUE)


WRITE = ("write", [(0, 8, 0)], 0, 0)
LIVES: dict[str, Life] = {
    "dmapath.device.Mapping": Life(
        lambda w: w.device.map(w.bio),
        lambda w, m: m.unmap(),
        allowed={**values("device", "request", "segments", "__len__", "layout", "case", "rules", "unmap_state_bytes"),
                 "__exit__": LEAVE},
        uses={"dmapath.drivers.rnic.Qp.post": lambda w, m: w.qp().post("write", m)},
    ),
    "dmapath.device.IovaState": Life(
        freed_state,
        lambda w, s: w.device.iova_free(s),
        allowed=values("addr", "size", "device"),
        uses={
            "dmapath.device.Device.iova_link": lambda w, s: w.device.iova_link(s, w.memory.phys(0), 0, PAGE),
            "dmapath.device.Device.iova_sync": lambda w, s: w.device.iova_sync(s, 0, PAGE),
            "dmapath.device.Device.iova_unlink": lambda w, s: w.device.iova_unlink(s, 0, PAGE),
            "dmapath.device.Device.iova_free": lambda w, s: w.device.iova_free(s),
            "dmapath.device.Device.iova_destroy": lambda w, s: w.device.iova_destroy(s, 0),
        },
    ),
    "dmapath.device.CoherentBuffer": Life(
        lambda w: w.device.alloc_coherent(PAGE),
        lambda w, b: b.free(),
        allowed={**values("addr", "phys", "size", "__len__", "device"), "__exit__": LEAVE},
    ),
    "dmapath.memory.HostBuffer": Life(
        lambda w: HostBuffer(bytearray(3 * PAGE), w.memory),
        lambda w, b: b.close(),
        allowed={**values("memory", "layout"), "close": AGAIN, "__exit__": LEAVE, "__len__": "0: it holds nothing"},
    ),
    "dmapath.hmm.HmmMap": Life(
        lambda w: HmmMap(w.device, 4),
        lambda w, h: h.free(),
        {"map_pfn": lambda w: (0, w.memory.phys(0)), "unmap_pfn": lambda w: (0,), "flags": lambda w: (0,)},
        {**values("device"), "__exit__": LEAVE},
    ),
    "dmapath.hmm.OdpRegion": Life(
        lambda w: OdpRegion(w.device, w.memory, 0, 4 * PAGE),
        lambda w, r: r.close(),
        {"fault": lambda w: (0,), "is_mapped": lambda w: (0,), "invalidate_start": lambda w: (w.memory, 0, PAGE)},
        {"__exit__": LEAVE, "invalidate_start": "the memory may be telling it just now; nothing is mapped, so nothing goes"},
    ),
    "dmapath.drivers.nvme.Nvme": Life(
        lambda w: w.nvme(),
        lambda w, n: n.close(),
        {
            "submit": lambda w: (w.bio,), "run": lambda w: (w.bio,), "repeat": lambda w: (w.io,), "command": lambda w: (0,),
            "write_zeroes": lambda w: (0, 1), "deallocate": lambda w: ([(0, 1)],),
        },
        {**values("device", "queue_depth", "block_size", "metadata_size", "blocks", "max_bytes", "limits", "identity",
                  "in_flight", "told", "counters"), "close": AGAIN, "__exit__": LEAVE},
    ),
    "dmapath.drivers.rblk.Rblk": Life(
        lambda w: w.rblk(),
        lambda w, r: r.close(),
        {"submit": lambda w: (w.bio,), "run": lambda w: (w.bio,), "drive": lambda w: (w.io, 0.0)},
        {**values("in_flight", "counters"), "close": AGAIN, "__exit__": LEAVE,
         "drive": "an Io that is done needs no driving"},
    ),
    "dmapath.drivers.rnic.Context": Life(
        lambda w: w.context(),
        lambda w, c: c.close(),
        allowed={**values("hca", "device", "attr", "children"), "close": AGAIN, "__exit__": LEAVE},
        uses={"dmapath.drivers.rnic.Pd": lambda w, c: Pd(c), "dmapath.drivers.rnic.Cq": lambda w, c: Cq(c)},
    ),
    "dmapath.drivers.rnic.Pd": Life(
        lambda w: w.pd(),
        lambda w, p: p.context.close(),
        allowed=values("context", "number"),
        uses={
            "dmapath.drivers.rnic.Mr": lambda w, p: Mr(p, w.memory, 0, PAGE),
            "dmapath.drivers.rnic.FastMr": lambda w, p: FastMr(p),
            "dmapath.drivers.rnic.Qp": lambda w, p: Qp(p),
            "dmapath.drivers.rnic.loopback": lambda w, p: loopback(p),
            "dmapath.drivers.registered.Registered": lambda w, p: Registered(p),
        },
    ),
    "dmapath.drivers.rnic.Mr": Life(
        lambda w: Mr(w.pd(), w.memory, 0, PAGE),
        lambda w, m: m.dereg(),
        allowed={**values("pd", "addr", "length", "lkey", "rkey", "access"), "release": AGAIN, "__exit__": LEAVE},
        uses={"dmapath.drivers.rnic.Qp.post": lambda w, m: w.qp().post("write", m)},
    ),
    "dmapath.drivers.rnic.FastMr": Life(
        lambda w: FastMr(w.pd(), 4),
        lambda w, m: m.free(),
        allowed={**values("pd", "key", "lkey", "rkey", "max_pages", "addr", "length"), "free": AGAIN, "__exit__": LEAVE},
        uses={
            "dmapath.drivers.rnic.Qp.reg_mr": lambda w, m: w.qp().reg_mr(m, [(0, PAGE)]),
            "dmapath.drivers.rnic.Qp.post": lambda w, m: w.qp().post("write", m),
        },
    ),
    "dmapath.drivers.rnic.Cq": Life(
        lambda w: Cq(w.context(), 16),
        lambda w, c: c.close(),
        allowed={**values("context", "cqe"), "close": AGAIN, "__exit__": LEAVE},
        uses={"dmapath.drivers.rnic.Qp": lambda w, c: Qp(Pd(c.context), c)},
    ),
    "dmapath.drivers.rnic.Qp": Life(
        lambda w: w.qp(),
        lambda w, q: q.close(),
        {
            "connect": lambda w: (w.far.qp_num,), "post": lambda w: WRITE, "write": lambda w: ([], 0, 0),
            "read": lambda w: ([], 0, 0), "fetch_add": lambda w: ((0, 8, 0), 0, 0, 1),
            "cmp_swp": lambda w: ((0, 8, 0), 0, 0, 1, 2), "reg_mr": lambda w: (FastMr(w.far.pd), [(0, PAGE)]),
            "local_inv": lambda w: (0x100,), "recv": lambda w: ([(0, 8, 0)],), "wait": lambda w: (0, 0.0),
            "arrived": lambda w: (0.0,),
        },
        {**values("pd", "send_cq", "recv_cq", "qp_num", "depth", "recv_depth", "max_sge", "max_inline", "state"),
         "close": AGAIN, "__exit__": LEAVE},
    ),
    "dmapath.drivers.registered.Registered": Life(
        lambda w: Registered(w.pd()),
        lambda w, r: r.close(),
        allowed={**values("mode", "dma_ops", "counters"), "close": AGAIN, "__exit__": LEAVE},
    ),
}  # fmt: skip
#: Classes with a method that is called like an end, but no end of their own, or whose end is tested elsewhere.
ELSEWHERE = {
    "dmapath.device.Device": "detach takes an observer away, not the device",
    "dmapath.backends.grant.GrantTable": "release is about one grant",
    "dmapath.debug.DmaDebug": "detaching it ends nothing: it may be asked, and attached again",
    "dmapath.machines.Machine": "closes what others gave it",
    "dmapath.matrix.Rig": "closes what others gave it",
    **dict.fromkeys(
        [f"dmapath.verbs.{m}" for m in ("backend.Verbs", "queue.Cq", "queue.Qp", "resources.Context",
                                        "resources.Pd", "resources.Mr", "resources.Mw")],
        "needs an RDMA device: tests/verbs",
    ),
}  # fmt: skip


#: Classes with the buffer protocol.
BUFFERS = {"dmapath.device.CoherentBuffer"}


def class_of(full: str) -> type:
    module, _, name = full.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def members(full: str) -> list[str]:
    """Public names of a class, and the special ones that use the object."""
    special = ("__enter__", "__exit__", "__iter__", "__next__", "__len__", "__getitem__", "__contains__", "__call__")
    out = [n for n in dir(class_of(full)) if not n.startswith("_")]
    out += [n for n in special if hasattr(class_of(full), n) and n != "__call__"]
    return [*out, "memoryview"] if full in BUFFERS else out


def use(w: World, life: Life, made: Any, name: str) -> object:
    """Call a member with plausible arguments, or read it."""
    if name == "memoryview":
        return memoryview(made).nbytes
    if name == "__exit__":
        return made.__exit__(None, None, None)
    got = getattr(made, name)
    method = callable(got)
    return got(*life.arguments.get(name, lambda w: ())(w)) if method else got  # type: ignore[no-untyped-call]


def prepare(full: str) -> tuple[World, Life, Any]:
    w, life = World(), LIVES[full]
    made = life.make(w)
    if hasattr(made, "run"):
        w.io = made.run(w.bio)
    return w, life, made


CASES = [(full, name) for full in LIVES for name in members(full)]


@pytest.mark.parametrize(("full", "name"), CASES, ids=[f"{f.rpartition('.')[2]}.{n}" for f, n in CASES])
def test_a_member_after_the_end(full: str, name: str) -> None:
    w, life, made = prepare(full)
    try:  # the arguments are such as a live one takes
        use(w, life, made, name)
    except DmaError as e:
        assert not isinstance(e, (StateError, TypeError)) or name in ("invalidate_end", "arrived"), e
    w, life, made = prepare(full)
    life.end(w, made)
    if name in life.allowed:
        use(w, life, made, name)
        return
    with pytest.raises(StateError):
        use(w, life, made, name)


@pytest.mark.parametrize("full", LIVES, ids=[f.rpartition(".")[2] for f in LIVES])
def test_calls_that_take_it_after_the_end(full: str) -> None:
    life = LIVES[full]
    for call in life.uses.values():
        w = World()
        made = life.make(w)
        life.end(w, made)
        with pytest.raises(StateError):
            call(w, made)


def test_every_class_with_an_end_is_here() -> None:
    _, classes = surface()
    found = set()
    for full, c in classes.items():
        bases = [f"{c.module}.{x}" for x in c.bases]
        names = set(c.methods).union(*(set(classes[b].methods) for b in bases if b in classes))
        if names & ENDINGS or "_Closing" in c.bases:
            found.add(full)
    known = {*LIVES, *ELSEWHERE}
    assert found <= known, f"say what becomes of it after its end: {sorted(found - known)}"
    assert known - found <= {"dmapath.device.IovaState", "dmapath.drivers.rnic.Pd"}, known - found


def test_every_call_that_takes_one_is_here() -> None:
    functions, classes = surface()
    calls = [*functions.values(), *(m for c in classes.values() for m in c.methods.values())]
    for full, life in LIVES.items():
        name = full.rpartition(".")[2]
        taking = {
            f.full for f in calls for p in f.parameters
            if name in [w.strip() for w in p.annotation.replace("|", " ").split()]
            and (f.module == full.rpartition(".")[0] or f.module in IMPORTERS.get(full, ()))
        }  # fmt: skip
        assert taking <= set(life.uses), (full, taking - set(life.uses))


#: Modules, beside its own, whose functions take such an object.
IMPORTERS = {"dmapath.drivers.rnic.Pd": ("dmapath.drivers.registered",)}


def test_allowed_names_exist() -> None:
    for full, life in LIVES.items():
        there = {*members(full), *vars(prepare(full)[2])} if full.endswith("Rblk") else set(members(full))
        assert set(life.allowed) <= there, (full, set(life.allowed) - there)
        assert set(life.arguments) <= there, full


def test_closed_registrations_refuse_to_map() -> None:
    w = World()
    keys = Registered(w.pd())
    dev = Device(memory=w.memory, backend=keys)
    keys.close()
    for call in (lambda: dev.map(w.bio), lambda: dev.map_phys(w.memory.phys(0), PAGE)):
        with pytest.raises(DmaError):
            call()


def test_odp_invalidations_go_in_pairs() -> None:
    w = World()
    region = OdpRegion(w.device, w.memory, 0, 4 * PAGE)
    with pytest.raises(StateError):
        region.invalidate_end()
    region.fault(0)
    region.invalidate_start(w.memory, 0, PAGE)
    region.invalidate_end()
    assert not region.is_mapped(0)
    region.fault(0)
    region.close()
