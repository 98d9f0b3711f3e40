"""Boot a guest, run one command in it, stream what it prints, and give its exit status."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from dmapath.errors import DmaError, DmaValueError, NoMemoryError, NotSupportedError
from dmapath.guest.image import RXE_UP, find_kernel, initramfs
from dmapath.guest.packages import find_tool

__all__ = ["ADDRESSES", "GuestError", "Result", "kvm_usable", "run", "run_pair"]

#: Of a guest, and of the other one of a pair.
ADDRESSES = ("10.10.0.1", "10.10.0.2")

IOMMU = {
    "strict": "intel_iommu=on iommu.strict=1",
    "lazy": "intel_iommu=on iommu.strict=0",
    "passthrough": "intel_iommu=on iommu=pt",
}
#: Environment that a guest's command gets from here.
_KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "PYTHONHASHSEED", "LD_PRELOAD")
#: A KVM guest that has not booted by then never will (nested KVM that does not work); emulation is tried instead.
KVM_BOOT_S = 20.0

Sink = Callable[[bytes], None]


class GuestError(DmaError):
    """The guest itself failed: it did not boot, stopped without an answer, or ran past its time."""

    default_errno = 5


class Result(NamedTuple):
    """How a run ended: the command's exit status, seconds in all and until the guest had booted, and what the kernel
    said.
    """

    status: int
    seconds: float
    boot_seconds: float
    accel: str
    console: str


def kvm_usable() -> bool:
    """Whether this processor and this user can use KVM; whether a guest then boots only a boot can tell."""
    with contextlib.suppress(OSError):
        has = re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M)
        return has is not None and os.access("/dev/kvm", os.R_OK | os.W_OK)
    return False


def _check_memory(mib: int) -> None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    if found and int(found[1]) >> 10 < mib:
        raise NoMemoryError(f"the guest wants {mib} MiB, and {int(found[1]) >> 10} are free", argument="memory", value=mib)


def _job(command: Sequence[str], cwd: str, env: Mapping[str, str], *, rxe: str) -> str:
    lines = [f"export {k}={shlex.quote(v)}" for k, v in env.items()]
    lines.append("export PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin")
    if rxe:
        lines.append(rxe)
    lines += [f"cd {shlex.quote(cwd)} || exit 126", f"exec {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


def _forward(fd: int) -> Sink:
    def sink(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return sink


def run(
    command: Sequence[str], *, kernel: str = "6.1", rxe: bool = False, nvme: bool = False, iommu: str | None = None,
    share: str | None = None, cwd: str | None = None, env: Mapping[str, str] | None = None, memory: int = 1024,
    cpus: int = 2, timeout: float = 600.0, icount: bool = False, cable: tuple[str, str] | None = None, side: int = 0,
    out: Sink | None = None, err: Sink | None = None, stop: threading.Event | None = None,
) -> Result:  # fmt: skip
    """Run a command in a throw-away guest and wait for it.

    Parameters
    ----------
    command : sequence of str
        Program and arguments; found on this PATH, since the guest's files are this machine's (read-only).
    kernel : "6.1", "7.3" or a path
        From the cache (``prepare``), or any bzImage with its modules.
    rxe, nvme, iommu : bool, bool, "strict" | "lazy" | "passthrough" | None
        Soft-RoCE up on a dummy interface (10.10.0.1); an emulated NVMe disk; an emulated Intel IOMMU.
    share : str or None
        A folder that the command may write to; everything else but /run, /mnt and TMPDIR is read-only.
    cwd, env : str or None, mapping
        Where the command starts (None: here), and more environment for it.
    memory, cpus : int
        MiB and processors.
    timeout : float
        Seconds after which the guest is ended and GuestError raised.
    icount : bool
        The guest's clock counts instructions (1000 to the microsecond), so that its timings repeat; one processor.
    cable, side : (str, str), 0 or 1
        Sockets of this guest's and another's network card, and which of ADDRESSES is its own: see ``run_pair``.
    out, err : callable(bytes)
        Where the command's output goes; None: to this process's own.
    stop : threading.Event or None
        Set by another thread, it ends the guest within a second.

    Raises GuestError where the guest does not boot, dies or runs past its time; NotSupportedError, NoMemoryError and
    DmaValueError where it cannot be started. No process is left behind in any case.

    """
    if not command:
        raise DmaValueError("a command to run", argument="command", value=command)
    if iommu is not None and iommu not in IOMMU:
        raise DmaValueError("strict, lazy or passthrough", argument="iommu", value=iommu)
    if share is not None and (not os.path.isdir(share) or "," in share or "'" in share):
        raise DmaValueError("a folder, without a comma or quote in its name", argument="share", value=share)
    qemu = find_tool("qemu-system-x86_64")
    if qemu is None:
        raise NotSupportedError("no QEMU: apt-get install qemu-system-x86, or dmapath guest prepare as root")
    _check_memory(memory)
    found = find_kernel(kernel)
    assert found is not None
    share = os.path.realpath(share) if share else ""
    environ = {k: os.environ[k] for k in _KEPT if k in os.environ}
    environ |= {k: v for k, v in os.environ.items() if k.startswith("DMAPATH_") and k != "DMAPATH_CACHE"}
    environ |= {"HOME": "/run/home", "TMPDIR": "/mnt/tmp", "PYTHONDONTWRITEBYTECODE": "1", "DMAPATH_GUEST": found.release}
    environ |= {"DMAPATH_ICOUNT": "1"} if icount else {}
    up = RXE_UP.format(dev="eth0" if cable else "dummy0", address=ADDRESSES[side]) if rxe else ""
    job = _job(command, cwd or os.getcwd(), {**environ, **(env or {})}, rxe=up)
    load = " ".join(kind for kind, on in (("net", cable), ("rxe", rxe), ("nvme", nvme)) if on)
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="dmapath-guest-") as scratch:
        first = Path(scratch) / "initramfs"
        first.write_bytes(initramfs(found, job, {"LOAD": load, "SHARE": share}))
        arguments = ["-kernel", str(found.image), "-initrd", str(first), "-m", f"{memory}M",
                     "-smp", "1" if icount else str(cpus)]
        arguments += _shares(share)
        append = "console=ttyS0 quiet loglevel=4 panic=-1 " + IOMMU.get(iommu or "", "")
        if iommu:
            arguments += ["-device", "intel-iommu,intremap=on,caching-mode=off"]
        if nvme:
            disk = Path(scratch) / "nvme.img"
            with disk.open("wb") as f:
                f.truncate(64 << 20)
            arguments += ["-drive", f"file={disk},if=none,id=n0,format=raw",
                          "-device", "nvme,serial=dmapath,drive=n0,mdts=8"]  # fmt: skip
        if cable:
            arguments += ["-netdev",
                          f"dgram,id=n,local.type=unix,local.path={cable[0]},remote.type=unix,remote.path={cable[1]}",
                          "-device", f"virtio-net-pci,netdev=n,mac=52:54:00:10:10:0{side + 1}"]  # fmt: skip
        arguments += ["-append", append]
        machine = _Machine(qemu, arguments, scratch, out or _forward(1), err or _forward(2), timeout, stop)
        if kvm_usable() and not icount:
            result = machine.boot("kvm", boot_limit=KVM_BOOT_S)
            if result is not None:
                return result
        result = machine.boot("tcg", icount=icount)
        assert result is not None
        return result


def run_pair(command: Sequence[str], *, out: Sink | None = None, **options: Any) -> tuple[Result, Result]:
    """Run the same command in two guests at once, joined by one network cable. The command is told by DMAPATH_SIDE (0 or 1)
    which it is and by DMAPATH_PEER where the other one is; what it prints comes line by line, with its side in front.
    ``options`` are those of ``run``. Raises what ``run`` raises; the other guest is ended too then.
    """
    whole = threading.Lock()
    stop = threading.Event()
    to = out or _forward(1)

    def one(side: int) -> Result:
        rest = {"out": b"", "err": b""}

        def sink(name: str) -> Sink:
            def take(data: bytes) -> None:
                *lines, rest[name] = (rest[name] + data).split(b"\n")
                with whole:
                    for line in lines:
                        to(b"%d| %s\n" % (side, line))

            return take

        env = {**(options.get("env") or {}), "DMAPATH_SIDE": str(side), "DMAPATH_PEER": ADDRESSES[1 - side]}
        try:
            result = run(command, **{**options, "env": env}, cable=(sockets[side], sockets[1 - side]), side=side,
                         out=sink("out"), err=sink("err"), stop=stop)  # fmt: skip
        except BaseException:
            stop.set()
            raise
        for name, left in rest.items():
            if left:  # a last line without its end
                sink(name)(b"\n")
        return result

    with tempfile.TemporaryDirectory(prefix="dmapath-cable-") as folder, ThreadPoolExecutor(2) as both:
        sockets = [f"{folder}/{side}" for side in (0, 1)]
        first, second = (both.submit(one, side) for side in (0, 1))
        try:
            # now and then, since a signal that another thread gets does not wake this one, which alone may handle it
            while not all(f.done() for f in (first, second)) and not stop.is_set():
                wait((first, second), timeout=0.2, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C, SIGTERM
            stop.set()
            raise
        for failed in (first, second):  # the one that failed by itself, before the one that was ended for it
            if failed.done() and failed.exception() is not None and "from outside" not in str(failed.exception()):
                failed.result()
        return first.result(), second.result()


def _shares(share: str) -> list[str]:
    out = []
    for tag, path, mode in (("root", "/", ",readonly=on"), *((("share", share, ""),) if share else ())):
        out += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{mode}",
                "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]  # fmt: skip
    return out


class _Machine:
    """One QEMU process at a time."""

    def __init__(self, qemu: str, arguments: list[str], scratch: str, out: Sink, err: Sink, timeout: float,
                 stop: threading.Event | None) -> None:  # fmt: skip
        self.qemu, self.arguments, self.scratch = qemu, arguments, scratch
        self.sinks = {"out": out, "err": err}
        self.timeout, self.stop = timeout, stop

    def boot(self, accel: str, *, boot_limit: float | None = None, icount: bool = False) -> Result | None:
        """Boot and wait; None where it did not boot within boot_limit."""
        how = ["-accel", "kvm", "-cpu", "host"] if accel == "kvm" else [
            "-accel", f"tcg,thread={'single' if icount else 'multi'}", "-cpu", "max"]  # fmt: skip
        if icount:
            how += ["-icount", "shift=0,sleep=off"]
        console = Path(self.scratch) / "console"
        words = [self.qemu, "-nodefaults", "-no-user-config", "-machine", "q35", *how, "-display", "none", "-no-reboot",
                 "-serial", f"file:{console}", "-monitor", "none", "-device", "virtio-rng-pci", "-device",
                 "virtio-serial-pci"]  # fmt: skip
        pipes = {name: os.pipe() for name in ("out", "err", "status")}
        for name, (_, write) in pipes.items():
            words += ["-chardev", f"file,id={name},path=/proc/self/fd/{write}",
                      "-device", f"virtserialport,chardev={name},name={name}"]  # fmt: skip
        # QEMU must not outlive this process, however it ends
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        start = time.monotonic()
        process = subprocess.Popen([*guard, *words, *self.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, pass_fds=[w for _, w in pipes.values()])  # fmt: skip
        for _, write in pipes.values():
            os.close(write)
        try:
            status, booted = self._pump(process, {n: r for n, (r, _) in pipes.items()}, start, boot_limit)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            _, said = process.communicate()
            for read, _ in pipes.values():
                os.close(read)
        seconds = time.monotonic() - start
        kernel_said = console.read_text(errors="replace").replace("\r", "") if console.exists() else ""
        if status is not None:
            return Result(status, seconds, booted or 0.0, accel, kernel_said)
        if booted is None and boot_limit is not None:
            return None
        if seconds >= self.timeout:
            raise GuestError(f"ended after {self.timeout:.0f} s, the time limit", errno=110)
        words_of = said.decode(errors="replace").strip() or kernel_said[-1500:].strip() or "it said nothing"
        if "cannot set up guest memory" in words_of or "Cannot allocate memory" in words_of:
            raise NoMemoryError("no memory for the guest", argument="memory", value=words_of)
        raise GuestError(
            f"the guest stopped without an answer ({'after' if booted else 'before'} it had booted): {words_of}"
        )

    def _pump(
        self, process: subprocess.Popen[bytes], reads: dict[str, int], start: float, boot_limit: float | None
    ) -> tuple[int | None, float | None]:
        """(exit status or None, seconds until it had booted or None)."""
        status, booted, told = None, None, b""
        with selectors.DefaultSelector() as select:
            for name, fd in reads.items():
                select.register(fd, selectors.EVENT_READ, name)
            while select.get_map():
                if self.stop is not None and self.stop.is_set():
                    raise GuestError("ended from outside")
                passed = time.monotonic() - start
                limit = self.timeout if booted is not None or boot_limit is None else min(boot_limit, self.timeout)
                if passed >= limit:
                    break
                for key, _ in select.select(min(limit - passed, 1.0)):
                    data = os.read(key.fd, 65536)
                    if not data:
                        select.unregister(key.fd)
                    elif key.data != "status":
                        self.sinks[key.data](data)
                    else:
                        told += data
                        if booted is None and b"booted" in told:
                            booted = time.monotonic() - start
                        answer = re.search(rb"rc (\d+)\n", told)
                        status = int(answer[1]) if answer else None
        return status, booted
