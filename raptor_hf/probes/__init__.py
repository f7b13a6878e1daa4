"""Linear probes on frozen backbones: features, heads, results."""

from .evaluation import Evaluation

__all__ = ["Evaluation"]
