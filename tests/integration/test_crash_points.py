"""A command that is ended at any of its writes can be resumed; `make test-crash` tries all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_twenty_crash_points():
    """Seven fixed points each of the commands that failed before."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.crash_points", "--sample", "7", "prepare", "fit-tokenizer", "tokenize"], capture_output=True, text=True,
        cwd=ROOT, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"points": 21, "failed": 0}
