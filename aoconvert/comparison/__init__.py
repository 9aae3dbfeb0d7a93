"""What differs between two checkpoints, or between a checkpoint and its source: codes, scales, values, names."""

from aoconvert.comparison.compare import compare
from aoconvert.comparison.types import Comparison, Difference

__all__ = ["Comparison", "Difference", "compare"]
