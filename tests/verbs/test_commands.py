"""The commands on a real device, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DMAPATH = [sys.executable, "-m", "dmapath.cli"]


def run(*args: str, code: int = 0) -> str:
    done = subprocess.run([*DMAPATH, *args], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_compare_verifies_every_byte_at_the_remote_side() -> None:
    data = json.loads(run("compare", "--backend", "verbs", "--json", "-"))
    rows: list[dict[str, Any]] = data["rows"]
    assert (data["version"], data["backend"], len(rows)) == (1, "verbs", 32)
    assert all(r["verified"] for r in rows)
    pick = {(r["ranges"], r["alignment"], r["method"]): r for r in rows}
    figures = ("registrations", "keys", "sges", "work_requests")
    assert [pick[32, "aligned", "linear"][k] for k in figures] == [1, 1, 1, 1]
    assert [pick[32, "unaligned", "linear"][k] for k in figures] == [1, 1, 32, 2]
    assert [pick[32, "unaligned", "per-range"][k] for k in figures] == [32, 32, 32, 2]
    assert [pick[32, "unaligned", "linear, cache"][k] for k in figures] == [0, 1, 32, 2]


def test_registering_beside_plain_c(tmp_path: Path) -> None:
    svg = tmp_path / "reg.svg"
    rows = json.loads(run("reg", "--sizes", "4K,64K", "--align", "0,1", "--scatter", "pages", "--threads", "2", "--access",
                          "local-write,remote-read", "--json", "-", "--plot", str(svg)))["rows"]  # fmt: skip
    assert svg.read_text().lstrip().startswith("<?xml")
    assert len(rows) == 2 * 2 * 4
    assert all(r["error"] is None and r["ratio"] > 0 and r["access"] == 5 and r["threads"] == 2 for r in rows)
    pick = {(r["size"], r["align"], r["method"]): r for r in rows}
    assert (pick[65536, 1, "per-range"]["lkeys"], pick[65536, 1, "linear"]["lkeys"]) == (17, 1)
    assert pick[65536, 1, "linear"]["pinned_bytes"] == 65536
    huge = json.loads(run("reg", "--sizes", "4M", "--page-size", "2M", "--method", "linear", "--json", "-"))["rows"]
    assert [r["error"] for r in huge] == [None] * len(huge)


def test_doctor_on_a_device() -> None:
    found = {f["what"]: f for f in json.loads(run("doctor", "--json"))}
    assert found["rxe0, self-test of mr"]["state"] == "passed"
    assert "10.10.0.1" in found["rxe0, GIDs"]["state"]
    assert found["rxe0, self-test of odp"]["state"] == "failed"
    assert "path MTU 4096" in found["device rxe0"]["state"]
