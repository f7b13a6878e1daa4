"""Phases: runs of similar layers, found from the distances between the layers of a model."""

from .cuts import METHODS, check_cut, find_phases, partition_quality, recursive_max_cut
from .distance import layer_distance, load_distance

__all__ = [
    "METHODS",
    "check_cut",
    "find_phases",
    "layer_distance",
    "load_distance",
    "partition_quality",
    "recursive_max_cut",
]
