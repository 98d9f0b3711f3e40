"""Mutation testing of the code that maps: one change at a time, one extension rebuilt, its tests run.

Changes come from universalmutator's engine with the rules in ``mutate.rules``. A change is killed when a test fails, crashes
or hangs; what does not build is not counted. A change that lives gets a test, or a row in ``tests/mutants.toml`` with the
reason why it is equivalent. Results are kept in ``build/mutate/results.json``, so that a run that was stopped goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table
from universalmutator.mutator import mutants_regexp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "mutate"
TIMEOUT = 240  # seconds of one mutant's tests; what takes longer hangs
MEMORY = 8 << 30
_UNITS = ["kernel_rows", "model", "limits", "top", "every_back_end", "api", "unwinding", "swiotlb", "p2p"]
#: Source -> (extensions to rebuild, test files that speak of it, the quickest first).
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "dmapath/wrapper.pyx": (["wrapper"], ["six_cases", "real_bugs", *_UNITS, "matrix"]),
    "dmapath/backends/iommu.pyx": (["backends.iommu"], [*_UNITS, "coherent", "noncoherent", "debug", "real_bugs"]),
    "dmapath/backends/direct.pyx": (["backends.direct"],
                                    ["swiotlb", "xen", "noncoherent", "coherent", "every_back_end", "api"]),
    "dmapath/backends/grant.pyx": (["backends.grant"], ["xen", "every_back_end", "coherent"]),
    "dmapath/backends/base.pyx": (["backends.base"], ["abi", "api", "coherent", "door"]),
    "dmapath/backends/python.pyx": (["backends.python"], ["callbacks", "adversary", "door", "observe", "every_back_end"]),
    "dmapath/drivers/registered.pyx": (["drivers.registered"], ["rnic", "matrix"]),
    "ext/core/iova.c": (["backends.iommu"], ["iova_properties", "kernel_rows", "model", "top", "unwinding"]),
    "ext/core/pgtable.c": (["backends.iommu"], ["core", "kernel_rows", "model", "unwinding", "engine_memory"]),
    "ext/core/iotlb.c": (["backends.iommu"], ["kernel_rows", "model", "engine_memory", "observe", "every_back_end"]),
    "ext/core/domain.c": (["backends.iommu"], _UNITS),
    "ext/core/swiotlb.c": (["swiotlb"], ["core", "swiotlb", "every_back_end", "xen"]),
    "ext/core/mem.c": (["memory", "backends.iommu", "backends.direct", "backends.grant", "device", "hmm"],
                       ["engine_memory", "noncoherent", "every_back_end", "hmm"]),
}  # fmt: skip
console = Console()


@dataclass(frozen=True)
class Mutant:
    """One changed line of one file."""

    file: str
    line: int
    function: str  # and which of the lines that read alike in it
    before: str
    after: str

    @property
    def key(self) -> str:
        """What it is called, whatever its line number."""
        return f"{self.file} {self.function}: {self.before.strip()} => {self.after.strip()}"


def _code_lines(text: str) -> set[int]:
    """Line numbers outside docstrings."""
    inside, out = False, set()
    for i, line in enumerate(text.splitlines(), 1):
        if not inside and '"""' not in line:
            out.add(i)
        if line.count('"""') % 2:
            inside = not inside
    return out


def _functions(lines: list[str]) -> list[str]:
    """For each line the function it stands in, with a number where the same line stands there again."""
    out, seen, here = [], dict[tuple[str, str], int](), ""
    for line in lines:
        head = re.match(r"(?:    )?(?:[a-z].*?)?\b(\w+)\([^;]*$", line)
        if head and "=" not in line.split("(")[0] and not re.match(r"     |\s*(if|for|while)\b", line):
            here = head[1]
        n = seen[here, line.strip()] = seen.get((here, line.strip()), 0) + 1
        out.append(here if n == 1 else f"{here}#{n}")
    return out


def mutants_of(file: str) -> list[Mutant]:
    """Every change of a file that the rules know."""
    text = (ROOT / file).read_text()
    lines = text.splitlines(keepends=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = mutants_regexp(lines, ruleFiles=[str(ROOT / "scripts" / "mutate.rules")], ignorePatterns=[])
    code, functions = _code_lines(text), _functions(lines)
    return [Mutant(file, n, functions[n - 1], lines[n - 1], after) for n, after, _, _ in found if n in code]


def tree(worker: int) -> Path:
    """A copy of the sources for one worker, built without optimisation."""
    at = HOME / f"tree{worker}"
    if not at.exists():
        skip = shutil.ignore_patterns("build", ".venv*", ".git", "*.so", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, at, ignore=skip)
        _build(at, None)
    return at


def _build(at: Path, modules: list[str] | None) -> bool:
    env = dict(os.environ, DMAPATH_FLAGS="-O1 -g0")
    if modules is not None:
        env["DMAPATH_ONLY"] = ",".join(f"dmapath.{m}" for m in modules)
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=at, env=env, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if modules is None and done.returncode:
        raise SystemExit(f"the unchanged tree does not build:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _tests(at: Path, names: list[str]) -> str:
    """Say "lived", or how the tests noticed: "failed", "crashed", "hung"."""
    files = [f"tests/test_{n}.py" for n in names]
    env = dict(os.environ, PYTHONPATH=str(at), DMAPATH_STEPS=os.environ.get("DMAPATH_STEPS", "3000"), DMAPATH_SRC=str(at))
    cmd = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *files]
    with subprocess.Popen(cmd, cwd=at, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_limit,
                          start_new_session=True) as run:  # fmt: skip
        try:
            rc = run.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, 9)
            return "hung"
    if rc == 4:
        raise SystemExit(f"pytest does not know these tests: {' '.join(files)}")
    return "lived" if rc == 0 else "failed" if rc == 1 else "crashed"


def judge(m: Mutant, worker: int) -> str:
    """Build with the change and run the tests; the tree is as before afterwards."""
    at = tree(worker)
    source = at / m.file
    whole = source.read_text()
    lines = whole.splitlines(keepends=True)
    lines[m.line - 1] = m.after
    modules, tests = TARGETS[m.file]
    try:
        source.write_text("".join(lines))
        return _tests(at, tests) if _build(at, modules) else "no build"
    finally:
        source.write_text(whole)


def accepted() -> dict[str, str]:
    """The changes that are known to be equivalent, with the reason."""
    rows: list[dict[str, Any]] = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text()).get("equivalent", [])
    return {f"{r['file']} {r['function']}: {r['before']} => {r['after']}": r["why"] for r in rows}


def _chosen(files: tuple[str, ...], sample: int, seed: int) -> list[Mutant]:
    everything = [m for f in files or TARGETS for m in mutants_of(f)]
    random.Random(seed).shuffle(everything)
    return everything[: sample or None]


def _work(todo: list[Mutant], worker: int, workers: int, log: dict[str, str]) -> None:
    mine = todo[worker::workers]
    for m in track(mine, description=f"worker {worker}", console=Console(stderr=True), disable=worker > 0):
        log[m.key] = judge(m, worker)
        (HOME / "results.json").write_text(json.dumps(dict(log), indent=1))


@click.command()
@click.argument("files", nargs=-1, type=click.Choice(sorted(TARGETS)))
@click.option("--sample", default=100, show_default=True, help="Changes to try, at random; 0: all.")
@click.option("--seed", default=0, show_default=True, help="Of the choice.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Mutants at a time.")
@click.option("--fresh", is_flag=True, help="Forget earlier results and copies.")
def main(files: tuple[str, ...], sample: int, seed: int, workers: int, fresh: bool) -> None:
    """Change one place at a time in FILES (all that are known) and list the changes that no test notices.

    Exit 1 when one lives that tests/mutants.toml does not call equivalent.
    """
    if fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    kept = HOME / "results.json"
    log: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    chosen, known = _chosen(files, sample, seed), accepted()
    todo = [m for m in chosen if m.key not in log and m.key not in known]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for job in [pool.submit(_work, todo, i, workers, log) for i in range(workers)]:
            job.result()
    verdicts = [log.get(m.key, "equivalent") for m in chosen]
    table = Table("change", "what the tests said", title=f"{len(chosen)} changes", title_justify="left")
    alive = [m for m in chosen if log.get(m.key) == "lived" and m.key not in known]
    for m in alive:
        table.add_row(f"{m.file}:{m.line}\n- {m.before.strip()}\n+ {m.after.strip()}", "nothing", end_section=True)
    if alive:
        console.print(table, markup=False)
    counts = {v: verdicts.count(v) for v in sorted(set(verdicts))}
    console.print(", ".join(f"{n} {v}" for v, n in counts.items()))
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
