"""Turn a whole model of the reference code into a Raptor around its teacher."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..modeling_raptor import RaptorModel
from ..teachers.making import make_raptor
from .checkpoints import read_checkpoint


def convert_checkpoint(
    checkpoint: str | Path, teacher: PreTrainedModel, *, phases: list[int] | None = None
) -> RaptorModel:
    """Return a model of the reference as a Raptor.

    Args:
        checkpoint: pickled module or state dict (`.pt`, `.pth`, `.safetensors`).
        teacher: the backbone that it was distilled from, which gives embeddings and final norm.
        phases: numbers of layers of the blocks, for a state dict. A pickled module has thresholds
            instead: [7, 10] of 12 layers are [7, 3, 2].

    Raises:
        ValueError: as for `read_checkpoint`; another width or number of heads than the teacher's;
            phases that are missing or do not fit.
    """
    # weights, and the phases that go with them
    original = read_checkpoint(checkpoint)
    if original.thresholds is not None:
        stops = [0, *original.thresholds, teacher.config.num_hidden_layers]
        lengths = np.diff(stops).tolist()
        if phases is not None and list(phases) != lengths:
            raise ValueError(f"{checkpoint} has the phases {lengths}; leave out {list(phases)}.")
        phases = lengths
    if phases is None or len(phases) != len(original.blocks):
        number = len(original.blocks)
        raise ValueError(f"{checkpoint} has {number} blocks: give as many phases; got {phases}.")

    # a Raptor of the same shape
    model = make_raptor(teacher, list(phases), init="random", **original.options)
    width, heads = model.config.hidden_size, model.blocks[0].attention.num_heads
    given = len(original.blocks[0]["norm1.weight"]), original.num_heads or heads
    if given != (width, heads):
        raise ValueError(
            f"{checkpoint} has {given[0]} channels and {given[1]} heads, but the teacher has "
            f"{width} and {heads}. Give the teacher that it was distilled from."
        )

    # its blocks' weights
    for block, weights in zip(model.blocks, original.blocks, strict=True):
        block.load_state_dict(weights)
    return model.eval()
