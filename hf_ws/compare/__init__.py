"""Compare starts: the same batches for each, and how many tokens each one saves."""

from hf_ws.compare.arms import compare
from hf_ws.compare.report import Arm, Comparison

__all__ = ["Arm", "Comparison", "compare"]
