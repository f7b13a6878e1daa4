"""For `evaluate.load("evaluation/metrics/accuracy")`: the metric that raptor_hf.metrics defines."""

from raptor_hf.metrics import Accuracy

__all__ = ["Accuracy"]
