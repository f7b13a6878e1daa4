"""Linear probes on frozen backbones, and what is measured beside them."""

from .evaluation import Evaluation

__all__ = ["Evaluation"]
