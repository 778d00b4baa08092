"""Compare starts: the same batches for each, how many tokens each one saves, and which of many is the best."""

from hf_ws.compare.arms import compare
from hf_ws.compare.race import race
from hf_ws.compare.race_report import Race
from hf_ws.compare.report import Arm, Comparison

__all__ = ["Arm", "Comparison", "Race", "compare", "race"]
