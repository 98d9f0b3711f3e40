"""The commands as a user types them: their words, their JSON, their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRACES = Path(__file__).parent / "data" / "traces"
EXAMPLE = ("0x100200+0xe00", "0x205000+0x1000", "0x30a000+0x400")


def run(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "dmapath.cli", *args], text=True, capture_output=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_compare_answers_in_json_and_pictures(tmp_path: Path) -> None:
    out, svg = tmp_path / "rows.json", tmp_path / "figures.svg"
    text = run("compare", "--json", str(out), "--plot", str(svg)).stdout
    assert svg.read_text().lstrip().startswith("<?xml")
    data = json.loads(out.read_text())
    assert data["version"] == 1
    rows: list[dict[str, Any]] = data["rows"]
    assert len(rows) == 60
    assert all(list(r) == [
        "request", "ranges", "bytes", "alignment", "backend", "mode", "policy", "case", "layout", "segments", "iova_allocs",
        "ptes", "invalidations", "bounced_bytes", "unmap_state_bytes", "exposed_bytes", "verified", "map_ns", "unmap_ns",
        "modelled_ns",
    ] for r in rows)  # fmt: skip
    assert all(r["verified"] for r in rows)
    pick = {(r["ranges"], r["alignment"], r["mode"], r["policy"]): r for r in rows if r["request"] == "bio"}
    linux, unified = pick[32, "unaligned", "strict", "linux"], pick[32, "unaligned", "strict", "unified"]
    figures = {"iova_allocs": (32, 1), "invalidations": (32, 1), "unmap_state_bytes": (512, 16), "segments": (32, 32)}
    for key, (a, b) in figures.items():
        assert (linux[key], unified[key]) == (a, b)
    assert "32 IOVA allocations, 32 IOTLB invalidations and 512 bytes" in " ".join(text.split())
    assert "Every byte arrived" in text
    assert [r["case"] for r in data["cases"] if r["policy"] == "unified"] == [
        "direct", "iommu-aligned", "iommu-aligned-p2p", "swiotlb-single", "swiotlb-multi", "iommu-unaligned"]
    assert "the six cases, one driver" in text
    assert "case 3, policy linux: EINVAL: Linux's bios hold memory of one kind" in text


def test_compare_to_standard_output_is_json_alone() -> None:
    assert len(json.loads(run("compare", "--json", "-").stdout)["rows"]) == 60


REG_KEYS = ["backend", "method", "size", "align", "scatter", "page_size", "access", "threads", "error", "ranges",
            "registrations", "lkeys", "sges", "pinned_bytes", "reg_ns", "dereg_ns", "modelled_ns", "ns_per_page",
            "ns_per_byte"]  # fmt: skip


def test_registering_on_the_simulated_iommu(tmp_path: Path) -> None:
    svg = tmp_path / "reg.svg"
    words = ("reg", "--backend", "sim", "--sizes", "4K..1M", "--align", "0,512")
    data = json.loads(run(*words, "--scatter", "contiguous,pages,random", "--json", "-", "--plot", str(svg)).stdout)
    assert svg.read_text().lstrip().startswith("<?xml")
    rows = {(r["size"], r["align"], r["scatter"], r["method"]): r for r in data["rows"]}
    assert len(rows) == 5 * 2 * 3 * 4
    assert {size for size, *_ in rows} == {4096, 16384, 65536, 262144, 1 << 20}
    one, each = rows[65536, 512, "random", "linear"], rows[65536, 512, "random", "per-range"]
    assert list(one) == REG_KEYS
    assert (one["ranges"], one["registrations"], one["lkeys"]) == (17, 1, 1)
    assert (each["registrations"], rows[65536, 0, "contiguous", "linear"]["sges"]) == (17, 1)
    assert one["modelled_ns"] < each["modelled_ns"]
    assert all("nothing to keep" in r["error"] for key, r in rows.items() if key[3] == "cache")
    assert "modelled us" in run("reg", "--backend", "sim", "--sizes", "4K", "--method", "linear").stdout


def test_doctor_says_what_is_there_and_what_to_do() -> None:
    found = {f["what"]: f for f in json.loads(run("doctor", "--json").stdout)}
    wanted = {"pyverbs", "memlock limit", "huge pages", "kernel", "IOMMU", "guests", "guest kernel 6.1", "guest speed"}
    assert wanted <= set(found)
    assert all(set(f) == {"what", "state", "advice"} for f in found.values())
    text = run("doctor").stdout
    assert "memlock limit" in text


@pytest.mark.parametrize(
    "args",
    [
        ("reg", "--sizes", "4Q"), ("reg", "--align", "4096", "--backend", "sim"), ("reg", "--method", "magic"),
        ("reg", "--scatter", "wide"), ("reg", "--access", "root"), ("reg", "--plot", "x.txt"), ("reg", "--sizes", "0"),
        ("compare", "--backend", "verbs", "--plot", "x.svg"), ("guest", "run"),
        ("guest", "run", "--iommu", "no", "--", "true"), ("guest", "run", "--kernel", "/nowhere", "--", "true"),
        ("rxe", "frobnicate"), ("ping", "--align", "5000"),
    ],
)  # fmt: skip
def test_bad_words_about_real_rdma(args: tuple[str, ...]) -> None:
    assert "rror" in run(*args, code=2).stderr


@pytest.mark.parametrize("args", [("--plot", "figure.txt"), ("--json", "/nowhere/x.json")])
def test_compare_refuses_bad_files(args: tuple[str, str]) -> None:
    assert args[1] in run("compare", *args, code=2).stderr or "--plot" in args


def test_explain_says_it_in_words() -> None:
    text = run("explain", *EXAMPLE).stdout
    assert text.startswith("One IOVA range that reads as 1 segment. Case 2")
    assert "0xffffc200 + 0x2200" in text
    assert "from dma_iova_link" in text
    assert "[dev_use_swiotlb" in run("explain", "0x100200+0xe00", "--untrusted", "--swiotlb", "none").stdout
    bounced = run("explain", "0x100200+0x2000", "--untrusted", "--min-align-mask", "0xfff").stdout
    assert "head 0x100200 + 0xe00" in bounced
    assert "tail 0x102000 + 0x200" in bounced
    assert run("explain", "0x100200+0x2000", "--backend", "direct", "--swiotlb", "force").stdout.startswith("Bounce buffers")


@pytest.mark.parametrize(
    ("args", "layout", "segments"),
    [
        ((), "linear", 1),
        (("--policy", "linux", "--mode", "lazy"), "linear", 1),
        (("--backend", "direct"), "direct", 3),
        (("--max-segment-size", "4K"), "linear", 3),
        (("--dir", "to", "--dma-mask", "0xffffff", "--non-coherent", "--forcedac"), "linear", 1),
    ],
)
def test_explain_in_json(args: tuple[str, ...], layout: str, segments: int) -> None:
    told = json.loads(run("explain", *EXAMPLE, *args, "--json").stdout)
    assert (told["layout"], len(told["segments"]), told["error"]) == (layout, segments, None)
    assert told == json.loads(run("explain", *EXAMPLE, *args, "--json").stdout)


def test_explain_of_a_region() -> None:
    told = json.loads(run("explain", "0x100000+0x1000", "0x300000+0x2000", "--dir", "bidi", "--json").stdout)
    assert (told["layout"], told["case"]) == ("linear", "iommu-aligned")


def test_an_error_is_an_answer() -> None:
    args = ("explain", "0x100000000+4K", "--backend", "direct", "--dma-mask", "0xffffffff", "--json", "--swiotlb")
    assert json.loads(run(*args, "none").stdout)["error"].startswith("ENOMEM")
    told = json.loads(run(*args, "pool").stdout)
    assert (told["case"], told["bounced"]) == ("swiotlb-single", [{"part": "whole", "phys": "0x100000000", "len": 4096}])


@pytest.mark.parametrize(
    "args",
    [
        ("explain",), ("explain", "0x1000"), ("explain", "0x1000+0"), ("explain", "x+1"), ("explain", "0x1000+-5"),
        ("explain", "0x1000+1", "--dma-mask", "5"), ("explain", "0xffffffffffffffff+2"),
        ("explain", "0x10+1", "--dir", "bidi"),
        ("explain", "0x1000+1", "--policy", "bsd"), ("replay", "/nonexistent"), ("frobnicate",),
    ],
)  # fmt: skip
def test_bad_input_is_exit_2_and_one_line(args: tuple[str, ...]) -> None:
    assert "rror" in run(*args, code=2).stderr


def test_replay_agrees_on_every_io_of_six_real_traces() -> None:
    text = run("replay", *(str(p) for p in sorted(TRACES.glob("*.txt")))).stdout
    assert text.count("agrees with the kernel on 9 of 9 covered I/Os (100 %)") == 6
    assert "not covered" not in text
    data = json.loads(run("replay", str(TRACES / "untrusted.ftrace.txt"), "--json").stdout)
    assert (data["traces"][0]["agree"], data["traces"][0]["not_covered"]) == (9, 0)


def test_replay_reads_trace_cmd_report(tmp_path: Path) -> None:
    lines = ["cpus=1"]
    for line in (TRACES / "strict.ftrace.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        head, rest = line.split(" [", 1)
        cpu, rest = rest.split("] ", 1)
        _, stamp, event = rest.split(None, 2)
        name, body = event.split(": ", 1)
        if name == "tracing_mark_write":
            name, body = "print", "tracing_mark_write: " + body
        lines.append(f"{head}  [{cpu}] {stamp} {name + ':':22s} {body}")
    path = tmp_path / "report.txt"
    path.write_text("\n".join(lines))
    assert "on 9 of 9 covered I/Os (100 %)" in run("replay", str(path)).stdout


def edit(tmp_path: Path, change: Any, trace: str = "strict") -> Path:
    lines = (TRACES / f"{trace}.ftrace.txt").read_text().splitlines()
    path = tmp_path / "changed.txt"
    path.write_text("\n".join(change(lines)) + "\n")
    return path


def without_header(lines: list[str]) -> list[str]:
    return [x for x in lines if not x.startswith("# entries")]


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (lambda x: x[:100], 100, "truncated: the header promises"),
        (lambda x: without_header(x)[:50], 36, "truncated: the I/O 'gap' has no END"),
        (lambda x: [*x[:18], x[18][:-9], *x[19:]], 19, "malformed map"),
        (lambda x: [*x[:18], "garbage", *x[18:]], 19, "not a trace line"),
        (lambda x: without_header([*x[:14], *x[15:]]), 14, "vector 1 is wanted"),
        (lambda x: [y.replace("n=3 total=0x2200", "n=3 total=0x2300") for y in x], 25, "0x2300 were announced"),
        (lambda x: [y.replace("205/205", "205/999") for y in x], 3, "overran"),
    ],
)
def test_replay_of_a_broken_trace_names_file_line_and_reason(tmp_path: Path, change: Any, line: int, reason: str) -> None:
    path = edit(tmp_path, change)
    err = run("replay", str(path), code=2).stderr
    assert reason in err
    assert f"{path}:{line}:" in err


def test_replay_of_a_kernel_that_did_otherwise_is_exit_1(tmp_path: Path) -> None:
    path = edit(tmp_path, lambda x: [y.replace("paddr=0x000000003ff00000 size", "paddr=0x0000000055555000 size") for y in x])
    text = run("replay", str(path), code=1).stdout
    assert "vector 1: announced at 0x3ff00000, mapped at 0x55555000" in text
    assert "disagree" in text


@pytest.mark.parametrize("trace", ["untrusted", "swf"])
def test_replay_notices_a_bounce_of_another_size(tmp_path: Path, trace: str) -> None:
    def change(lines: list[str]) -> list[str]:
        i = next(i for i, x in enumerate(lines) if "swiotlb_bounced" in x and "size=1024" in x)
        return [*lines[:i], lines[i].replace("size=1024", "size=1020"), *lines[i + 1 :]]

    text = run("replay", str(edit(tmp_path, change, trace)), code=1).stdout
    assert "bounced (original, bytes)" in text or "bytes too few" in text


def test_replay_of_binary(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    path.write_bytes(b"\xff\xfe\x00trace")
    assert "not text" in run("replay", str(path), code=2).stderr


def test_explain_knows_peers() -> None:
    peer = ("--p2p", "0x9000000000+0x10000")
    mixed = ("0x100000+0x1000", "0x9000001000+0x1000", "0x200000+0x1000")
    text = run("explain", *peer, *mixed).stdout
    assert text.startswith("One IOVA range that reads as 3 segments. Case 3: IOMMU, aligned, some P2P.")
    told = json.loads(run("explain", *peer, "--p2p-bus-offset", "0x1000", *mixed, "--json").stdout)
    assert told["segments"][1]["addr"] == "0x9000002000"
    assert "p2p-bus" in [r["rule"] for r in told["rules"]]
    assert "reads as 1 segment" in run("explain", *peer, "--p2p-type", "host-bridge", *mixed).stdout
    refused = run("explain", *peer, "--p2p-type", "none", *mixed).stdout
    assert refused.startswith("An error: EREMOTEIO: the device cannot reach that peer's memory")
    assert "first segment decides" in run("explain", *peer, "--policy", "linux", *mixed).stdout
    assert "share a switch" in run("explain", *peer, "--p2p", "0xa000000000+0x1000", *mixed, code=2).stderr


def test_explain_knows_xen() -> None:
    assert "Bounce buffers: 1 segment" in run("explain", "--backend", "xen", "0x100000+0x2000").stdout
    order = run("explain", "--backend", "xen", "--xen-frames", "contiguous", "0x100000+0x2000").stdout
    assert order.startswith("Machine addresses as they are, in 1 segment")
    text = run("explain", "--backend", "grant", "0x100200+0x1000").stdout
    assert text.startswith("Grant references, bit 63 set, in 1 segment")
    assert "0x8000000000001200 + 0x1000" in text
    assert "exposed beyond the request: 4096 bytes" in text


def test_replay_writes_a_trace_that_it_reads_back(tmp_path: Path) -> None:
    ours = tmp_path / "ours.txt"
    run("replay", str(TRACES / "untrusted.ftrace.txt"), "--trace-out", str(ours))
    assert "9 of 9 covered I/Os (100 %)" in run("replay", str(ours)).stdout
    assert "one trace at a time" in run("replay", str(ours), str(ours), "--trace-out", "x", code=2).stderr


def test_explain_shows_the_descriptors_of_an_nvme_command() -> None:
    text = run("explain", *EXAMPLE, "--nvme").stdout
    assert "NVMe command: PRP, descriptors 2 in 1 page of list (256 bytes each)" in text
    assert "prp1 0xffffc200" in text
    assert "list 0[1] 0xffffe000" in text
    assert "below-threshold" in text
    d = json.loads(run("explain", "0x100200+0x600", "0x205000+0x1000", "--nvme", "--json").stdout)["nvme"]
    assert (d["form"], d["rule"], d["list_pages"], len(d["blocks"])) == ("sgl", "gap-forces-sgl", 1, 2)
    d = json.loads(run("explain", "0x100000+0x200000", "--backend", "direct", "--nvme", "prp", "--json").stdout)["nvme"]
    assert (d["prp1"], d["prp2"], d["list_pages"], d["list_entries"], d["pool"]) == ("0x100000", None, 1, 511, "large")
    text = run("explain", "0x100000+0x2000000", "--backend", "direct", "--nvme", "prp").stdout
    assert "refused" in text
    assert "at most 5 pages of list: 8 MiB" in text
    text = run("explain", "0x100200+0x600", "0x205000+0x1000", "--nvme", "--no-sgl").stdout
    assert "no PRP entry can say" in " ".join(text.split())
    d = json.loads(run("explain", "0x100200+0x600", "0x205000+0x1000", "--nvme", "sgl", "--no-sgl", "--json").stdout)["nvme"]
    assert d["errno"] == 95
    assert "in the command alone" in run("explain", "0x100000+0x1000", "--nvme", "--backend", "direct").stdout
    # one descriptor: whatever the threshold
    for size, rule in (("0x2000", "two-entries"), ("0x2001", "one-piece")):
        d = json.loads(run("explain", f"0x100000+{size}", "--nvme", "--sgl-threshold", "0", "--json").stdout)["nvme"]
        assert d["rule"] == rule
