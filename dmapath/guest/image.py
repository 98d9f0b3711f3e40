"""A guest's kernel and its first file system: busybox and the few modules that it needs, no udev."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from dmapath.errors import DmaError, DmaValueError, NotSupportedError
from dmapath.guest.packages import Apt, Progress, cache_dir, check_room, find_tool, install, missing_packages, unpack

__all__ = ["KERNELS", "MODULES", "Kernel", "archive", "build_kernel", "find_kernel", "initramfs", "prepare"]


class Source(NamedTuple):
    """Where a kernel comes from: suites to look in ("": the machine's own), patterns of its packages' names, bytes that it
    takes while it is fetched and unpacked.
    """

    suites: tuple[str, ...]
    packages: tuple[str, ...]
    room: int


KERNELS = {
    "6.1": Source(("", "bookworm"), (r"linux-image-6\.1\.0-\d+-amd64",), 700 << 20),
    # a suite of backports keeps its newest alone: 7.3, or what came after it
    "7.3": Source(
        ("trixie-backports",),
        (r"linux-binary-[7-9]\.\d+\.\d+\+deb13-amd64", r"linux-modules-[7-9]\.\d+\.\d+\+deb13-amd64"),
        900 << 20,
    ),
}
#: What each option of a guest loads, with whatever that depends on.
MODULES = {
    "base": ["virtio_pci", "9p", "9pnet_virtio", "virtio_console", "virtio_rng"],
    "rxe": ["crc32_generic", "crc32c_generic", "dummy", "rdma_rxe", "ib_uverbs", "rdma_ucm"],
    "net": ["virtio_net"],
    "nvme": ["nvme"],
}


class Kernel(NamedTuple):
    """A kernel to boot: its release, its image, and its folder of modules."""

    release: str
    image: Path
    modules: Path


def _find(kernel: str, progress: Progress, *, again: bool = False) -> tuple[Apt, list[str]]:
    """The first suite that has a kernel, and its packages there."""
    how = KERNELS[kernel]
    for last, suite in enumerate(how.suites, 1):
        apt = Apt(suite, kernel)
        apt.update(progress, again=again)
        try:
            return apt, [apt.newest(p) for p in how.packages]
        except NotSupportedError:
            if last == len(how.suites):
                raise
    raise AssertionError("a kernel without a suite")


def build_kernel(name: str, debs: list[Path]) -> None:
    """Keep of a kernel's packages what a guest needs, in the cache; whole or not at all."""
    home = cache_dir() / "kernels"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        for deb in debs:
            unpack(deb, Path(scratch) / "root")
        root = Path(scratch) / "root"
        images = [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz"), *root.glob("lib/modules/*/vmlinuz")]
        folders = [p for p in [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")] if (p / "kernel").is_dir()]
        if not images or not folders:
            raise NotSupportedError("the packages hold no vmlinuz or no modules", argument="kernel", value=name)
        kept = Path(scratch) / "kept"
        kept.mkdir()
        shutil.copy2(images[0], kept / "vmlinuz")
        (kept / "release").write_text(folders[0].name)
        (kept / "recipe").write_text(_recipe())
        _keep_modules(folders[0], kept / "modules")
        shutil.rmtree(home / name, ignore_errors=True)
        kept.rename(home / name)


def prepare(kernel: str, progress: Progress, *, rxe: bool = True) -> None:
    """Fetch and cache whatever a guest with this kernel ("6.1" or "7.3") lacks; nothing where all is there."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    install(missing_packages(rxe=rxe), progress)
    if kernel not in KERNELS or find_kernel(kernel, missing_ok=True) is not None:
        return
    check_room(cache_dir(), KERNELS[kernel].room)
    apt, names = _find(kernel, progress)
    try:
        debs = apt.fetch(names, progress)
    except DmaError:  # the lists were older than what the mirror has
        apt, names = _find(kernel, progress, again=True)
        debs = apt.fetch(names, progress)
    progress("unpacking", 0, 0)
    build_kernel(kernel, debs)
    for deb in debs:
        deb.unlink()


def _recipe() -> str:
    """What a kept kernel was made by: one of another recipe is fetched anew."""
    return repr(MODULES)


def _keep_modules(source: Path, into: Path) -> None:
    """Unpacked copies of the modules of MODULES and of what they need, in the order to load them."""
    into.mkdir()
    there = {p.name.split(".ko")[0].replace("-", "_"): p for p in source.rglob("*.ko*")}
    builtin = {Path(line).name.split(".ko")[0].replace("-", "_")
               for line in _lines(source / "modules.builtin")}  # fmt: skip
    for kind, names in MODULES.items():
        order: list[str] = []
        for name in names:
            if name in there:
                _in_order(name, there, builtin, into, order)
        (into / f"{kind}.order").write_text("".join(f"{n}\n" for n in order))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _in_order(name: str, there: dict[str, Path], builtin: set[str], into: Path, order: list[str]) -> None:
    if name in order or name in builtin:
        return
    if name not in there:
        raise NotSupportedError("a module that the kernel's packages lack", argument="module", value=name)
    data = _read_module(there[name])
    found = re.search(rb"\0depends=([^\0]*)\0", data)
    for needed in found[1].decode().replace("-", "_").split(",") if found and found[1] else []:
        _in_order(needed, there, builtin, into, order)
    (into / f"{name}.ko").write_bytes(data)
    order.append(name)


def _read_module(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=True).stdout
    return path.read_bytes()


def find_kernel(kernel: str, *, missing_ok: bool = False) -> Kernel | None:
    """A kernel of the cache by name, or any by the path of its image, with /lib/modules/RELEASE beside it or on this
    machine.
    """
    if kernel in KERNELS:
        home = cache_dir() / "kernels" / kernel
        if (home / "recipe").exists() and (home / "recipe").read_text() == _recipe():
            return Kernel((home / "release").read_text(), home / "vmlinuz", home / "modules")
        if missing_ok:
            return None
        raise NotSupportedError(
            f"not in the cache: dmapath guest prepare --kernel {kernel}", argument="kernel", value=kernel
        )
    image = Path(kernel)
    if not image.is_file():
        raise DmaValueError(f"{', '.join(KERNELS)}, or the path of a kernel image", argument="kernel", value=kernel)
    release = _release(image)
    for base in (image.parent, image.parent.parent / "lib/modules" / release, Path("/lib/modules") / release):
        if (base / "kernel").is_dir():
            into = cache_dir() / "kernels" / f"own-{release}"
            shutil.rmtree(into, ignore_errors=True)
            into.parent.mkdir(parents=True, exist_ok=True)
            _keep_modules(base, into)
            return Kernel(release, image, into)
    raise NotSupportedError(f"no modules of {release} beside it or in /lib/modules", argument="kernel", value=kernel)


def _release(image: Path) -> str:
    """The release that a bzImage names in its header (Documentation/arch/x86/boot.rst, kernel_version)."""
    data = image.read_bytes()
    if data[0x202:0x206] != b"HdrS":
        raise DmaValueError("an x86 kernel image (bzImage)", argument="kernel", value=str(image))
    at = int.from_bytes(data[0x20E:0x210], "little") + 0x200
    return data[at : data.index(b"\0", at)].decode().split()[0]


# ---- the first file system ------------------------------------------------------------------------------------------

INIT = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
load() {
    for m in $($b cat /m/$1.order); do
        [ -d /sys/module/$m ] || $b insmod /m/$m.ko || echo "guest: cannot load $m" >/dev/console
    done
}
load base
# the ports' names come after the ports
n=0; until [ -e /dev/out ] && [ -e /dev/err ] && [ -e /dev/status ] || [ $n = 200 ]; do
    for p in /sys/class/virtio-ports/*; do
        name=$($b cat $p/name 2>/dev/null); [ -n "$name" ] && [ ! -e /dev/$name ] && $b ln -s /dev/${p##*/} /dev/$name
    done
    n=$((n + 1)); [ -e /dev/status ] || $b usleep 50000
done
. /job/settings
echo booted >/dev/status
share="trans=virtio,version=9p2000.L,msize=512000"
$b mount -t 9p -o ro,$share,cache=loose root /root || echo "guest: cannot mount the host's files" >/dev/console
if [ -n "$SHARE" ]; then
    $b mount -t 9p -o rw,$share share "/root$SHARE" || echo "guest: cannot mount $SHARE" >/dev/console
fi
for kind in $LOAD; do load $kind; done
$b mount -t proc proc /root/proc; $b mount -t sysfs sys /root/sys; $b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts pts /root/dev/pts; $b mount -t tmpfs shm /root/dev/shm
$b mount -t tmpfs run /root/run; $b mount -t tmpfs tmp /root/mnt
$b mount -t tracefs trace /root/sys/kernel/tracing 2>/dev/null
$b mkdir -p /root/run/home /root/mnt/tmp
$b cp /job/job /root/run/job
$b ip link set lo up
$b chroot /root /bin/sh /run/job </dev/null >/dev/out 2>/dev/err
echo "rc $?" >/dev/status
$b poweroff -f
"""
#: Brings soft-RoCE up: RoCE v2 over the address, with a path MTU of 4096.
RXE_UP = """[ {dev} = dummy0 ] && ip link add dummy0 type dummy 2>/dev/null
ip link set {dev} mtu 9000 && ip addr add {address}/24 dev {dev} &&
ip link set {dev} up && rdma link add rxe0 type rxe netdev {dev} || {{
    echo "guest: soft-RoCE did not come up" >&2
    exit 125
}}
"""


def archive(entries: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive (newc) of path -> (mode, data)."""
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], 1):
        device = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        out += b"070701" + b"".join(b"%08x" % f for f in fields) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(kernel: Kernel, job: str, settings: dict[str, str]) -> bytes:
    """The first file system of one run."""
    busybox = find_tool("busybox")
    if busybox is None:
        raise NotSupportedError("missing: busybox-static. dmapath guest prepare fetches it")
    folder, script = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries = dict.fromkeys(("bin", "proc", "sys", "dev", "root", "m", "job"), (folder, b""))
    entries["dev/console"] = (stat.S_IFCHR | 0o600, b"")
    entries["init"] = (script, INIT.encode())
    entries["bin/busybox"] = (script, Path(os.path.realpath(busybox)).read_bytes())
    wanted = {"base", *settings.get("LOAD", "").split()}
    for kind in wanted:
        order = (kernel.modules / f"{kind}.order").read_text()
        entries[f"m/{kind}.order"] = (script, order.encode())
        for name in order.split():
            entries[f"m/{name}.ko"] = (script, (kernel.modules / f"{name}.ko").read_bytes())
    entries["job/job"] = (script, job.encode())
    entries["job/settings"] = (script, "".join(f"{k}='{v}'\n" for k, v in settings.items()).encode())
    return archive(entries)
