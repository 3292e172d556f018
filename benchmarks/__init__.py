"""What mapet costs and what it learns, measured: `python -m benchmarks --list`, from the repository's root.

A benchmark is a module with a docstring, `add_arguments(parser)`, `run(args) -> Result`, `SMOKE` (options of its smallest
setting) and `TABLES` (name -> Table). Its results are kept as results/NAME[-VARIANT].json; tables of the docs are made from these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # the mapet beside it, installed or not
