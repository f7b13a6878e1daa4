"""For `evaluate.load("evaluation/metrics/depth")`: the metric that raptor_hf.metrics defines."""

from raptor_hf.metrics import DepthError

__all__ = ["DepthError"]
