"""For `evaluate.load("evaluation/metrics/mean_iou")`: the metric that raptor_hf.metrics defines."""

from raptor_hf.metrics import MeanIoU

__all__ = ["MeanIoU"]
