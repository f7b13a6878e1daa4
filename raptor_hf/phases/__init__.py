"""Phases: runs of similar layers, found from the distances between the layers of a model."""

from .cuts import check_cut, find_phases, recursive_max_cut
from .distance import layer_distance, load_distance

__all__ = ["check_cut", "find_phases", "layer_distance", "load_distance", "recursive_max_cut"]
