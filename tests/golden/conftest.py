"""Lets the golden tests use the loop-level reference of tests/ops."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))
