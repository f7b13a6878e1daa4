"""Depth as a dynamical system: measure trajectories, perturb them, run them on."""

from .measures import measure
from .systems import find_partitions, load_inputs

__all__ = ["find_partitions", "load_inputs", "measure"]
