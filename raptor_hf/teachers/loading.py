"""Teachers and Raptors from a folder or the Hub: bare, frozen, in evaluation mode and float32."""

from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_raptor import TEACHER_FAMILIES, teacher_family, tower_config
from ..modeling_raptor import bare_teacher
from ..runs.files import public_name
from ..weights import check_weight_files, weights_digest
from .layers import find_part


def load_backbone(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a frozen teacher or Raptor, without a task head, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; of a classifier, or of a model with a vision tower
            (CLIP, LLaVA, Depth Anything), the backbone within it is taken.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a model of a family that a Raptor can't be made of, one of images that are not
            in RGB, or weights that are missing.
        OSError: no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    config = getattr(config, "teacher_config", tower_config(config))
    teacher_family(config)
    if getattr(config, "num_channels", 3) != 3:
        raise ValueError(f"{name_or_path} takes {config.num_channels} channels; images have 3.")
    return load_vision_model(name_or_path, revision)


def load_vision_model(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Load any vision model without its head, frozen, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; of a model with a vision tower (CLIP, LLaVA, Depth
            Anything) this tower is taken.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a model that `AutoModel` does not know, or weights that are missing or pickled.
        OSError: no such model, or one without weights in safetensors.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    check_weight_files(name_or_path, config, revision)
    options = {"revision": revision, "dtype": torch.float32, "use_safetensors": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning of a classifier's head that is left out
    try:
        model = _load_alone(name_or_path, tower_config(config), **options)
    except (ValueError, KeyError):
        if tower_config(config) is config:
            raise
        # some towers AutoModel can't load by themselves, or not out of the weights of a whole model
        model = _load_within(name_or_path, config, **options)
    finally:
        logging.set_verbosity(verbosity)
    # copied from the file that they are mapped from: kernels choose their way by the alignment of
    # the address, and equal weights of two mapped files may differ in the last bits of the states
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    if getattr(model.config, "mask_ratio", 0):  # MAE masks in evaluation, too
        model.config.mask_ratio = 0.0
    return model.eval().requires_grad_(False)


def _load_alone(name_or_path: str, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """Load a backbone by its own configuration; a ValueError names weights that are missing."""
    # the class, and the weights that it lacks
    family = TEACHER_FAMILIES.get(config.model_type)
    model_class = AutoModel
    if family is not None and family.model_class:
        model_class = getattr(transformers, family.model_class)
    model, loaded = model_class.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **options
    )
    missing = loaded["missing_keys"]

    if missing and all(key.startswith("pooler.") for key in missing):
        # the backbone of a classifier that was trained without this pooler: no state needs it, and
        # random weights would change the digest of the teacher every time
        model.pooler, missing = None, set()
    if missing or loaded["mismatched_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of its own model: "
            f"{sorted(missing)[:5]} … Download or save it again."
        )
    return model


def _load_within(name_or_path: str, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """Load a whole model and return its vision tower as a bare backbone.

    Raises:
        ValueError: a class that transformers has not, or a model without one such tower.
    """
    name = (config.architectures or [config.model_type])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{name_or_path} is a {name}, which transformers does not have.")
    towers = list(find_towers(model_class.from_pretrained(name_or_path, **options)).values())
    if len(towers) != 1:
        raise ValueError(
            f"{name_or_path}, a {name}, must have one vision tower of a family that can teach "
            f"({', '.join(TEACHER_FAMILIES)}); it has {len(towers)}."
        )
    weights, config = towers[0].state_dict(), towers[0].config
    bare = bare_teacher(config, config.num_hidden_layers)
    bare.load_state_dict({key: weights[key] for key in bare.state_dict()})
    bare.name_or_path = config.name_or_path = str(name_or_path)
    return bare


def find_towers(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the vision towers within a model whose layers blocks can replace, by their path."""
    towers = {}
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        family = TEACHER_FAMILIES.get(module.config.model_type)
        if family is not None and find_part(module, family.layers):  # not an empty shell
            towers[path] = module
    return towers


def hub_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """Return the commit of a loaded Hub model, from the local cache; None for a local folder."""
    if Path(name_or_path).is_dir():
        return None
    config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    return Path(config).parent.name


def teacher_identity(
    teacher: PreTrainedModel, revision: str | None = None
) -> dict[str, str | None]:
    """Return name (no path of this machine), Hub commit and digest of the weights of a teacher."""
    return {
        "name": public_name(teacher.name_or_path),
        "revision": hub_commit(teacher.name_or_path, revision),
        "weights_sha256": weights_digest(teacher),
    }
