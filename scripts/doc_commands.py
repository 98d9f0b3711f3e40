"""Run what README.md and docs/*.md tell a person to run: a fresh clone in an empty folder, an emptied environment, and every
command of every ``sh`` block in the clone's root, in order. Fails on a traceback and on an exit status other than 0, or than
the one that a comment behind the command names (``# exit 1``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Commands that are not run, and why.
LEFT_OUT = {"scripts/test": "it is what runs this"}
TIMEOUT = 1500  # seconds in all
MARK = "\x1e"


def commands(text: str) -> list[tuple[str, int]]:
    """The commands of a page's ``sh`` blocks, each with the exit status that is documented."""
    out = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            command, _, comment = line.partition("#")
            told = re.search(r"\bexit (\d+)", comment)
            if command.strip():
                out.append((command.strip(), int(told[1]) if told else 0))
    return out


def script(steps: list[tuple[str, int]]) -> str:
    """One shell for all of them, so that an activated environment stays; a mark and the status after each."""
    return "\n".join(f"{command} </dev/null\nprintf '{MARK}%s{MARK}' $?" for command, _ in steps) + "\n"


def main() -> None:
    """Clone, run, judge."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    steps = [step for page in pages for step in commands(page.read_text()) if step[0] not in LEFT_OUT]
    steps = list(dict.fromkeys(steps))  # what two pages name runs once
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ.get("HOME", "/"),
           "LC_ALL": "C.UTF-8"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "dmapath"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        start = time.monotonic()
        done = subprocess.run(["bash"], input=script(steps), cwd=clone, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False)  # fmt: skip
    parts = done.stdout.split(MARK)
    wrong = 0
    for (command, want), said, status in zip(steps, parts[::2], parts[1::2], strict=False):
        bad = int(status) != want or "Traceback (most recent call last)" in said
        wrong += bad
        print(f"{'WRONG' if bad else 'ok'}  exit {status}  {command}")
        if bad:
            print(said[-4000:])
    ran = len(parts) // 2
    print(f"{ran} of {len(steps)} commands ran, {wrong} wrong, {time.monotonic() - start:.0f} s")
    for command, why in LEFT_OUT.items():
        print(f"not run: {command} ({why})")
    sys.exit(bool(wrong or ran < len(steps)))


if __name__ == "__main__":
    main()
