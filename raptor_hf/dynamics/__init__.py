"""Depth as a dynamical system: measure trajectories, perturb them, run them on."""

from .measures import measure
from .systems import find_partitions, is_store, load_inputs

__all__ = ["find_partitions", "is_store", "load_inputs", "measure"]
