"""How blocks learn to follow a teacher, and how well they do."""

from .blocks import chain_of, make_span, raptor_from_blocks, save_blocks
from .fidelity import open_validation
from .provenance import source_inputs, write_training
from .rollout import Chain, covered_layers
from .training import print_plan, train_chains

__all__ = [
    "Chain", "chain_of", "covered_layers", "make_span", "open_validation", "print_plan",
    "raptor_from_blocks", "save_blocks", "source_inputs", "train_chains", "write_training",
]  # fmt: skip
