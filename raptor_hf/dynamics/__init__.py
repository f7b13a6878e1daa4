"""Depth as a dynamical system: measure trajectories, perturb them, run them on."""

from .measures import measure
from .systems import load_inputs

__all__ = ["load_inputs", "measure"]
