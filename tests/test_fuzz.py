"""The fuzzers' corpus, and mutations of it, through the devices under ASan and UBSan; ``tests/fuzz/run`` does more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SRC = Path(os.environ.get("DMAPATH_SRC", HERE.parent))
MUTATIONS = 40  # of each input


@pytest.mark.parametrize("device", ["nvme", "rnic"])
def test_the_corpus_and_its_mutations_break_nothing(device: str, tmp_path: Path) -> None:
    program = tmp_path / device
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", *(f"-I{SRC / folder}" for folder in ("ext/include", "ext/devices")),
         HERE / "fuzz" / f"{device}_fuzz.c", HERE / "fuzz" / "replay.c", SRC / "ext" / "devices" / f"{device}.c",
         "-o", program], check=True)  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program, HERE / "fuzz" / "corpus" / device, str(MUTATIONS)], text=True, capture_output=True,
                          check=False, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100


def links(tmp_path: Path, source: Path) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "links"
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", f"-I{source}", f"-I{SRC / 'ext' / 'core'}",
         f"-I{SRC / 'ext' / 'include'}",
         HERE / "fuzz" / "links.c", source / "core.c", SRC / "ext" / "core" / "mem.c", "-pthread", "-o", program],
        check=True)  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run([program, os.environ.get("DMAPATH_LINKS", "20000")], text=True, capture_output=True, check=False,
                          env=env)  # fmt: skip


def test_links_of_any_size_stay_inside_their_room(tmp_path: Path) -> None:
    """The core itself, with lengths that no Python call lets through; DMAPATH_LINKS sets how many."""
    done = links(tmp_path, SRC / "ext" / "core")
    assert done.returncode == 0, done.stderr
    linked, refused = map(int, done.stdout.split())
    assert min(linked, refused) > 1000


@pytest.mark.parametrize("right, wrong", [
    ("if (!len || len > left || (gapped && span > left)) {", "if (at + len > l.at + l.left || (gapped && span > left)) {"),
    ("if (unlikely(len - 1 >= left ||", "if (unlikely(len > left ||"),
    ("len >= 1u << 21 || (gapped && n4k > left >> 12) ||", "len >= 1u << 21 ||"),
    ("pages = (at - first + gm) >> 12;", "pages = ((at + gm) >> 12) - (first >> 12);"),
    ("i ? at - start : 0, &freed", "i ? at - start - 1 : 0, &freed"),
])  # fmt: skip
def test_a_link_outside_would_be_seen(right: str, wrong: str, tmp_path: Path) -> None:
    for part in (SRC / "ext" / "core").glob("*.[ch]"):
        text = part.read_text()
        if part.name == "domain.c":
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (tmp_path / part.name).write_text(text)
    done = links(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "broken" in done.stderr


def test_a_finding_would_be_seen(tmp_path: Path) -> None:
    """The harness ends with an error where the device is broken: one that writes past its media."""
    source = (SRC / "ext" / "devices" / "nvme.c").read_text()
    broken = source.replace("n > c->blocks - lba ?", "n > c->blocks - lba + 8 ?")
    assert broken != source
    (tmp_path / "nvme.c").write_text(broken)
    program = tmp_path / "broken"
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address", *(f"-I{SRC / folder}" for folder in
         ("ext/include", "ext/devices")), HERE / "fuzz" / "nvme_fuzz.c", HERE / "fuzz" / "replay.c", tmp_path / "nvme.c",
         "-o", program], check=True)  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program, HERE / "fuzz" / "corpus" / "nvme", "400"], text=True, capture_output=True, check=False,
                          env=env)  # fmt: skip
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
