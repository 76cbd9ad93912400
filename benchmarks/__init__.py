"""Benchmark scripts, run from the repository's root: `python -m benchmarks.train.chaos`.

Importing this package makes the tests' helpers importable by their bare names.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
