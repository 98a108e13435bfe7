"""The optional C++ kernels for CPUs."""

from visiontok.ops.cpu.launching import MODES, match_slots, merge, missing, refuses

__all__ = ["MODES", "match_slots", "merge", "missing", "refuses"]
