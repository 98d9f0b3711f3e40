"""The programs of docs/verbs.md run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
TEXT = (Path(os.environ.get("DMAPATH_SRC", HERE.parent)) / "docs" / "verbs.md").read_text()


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", TEXT, re.S))
def test_documented_programs_run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
