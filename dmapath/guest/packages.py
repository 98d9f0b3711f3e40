"""What a guest is made of, fetched through the machine's own apt into a cache folder: signatures are apt's business, and
nothing of a kernel is installed.

apt gets a state folder of its own in the cache, so that it works without root and leaves the machine's lists as they are. A
suite that the machine does not follow is reached by the machine's own sources with another suite name.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from dmapath.errors import DmaError, NotSupportedError

__all__ = ["Progress", "cache_dir", "missing_packages"]

#: What is shown while something is fetched: (text, bytes so far, bytes in all).
Progress = Callable[[str, int, int], None]

#: Debian package -> what shows that it is there.
GUEST_TOOLS = {"qemu-system-x86": "qemu-system-x86_64", "busybox-static": "busybox"}
RXE_TOOLS = {"iproute2": "rdma", "ibverbs-providers": "/usr/lib/x86_64-linux-gnu/libibverbs"}


def cache_dir() -> Path:
    """Where kernels and downloads are kept: DMAPATH_CACHE, or dmapath in the user's cache folder."""
    own = os.environ.get("DMAPATH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmapath"


def _there(sign: str) -> bool:
    return os.path.exists(sign) if sign.startswith("/") else find_tool(sign) is not None


def find_tool(name: str) -> str | None:
    """A program on the PATH, in the system's own folders, or unpacked in the cache."""
    unpacked = cache_dir() / "tools" / "bin"
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin:{unpacked}")


def missing_packages(*, rxe: bool = True) -> list[str]:
    """Debian packages that a guest needs and the machine lacks."""
    wanted = GUEST_TOOLS | (RXE_TOOLS if rxe else {})
    return [package for package, sign in wanted.items() if not _there(sign)]


class Apt:
    """apt with a state of its own, over the machine's sources, in another suite where one is named."""

    def __init__(self, suite: str = "", kernel: str = "") -> None:
        if shutil.which("apt-get") is None:
            raise NotSupportedError(
                "kernels are fetched by apt-get, which this machine lacks: give --kernel a path",
                argument="kernel",
                value=kernel,
            )
        self.state = cache_dir() / "apt" / (suite or "own")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        self.options = ["-o", f"Dir::State::lists={self.state}/lists", "-o", f"Dir::Cache={self.state}/cache",
                        "-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User=", "-o",
                        "Acquire::Languages=none"]  # fmt: skip
        if suite:
            self.options += self._other_suite(suite)

    def _other_suite(self, suite: str) -> list[str]:
        wanted = []
        for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                wanted += list(sources_in(path.read_text(), suite))
        if not wanted:
            raise NotSupportedError(
                f"the machine has no Debian source from which {suite} could be reached", argument="kernel", value=suite
            )
        path = self.state / "sources.sources"
        path.write_text("\n\n".join(wanted) + "\n")
        return ["-o", f"Dir::Etc::sourcelist={path}", "-o", "Dir::Etc::sourceparts=/dev/null"]

    def call(self, *args: str, cwd: Path | None = None) -> str:
        """Run apt-get or apt-cache; its output, or a DmaError with apt's own words."""
        done = subprocess.run([args[0], *self.options, *args[1:]], cwd=cwd, text=True, capture_output=True, check=False,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})  # fmt: skip
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["it said nothing"]
            raise DmaError(f"{args[0]} {args[1]} failed: {_hide_hosts(' '.join(words))}", errno=5)
        return done.stdout

    def update(self, progress: Progress, *, again: bool = False) -> None:
        """Fetch the lists, unless they are there."""
        if again or not list((self.state / "lists").glob("*Packages*")):
            progress("package lists", 0, 0)
            self.call("apt-get", "-q", "update")

    def newest(self, pattern: str) -> str:
        """The newest package whose name matches."""
        names = [n for n in self.call("apt-cache", "pkgnames").split() if re.fullmatch(pattern, n)]
        if not names:
            raise NotSupportedError("no such kernel in the machine's package sources", argument="kernel", value=pattern)
        return max(names, key=lambda n: [int(x) for x in re.findall(r"\d+", n)])

    def fetch(self, packages: list[str], progress: Progress) -> list[Path]:
        """Download packages, which apt checks against the signed lists, without installing them."""
        where = self.state / "debs"
        where.mkdir(exist_ok=True)
        uris = re.findall(r"^'\S+' (\S+) (\d+)", self.call("apt-get", "--print-uris", "download", *packages), re.M)
        total = sum(int(size) for _, size in uris)
        text = f"{', '.join(packages)}: {total / 1e6:.0f} MB"
        process = subprocess.Popen(["apt-get", *self.options, "-q", "download", *packages], cwd=where, text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                progress(text, min(total, sum(f.stat().st_size for f in where.iterdir())), total)
        finally:
            process.kill()
            _, words = process.communicate()
        if process.returncode:
            raise DmaError(f"apt-get download failed: {_hide_hosts(words.strip())}", errno=5)
        return [where / name for name, _ in uris]


def _hide_hosts(text: str) -> str:
    return re.sub(r"https?://\S+", "(the machine's mirror)", text)


def sources_in(text: str, suite: str) -> Iterator[str]:
    """A source in deb822 form for each Debian main archive that a sources file names, in another suite."""

    def stanza(uri: str, key: str | None) -> str:
        signed = f"\nSigned-By: {key}" if key else ""
        return f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main{signed}"

    for line in re.finditer(r"^deb\s+(?:\[([^]]*)\]\s*)?(\S+/debian/?)\s", text, re.M):
        signed_by = re.search(r"signed-by=(\S+)", line[1] or "")
        yield stanza(line[2], signed_by[1] if signed_by else None)
    for part in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", part, re.M))
        uris = [u for u in fields.get("URIs", "").split() if re.search(r"/debian/?$", u)]
        if "deb" in fields.get("Types", "").split() and uris:
            yield stanza(uris[0], fields.get("Signed-By"))


def unpack(deb: Path, into: Path) -> None:
    """A package's files, without installing it."""
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", str(deb), str(into)], check=True)


def check_room(where: Path, wanted: int) -> None:
    """NoSpace before a download begins, and not in its midst."""
    free = shutil.disk_usage(where).free
    if free < wanted:
        raise DmaError(f"{wanted >> 20} MB are wanted in {where}, which has {free >> 20}", errno=28)


def install(packages: list[str], progress: Progress) -> None:
    """Install packages where that is allowed; what can be used unpacked is unpacked instead; else say what to do."""
    if not packages:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        progress(f"installing {', '.join(packages)}", 0, 0)
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-q", "update"], check=False, env=env, **quiet)  # type: ignore[call-overload]
        done = subprocess.run(["apt-get", "-q", "install", "-y", "--no-install-recommends", *packages], check=False, env=env,
                              **quiet)  # type: ignore[call-overload]  # fmt: skip
        if done.returncode:
            raise DmaError(f"apt-get install failed: {_hide_hosts(done.stderr.strip().splitlines()[-1])}", errno=5)
        return
    if packages == ["busybox-static"]:
        apt = Apt()
        apt.update(progress)
        unpack(apt.fetch(packages, progress)[0], cache_dir() / "tools")
        return
    raise NotSupportedError(f"missing: {', '.join(packages)}. As root: apt-get install {' '.join(packages)}")
