"""Checkpoints of the reference code of arXiv 2512.19941: read safely, converted to Raptors."""

from .checkpoints import read_checkpoint
from .convert import convert_checkpoint

__all__ = ["convert_checkpoint", "read_checkpoint"]
