"""For `evaluate.load("evaluation/metrics/r2")`: the metric that raptor_hf.metrics defines."""

from raptor_hf.metrics import RSquared

__all__ = ["RSquared"]
