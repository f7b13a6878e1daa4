"""Files that are no checkpoints of the reference; the hostile ones are in the converter's tests."""

import pytest
import torch
from torch import nn

from raptor_hf.convert_raptor_original_to_hf import convert_checkpoint
from tests.reference import Block, Raptor, make_teacher, save_as_reference


def test_pickles_that_are_not_built_like_the_reference_are_refused(tmp_path, monkeypatch):
    def refused(message, change):
        model = Raptor([Block(32, 4, 64, True, True), Block(32, 4, 64, True, True)], [7])
        change(model)
        save_as_reference(model, tmp_path / "model.pt", monkeypatch)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "model.pt", make_teacher())

    # the second block's, not the first's: one setting for all would convert it wrongly
    refused("t_scale=False has t_proj", lambda m: setattr(m.blocks[1], "t_scale", False))
    refused("got .*Sequential", lambda m: m.blocks[0].mlp.__setitem__(1, nn.Sequential()))
    refused("share heads.*4, .*8, ", lambda m: setattr(m.blocks[1].attn, "num_heads", 8))
    refused("share heads.*1e-05.*0.01", lambda m: setattr(m.blocks[1].norm2, "eps", 0.01))
    refused("belong to no block: .*extra", lambda m: m.register_buffer("extra", torch.ones(1)))
    refused("growing layers.*got \\[-1\\]", lambda m: setattr(m, "thresholds", [-1]))
    refused("not built like.*thresholds", lambda m: delattr(m, "thresholds"))
    refused("not built like.*attn", lambda m: delattr(m.blocks[0], "attn"))


def test_broken_files_are_refused_in_words(tmp_path):
    for name, message in (("a.pt", "not a whole torch file"), ("a.safetensors", "not a whole")):
        (tmp_path / name).write_text("hello world")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / name, make_teacher())
    for content in ({"blocks.0.norm1.weight": 3}, {1: torch.zeros(2)}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="must hold tensors by name"):
            convert_checkpoint(tmp_path / "a.pt", make_teacher(), phases=[12])
