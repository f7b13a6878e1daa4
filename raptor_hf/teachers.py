"""Teachers: any supported Vision Transformer of transformers, local or from the Hub."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.utils import logging

from .configuration_raptor import teacher_family


def load_backbone(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """A frozen teacher or Raptor, without a task head, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; a folder with a classifier gives its backbone.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a model of a family that a Raptor can't be made of, or weights that are missing.
        OSError: no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    teacher_family(getattr(config, "teacher_config", config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a classifier's head that is not wanted here is no warning
    try:
        model, loaded = AutoModel.from_pretrained(
            name_or_path, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of its own model: "
            f"{sorted(loaded['missing_keys'])[:5]} … Download or save it again."
        )
    return model.eval().requires_grad_(False)


def load_processor(name_or_path: str, revision: str | None = None):
    """The image processor that belongs to a teacher or a Raptor."""
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision)


def hub_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """Commit of a loaded Hub model, read off the local cache; None for a local folder."""
    if Path(name_or_path).is_dir():
        return None
    config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def teacher_identity(
    teacher: PreTrainedModel, revision: str | None = None
) -> dict[str, str | None]:
    """What an activation dataset remembers of its teacher: name, Hub commit, weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "name": teacher.name_or_path,
        "revision": hub_commit(teacher.name_or_path, revision),
        "weights_sha256": digest.hexdigest(),
    }


@torch.no_grad()
def trajectory(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """All states before the final norm: (B, C, H, W) to (B, L + 1, N, D)."""
    return torch.stack(model(pixel_values, output_hidden_states=True).hidden_states, dim=1)
