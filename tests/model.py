"""The reference model: a plain-Python IOMMU that must give the same addresses, errors and counts as the real one.

Written from the kernel reference for clarity alone: sorted lists and dictionaries, one thread, no caches beyond those
whose effect can be seen from outside.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

G = 4096
SIZES = (1 << 30, 1 << 21, 4096)
FQ_ENTRIES = 255
FQ_NS = 10_000_000


class ModelError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode[code])
        self.errno = code


def up(x: int) -> int:
    return (x + G - 1) & ~(G - 1)


def off(x: int) -> int:
    return x & (G - 1)


def order(n: int) -> int:
    return max(0, (n - 1).bit_length())


class Allocator:
    """Page frames, as drivers/iommu/iova.c hands them out, for one CPU."""

    LOW = 1 << 20  # frames below 4 GiB

    def __init__(self) -> None:
        self.anchor = [2**64 - 1, 2**64 - 1]
        self.nodes: list[list[int]] = [self.anchor]  # ascending
        self.cached = self.cached32 = self.anchor
        self.max32 = self.LOW
        self.loaded: list[list[int]] = [[] for _ in range(6)]
        self.prev: list[list[int]] = [[] for _ in range(6)]
        self.depot: list[list[list[int]]] = [[] for _ in range(6)]

    def _place(self, size: int, high: int, low: int, i: int) -> tuple[int, int]:
        """Walk down from node i; the place found and the index of the node above it."""
        align = ~((1 << order(size)) - 1)
        while True:
            high = min(high, self.nodes[i][0])
            at = (high - size) & align
            i -= 1
            if i < 0 or at > self.nodes[i][1] or at < low or high < size:
                return (at, i + 1) if high >= size and at >= low else (0, 0)

    def _tree(self, size: int, limit: int) -> int:
        if limit <= self.LOW and size >= self.max32:
            return 0
        start = self.cached32 if limit <= self.LOW else self.cached
        i = next(k for k, n in enumerate(self.nodes) if n is start)
        at, above = self._place(size, limit, 1, i)
        if not at and start[1] < limit:
            i = next(k for k, n in enumerate(self.nodes) if n[0] >= limit)
            at, above = self._place(size, limit, start[1] + 1, i)
        if not at:
            self.max32 = size
            return 0
        node = [at, at + size - 1]
        self.nodes.insert(above, node)
        if node[1] < self.LOW:
            self.cached32 = node
        else:
            self.cached = node
        return at

    def _give_back(self, pfn: int) -> None:
        i = next(k for k, n in enumerate(self.nodes) if n[0] == pfn)
        node, after = self.nodes[i], self.nodes[i + 1]
        if node is self.cached32 or (node[1] < self.LOW and node[0] >= self.cached32[0]):
            self.cached32 = after
        if node[0] < self.LOW:
            self.max32 = self.LOW
        if node[0] >= self.cached[0]:
            self.cached = after
        del self.nodes[i]

    def _cache_get(self, o: int, limit: int) -> int:
        if not self.loaded[o]:
            if self.prev[o]:
                self.loaded[o], self.prev[o] = self.prev[o], self.loaded[o]
            elif self.depot[o]:
                self.loaded[o] = self.depot[o].pop()
        mag = self.loaded[o]
        for i in reversed(range(len(mag))):
            if mag[i] <= limit:
                mag[i], mag[-1] = mag[-1], mag[i]
                return mag.pop()
        return 0

    def alloc(self, size: int, limit_pfn: int, flush: bool) -> int:
        o, limit = order(size), limit_pfn + 1
        if o < 6:
            if size < 32:
                size = 1 << o
            if limit > size and (pfn := self._cache_get(o, limit - size)):
                return pfn
        pfn = self._tree(size, limit)
        if not pfn and flush:
            for o in range(6):
                for mag in (self.loaded[o], self.prev[o], *self.depot[o]):
                    for p in mag:
                        self._give_back(p)
                self.loaded[o], self.prev[o], self.depot[o] = [], [], []
            pfn = self._tree(size, limit)
        return pfn

    def free(self, pfn: int, size: int) -> None:
        o = order(size)
        if o >= 6:
            self._give_back(pfn)
            return
        if len(self.loaded[o]) == 127:
            if len(self.prev[o]) < 127:
                self.loaded[o], self.prev[o] = self.prev[o], self.loaded[o]
            else:
                self.depot[o].append(self.loaded[o])
                self.loaded[o] = []
        self.loaded[o].append(pfn)


class Table:
    """Leaves by start: {iova: (phys, bytes)}; generic_pt's rules."""

    def __init__(self) -> None:
        self.leaf: dict[int, tuple[int, int]] = {}

    def find(self, iova: int) -> tuple[int, int, int] | None:
        for size in SIZES:
            start = iova & ~(size - 1)
            got = self.leaf.get(start)
            if got is not None and got[1] == size:
                return start, *got
        return None

    def translate(self, iova: int) -> int | None:
        got = self.find(iova)
        return None if got is None else got[1] + iova - got[0]

    def _busy(self, iova: int, size: int) -> bool:
        if self.find(iova) is not None:
            return True
        if size == G:
            return False
        return any(iova <= start < iova + size for start in self.leaf)

    def map(self, iova: int, phys: int, size: int) -> list[int]:
        """Leaf sizes written. Raises with nothing changed."""
        if not size:
            raise ModelError(errno.EINVAL)
        done: list[tuple[int, int]] = []
        at, left = iova, size
        while left:
            page = next((s for s in SIZES if s <= left and not (at | phys) & (s - 1)), 0)
            if not page or self._busy(at, page):
                for start, _ in done:
                    del self.leaf[start]
                raise ModelError(errno.EADDRINUSE if page else errno.ENXIO)
            self.leaf[at] = (phys, page)
            done.append((at, page))
            at, phys, left = at + page, phys + page, left - page
        return [page for _, page in done]

    def unmap(self, iova: int, size: int) -> tuple[int, list[int]]:
        done, pages = 0, []
        while done < size:
            got = self.find(iova + done)
            if got is None or got[0] != iova + done:
                break
            del self.leaf[got[0]]
            pages.append(got[2])
            done += got[2]
        return done, pages


@dataclass
class State:
    addr: int
    size: int


@dataclass
class Counts:
    iova_allocs: int = 0
    iova_frees: int = 0
    iova_live_bytes: int = 0
    links: int = 0
    syncs: int = 0
    unlinks: int = 0
    maps: int = 0
    unmaps: int = 0
    ptes: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    cleared: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    invalidations_ranged: int = 0
    invalidations_full: int = 0

    def to_dict(self) -> dict[str, int]:
        names = {4096: "4k", 1 << 21: "2m", 1 << 30: "1g"}
        live = {s: self.ptes[s] - self.cleared[s] for s in SIZES}
        return {
            **{k: v for k, v in vars(self).items() if isinstance(v, int)},
            "iova_live": self.iova_allocs - self.iova_frees,
            "invalidations": self.invalidations_ranged + self.invalidations_full,
            **{f"ptes_{n}": self.ptes[s] for s, n in names.items()},
            **{f"ptes_{n}_live": live[s] for s, n in names.items()},
            "mapped_bytes": sum(s * n for s, n in live.items()),
        }


class Device:
    """One coherent, trusted device behind an x86 IOMMU."""

    def __init__(self, *, mask: int = 2**64 - 1, lazy: bool = False, forcedac: bool = False) -> None:
        self.mask, self.lazy = mask, lazy
        self.try_low = not forcedac
        self.iova, self.table, self.count = Allocator(), Table(), Counts()
        self.now, self.deadline = 0, 0
        self.queue: list[tuple[int, int]] = []

    # ---- IOVA

    def _alloc(self, size: int, inside: int = 0) -> int:
        """An IOVA; `inside`: where in it a mapping begins that must not be at all ones (DMA_MAPPING_ERROR)."""
        pages, pfn = size // G, 0
        if self.mask > 2**32 - 1 and self.try_low:
            pfn = self.iova.alloc(pages, (2**32 - 1) // G, False)
            self.try_low = bool(pfn)
        pfn = pfn or self.iova.alloc(pages, self.mask // G, True)
        if pfn:
            self.count.iova_allocs += 1
            self.count.iova_live_bytes += size
        if pfn * G + inside == 2**64 - 1:
            other = self._alloc(size)
            self._free(pfn * G, size)
            return other
        return pfn * G

    def _free(self, iova: int, size: int) -> None:
        self.iova.free(iova // G, size // G)
        self.count.iova_frees += 1
        self.count.iova_live_bytes -= size

    # ---- two steps

    def iova_try_alloc(self, phys: int, size: int) -> State | None:
        iova = self._alloc(up(size + off(phys))) if size else 0
        return State(iova + off(phys), size) if iova else None

    def _map(self, *links: tuple[int, int, int]) -> None:
        """Map (iova, phys, bytes) each, all or none of them."""
        written: list[int] = []
        for i, (iova, phys, size) in enumerate(links):
            try:
                written += self.table.map(iova, phys, size)
            except ModelError:
                for start, _, n in links[:i]:
                    self.table.unmap(start, n)
                raise
        for page in written:
            self.count.ptes[page] += 1

    def _unmap(self, iova: int, size: int) -> int:
        done, pages = self.table.unmap(iova, size)
        for page in pages:
            self.count.cleared[page] += 1
        return done

    def iova_link(self, st: State, phys: int, offset: int, size: int) -> None:
        if off(phys) and offset:
            raise ModelError(errno.EIO)
        if offset + size > st.size:
            raise ModelError(errno.ERANGE)
        self._map((st.addr + offset - off(phys), phys - off(phys), up(size + off(phys))))
        self.count.links += 1

    def iova_sync(self, st: State, offset: int, size: int) -> None:
        if offset + size > st.size:
            raise ModelError(errno.ERANGE)
        self.count.syncs += 1

    def iova_unlink(self, st: State, offset: int, size: int) -> None:
        if offset + size > st.size:
            raise ModelError(errno.ERANGE)
        at = st.addr + offset
        span = up(size + off(at))
        done = self._unmap(at - off(at), span)
        self.count.invalidations_ranged += bool(done)
        self.count.unlinks += 1
        if done != span:
            raise ModelError(errno.ENOENT)

    def iova_free(self, st: State) -> None:
        self._free(st.addr - off(st.addr), up(st.size + off(st.addr)))

    def iova_destroy(self, st: State, mapped: int) -> None:
        wrong = None
        if mapped:
            try:
                self.iova_unlink(st, 0, mapped)
            except ModelError as e:
                wrong = e
        self.iova_free(st)
        if wrong is not None:
            raise wrong

    # ---- classic

    def map_phys(self, phys: int, size: int) -> int:
        span = up(size + off(phys))
        iova = self._alloc(span, off(phys))
        if not iova:
            raise ModelError(errno.ENOMEM)
        try:
            self._map((iova, phys - off(phys), span))
        except ModelError:
            self._free(iova, span)
            raise ModelError(errno.ENOMEM) from None
        self.count.maps += 1
        return iova + off(phys)

    def unmap_phys(self, addr: int, size: int) -> None:
        if self.table.translate(addr) is None:
            raise ModelError(errno.ENOENT)
        span = up(size + off(addr))
        done = self._unmap(addr - off(addr), span)
        if self.lazy:
            if len(self.queue) == FQ_ENTRIES:
                self.flush()
            self.queue.append((addr - off(addr), span))
            self.deadline = self.deadline or self.now + FQ_NS
        else:
            self.count.invalidations_ranged += bool(done)
            self._free(addr - off(addr), span)
        self.count.unmaps += 1
        if done != span:
            raise ModelError(errno.ENOENT)

    def flush(self) -> None:
        self.count.invalidations_full += 1
        for iova, span in self.queue:
            self._free(iova, span)
        self.queue = []

    def advance(self, ns: int) -> None:
        self.now += ns
        if self.deadline and self.deadline <= self.now:
            self.deadline = 0
            self.flush()

    # ---- requests

    def map(self, vecs: list[tuple[int, int]], policy: str) -> Mapping:
        merged = merge(vecs)
        if policy == "linux":  # looks at the bvecs as given
            return self._in_one(merged, "linear") if fits(vecs) else self._each(merged)
        return self._in_one(merged, "linear" if fits(merged) else "gapped")

    def _in_one(self, vecs: list[tuple[int, int]], layout: str) -> Mapping:
        linear = layout == "linear"
        total = sum(n if linear else up(n + off(p)) for p, n in vecs)
        st = self.iova_try_alloc(vecs[0][0] if linear else 0, total)
        if st is None:
            return self._each(vecs)
        at, links = st.addr - off(st.addr), []
        segments: list[tuple[int, int]] = []
        for p, n in vecs:
            span = up(n + off(p))
            links.append((at, p - off(p), span))
            if segments and sum(segments[-1]) == at + off(p):  # they meet on a granule
                segments[-1] = (segments[-1][0], segments[-1][1] + n)
            else:
                segments.append((at + off(p), n))
            at += span
        try:
            self._map(*links)
        except ModelError:
            self.iova_free(st)
            raise
        self.count.links += len(vecs)
        self.iova_sync(st, 0, total)
        return Mapping(self, layout, [(st.addr, total)] if linear else segments, st)

    def _each(self, vecs: list[tuple[int, int]]) -> Mapping:
        m = Mapping(self, "per-range", [])
        for p, n in vecs:
            try:
                m.segments.append((self.map_phys(p, n), n))
            except ModelError:
                m.unmap()
                raise
        return m


def fits(vecs: list[tuple[int, int]]) -> bool:
    """Only the first begins and only the last ends inside a granule."""
    return not any(off(p) for p, _ in vecs[1:]) and not any(off(p + n) for p, n in vecs[:-1])


def merge(vecs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Physically adjacent vectors join (blk_map_iter_next without limits)."""
    out: list[tuple[int, int]] = []
    for p, n in vecs:
        if out and out[-1][0] + out[-1][1] == p:
            out[-1] = (out[-1][0], out[-1][1] + n)
        else:
            out.append((p, n))
    return out


@dataclass
class Mapping:
    dev: Device
    layout: str
    segments: list[tuple[int, int]]
    state: State | None = None

    def unmap(self) -> None:
        if self.state is not None:
            self.dev.iova_destroy(self.state, self.state.size)
        else:
            for addr, n in self.segments:
                self.dev.unmap_phys(addr, n)
