"""Guests as a user runs them: output, exit status, time limits, errors, and no process left.

Needs QEMU and a kernel in the cache: `dmapath guest prepare` brings both, as scripts/test does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmapath import DmaError, DmaValueError, NoMemoryError, NotSupportedError
from dmapath.guest import GuestError, find_kernel, missing_packages, packages, run
from dmapath.guest.image import archive
from dmapath.guest.packages import Apt

DMAPATH = [sys.executable, "-m", "dmapath.cli"]


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    assert not missing_packages(), "run `dmapath guest prepare` first"
    assert find_kernel("6.1", missing_ok=True), "run `dmapath guest prepare` first"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's guests keep their files, by which they are known among the machine's processes."""
    where = tmp_path / "scratch"
    where.mkdir()
    monkeypatch.setenv("TMPDIR", str(where))
    monkeypatch.setattr("tempfile.tempdir", str(where))
    return where


def guests(scratch: Path) -> list[int]:
    """QEMU processes of a test, by pid."""
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            words = (p / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"qemu-system" in w for w in words[:5]) and any(str(scratch).encode() in w for w in words):
            out.append(int(p.name))
    return out


def wait_until(true: object, seconds: float = 20.0) -> bool:
    assert callable(true)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_a_command_runs_with_the_same_python_folder_and_arguments(tmp_path: Path, scratch: Path) -> None:
    """Its output on both streams byte for byte, its status, its share and nothing else to write to, in one boot."""
    code = """
import os, sys, pathlib, dmapath
sys.stdout.write("out: " + " ".join(sys.argv[1:]) + "\\n")
sys.stderr.write("err: " + os.getcwd() + "\\n")
sys.stdout.flush()
sys.stdout.buffer.write(bytes(range(256)) * 400)
pathlib.Path(sys.argv[1], "written").write_text(os.uname().release + " " + os.environ["MINE"])
for where in ("/usr/x", os.getcwd() + "/x", "/root/x"):
    try:
        open(where, "w")
        sys.exit("wrote to " + where)
    except OSError:
        pass
open(os.environ["TMPDIR"] + "/x", "w")
disk = pathlib.Path("/sys/block/nvme0n1/size").read_text()
groups = len(os.listdir("/sys/kernel/iommu_groups"))
sys.exit(7 if int(disk) == (64 << 20) // 512 and groups else 1)
"""
    out, err = bytearray(), bytearray()
    command = [sys.executable, "-c", code, str(tmp_path), "a b", "$c;'"]
    result = run(command, nvme=True, iommu="strict", share=str(tmp_path), env={"MINE": "it's"}, timeout=120, out=out.extend,
                 err=err.extend)  # fmt: skip
    assert result.status == 7, bytes(err)
    assert out == f"out: {tmp_path} a b $c;'\n".encode() + bytes(range(256)) * 400
    assert err == f"err: {os.getcwd()}\n".encode()
    kernel = find_kernel("6.1")
    assert kernel is not None
    assert (tmp_path / "written").read_text() == f"{kernel.release} it's"
    assert 0 < result.boot_seconds < result.seconds
    assert guests(scratch) == []
    assert not list(scratch.iterdir())


def test_the_command_line(tmp_path: Path) -> None:
    words = ["guest", "run", "--memory", "256", "--", "sh", "-c", "echo hello; echo oops >&2; exit 3"]
    done = subprocess.run([*DMAPATH, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "hello\n", "oops\n")
    done = subprocess.run([*DMAPATH, "guest", "prepare"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("ready: kernel 6.1.")


def test_the_time_limit_ends_it(scratch: Path) -> None:
    with pytest.raises(GuestError, match="the time limit") as e:
        run(["sleep", "600"], memory=256, timeout=8)
    assert e.value.errno == 110
    assert guests(scratch) == []


def test_kill_9_leaves_no_guest(scratch: Path) -> None:
    child = subprocess.Popen([*DMAPATH, "guest", "run", "--memory", "256", "--", "sleep", "600"])
    assert wait_until(lambda: guests(scratch))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert wait_until(lambda: not guests(scratch))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("number", [1, 2])
def test_being_ended_leaves_nothing(how: signal.Signals, number: int, scratch: Path) -> None:
    """One guest, or a pair."""
    words = ["guest", "run", *(["--pair"] if number == 2 else []), "--memory", "256", "--", "sleep", "600"]
    # a test run in the background may have inherited that SIGINT is ignored
    child = subprocess.Popen([*DMAPATH, *words], stderr=subprocess.DEVNULL,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert wait_until(lambda: len(guests(scratch)) == number)
    child.send_signal(how)
    assert child.wait(20) == 128 + how
    assert wait_until(lambda: not guests(scratch))
    assert not list(scratch.iterdir())


def test_a_guest_that_dies_says_so() -> None:
    with pytest.raises(GuestError, match="stopped without an answer"):
        run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 60"], memory=256, timeout=60)


def test_what_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[Callable[[], object], type[DmaError], str]] = [
        (lambda: run([]), DmaValueError, "a command to run"),
        (lambda: run(["true"], iommu="maybe"), DmaValueError, "strict, lazy or passthrough"),
        (lambda: run(["true"], share="/nowhere"), DmaValueError, "a folder"),
        (lambda: run(["true"], memory=1 << 30), NoMemoryError, "the guest wants"),
        (lambda: run(["true"], kernel="/etc/hostname"), DmaValueError, "bzImage"),
        (lambda: run(["true"], kernel="5.4"), DmaValueError, "or the path of a kernel image"),
    ]
    for call, kind, words in refused:
        with pytest.raises(kind, match=words):
            call()
    monkeypatch.setenv("DMAPATH_CACHE", str(tmp_path))
    with pytest.raises(NotSupportedError, match=r"dmapath guest prepare --kernel 6\.1"):
        run(["true"])
    monkeypatch.setattr("dmapath.guest.vm.find_tool", lambda name: None)
    with pytest.raises(NotSupportedError, match="no QEMU: apt-get install qemu-system-x86"):
        run(["true"])
    monkeypatch.undo()
    done = subprocess.run([*DMAPATH, "guest", "run", "--kernel", "7.3", "--", "true"], capture_output=True, text=True,
                          check=False, env={**os.environ, "DMAPATH_CACHE": str(tmp_path), "PATH": "/nowhere"})  # fmt: skip
    assert done.returncode == 2
    assert "Error: [Errno 95] kernel='7.3': kernels are fetched by apt-get" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_room_and_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMAPATH_CACHE", str(tmp_path))
    with pytest.raises(DmaError, match="MB are wanted in") as e:
        packages.check_room(tmp_path, 1 << 60)
    assert e.value.errno == 28
    with pytest.raises(NotSupportedError, match="no such kernel in the machine's package sources"):
        Apt().newest(r"linux-image-0\.0")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotSupportedError, match="fetched by apt-get, which this machine lacks"):
        Apt()


def test_sources_in_another_suite() -> None:
    one_line = """deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib
deb http://mirror/security b main
"""
    deb822 = """Types: deb deb-src
URIs: http://mirror/debian/
Suites: bookworm bookworm-updates
Components: main
Signed-By: /k.gpg
"""
    want = "Types: deb\nURIs: http://mirror/debian{}\nSuites: sid\nComponents: main\nSigned-By: /k.gpg"
    assert list(packages.sources_in(one_line, "sid")) == [want.format("")]
    assert list(packages.sources_in(deb822, "sid")) == [want.format("/")]
    assert list(packages.sources_in("# nothing\n", "sid")) == []


def test_the_first_file_system_is_a_cpio_archive() -> None:
    whole = archive({"a": (0o040755, b""), "a/b": (0o100644, b"12345")})
    assert whole.startswith(b"070701")
    assert len(whole) % 4 == 0
    assert b"12345" in whole
    assert whole.rstrip(b"\0").endswith(b"TRAILER!!!")
    if Path("/usr/bin/cpio").exists():
        done = subprocess.run(["cpio", "-t", "--quiet"], input=whole, capture_output=True, check=True)
        assert done.stdout.split() == [b"a", b"a/b"]


def test_two_guests_on_one_cable() -> None:
    """Real bytes between two kernels: each writes into the other's memory and reads it back, aligned and not."""
    program = (
        f'if [ $DMAPATH_SIDE = 0 ]; then {sys.executable} -m dmapath.cli ping --align 512 --rounds 5; '
        f'else {sys.executable} -m dmapath.cli ping $DMAPATH_PEER --align 512 --rounds 5; fi'
    )
    words = ["guest", "run", "--rxe", "--pair", "--memory", "512", "--timeout", "120", "--", "sh", "-c", program]
    done = subprocess.run([*DMAPATH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if "rounds of 64K" in line)
    assert [line[:2] for line in lines] == ["0|", "1|"]
    assert all(line.endswith("every byte right") and "gapped, 16 segments" in line for line in lines)

