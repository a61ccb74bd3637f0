"""Speed of the ops against the formulas of the papers' own code in plain torch: JSON lines in, a table out."""

from longwave.bench.ops import CASES, Case, measure, record

__all__ = ["CASES", "Case", "measure", "record"]
