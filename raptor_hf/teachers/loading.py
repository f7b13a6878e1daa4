"""Teachers and Raptors from a folder or the Hub: bare, frozen, in evaluation mode and float32."""

from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_raptor import TEACHER_FAMILIES, teacher_family, tower_config
from ..modeling_raptor import bare_teacher
from ..runs.files import public_name
from ..weights import check_weight_files, weights_digest
from .layers import find_part


def load_backbone(name_or_path: str) -> PreTrainedModel:
    """Load a Raptor, or a teacher of RGB images of a family that a Raptor can be made of.

    Arguments and errors as `load_vision_model`; a ValueError refuses other models.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    config = getattr(config, "teacher_config", tower_config(config))
    teacher_family(config)
    if getattr(config, "num_channels", 3) != 3:
        raise ValueError(f"{name_or_path} takes {config.num_channels} channels; images have 3.")
    return load_vision_model(name_or_path)


def load_vision_model(name_or_path: str) -> PreTrainedModel:
    """Load any vision model without its head, frozen, in evaluation mode and float32.

    Args:
        name_or_path: a Hub id or a local folder; of a classifier, or of a model with a vision tower
            (CLIP, LLaVA, Depth Anything), the backbone within it is taken.

    Raises:
        ValueError: a model that `AutoModel` does not know, or weights that are missing or pickled.
        OSError: no such model, or one without weights in safetensors.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    check_weight_files(name_or_path, config)

    # a model around a tower is loaded whole: AutoModel can't take every tower out of it
    composite = tower_config(config) is not config
    class_name = "AutoModel"
    if composite:
        class_name = (config.architectures or ["AutoModel"])[0]
    elif config.model_type in TEACHER_FAMILIES:
        class_name = TEACHER_FAMILIES[config.model_type].model_class or "AutoModel"
    options = {"dtype": torch.float32, "use_safetensors": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning of a classifier's head that is left out
    try:
        model_class = getattr(transformers, class_name)
        model, loaded = model_class.from_pretrained(
            name_or_path, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)

    # a classifier may lack a pooler: no state needs it, and random weights would change the digest
    # of the teacher every time
    missing = loaded["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler, missing = None, set()
    if missing or loaded["mismatched_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of its own model: "
            f"{sorted(missing)[:5]} … Download or save it again."
        )
    # as `AutoModel` gives it: some towers give feature maps alone
    if composite:
        tower = find_tower(model)
        weights = tower.state_dict()
        model = bare_teacher(tower.config, tower.config.num_hidden_layers)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.name_or_path = model.config.name_or_path = str(name_or_path)

    # copied from the file that they are mapped from: kernels choose their way by the alignment of
    # the address, and equal weights of two mapped files may differ in the last bits of the states
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    if getattr(model.config, "mask_ratio", 0):  # MAE masks in evaluation, too
        model.config.mask_ratio = 0.0
    return model.eval().requires_grad_(False)


def find_tower(model: nn.Module) -> PreTrainedModel:
    """Return the one vision tower within a model, or itself, whose layers blocks can replace.

    Raises:
        ValueError: there is none, or there are several.
    """
    towers = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type in TEACHER_FAMILIES:
            family = TEACHER_FAMILIES[module.config.model_type]
            if find_part(module, family.layers):  # not an empty shell
                towers[path] = module
    if len(towers) != 1:
        raise ValueError(
            f"A {type(model).__name__} must have one vision tower of the families "
            f"{', '.join(TEACHER_FAMILIES)}; it has {list(towers)}. Of several give one itself."
        )
    [tower] = towers.values()
    return tower


def hub_commit(name_or_path: str) -> str | None:
    """Return the commit of a loaded Hub model, from the local cache; None for a local folder."""
    if not Path(name_or_path).is_dir():
        config = try_to_load_from_cache(name_or_path, "config.json")
        if isinstance(config, str):
            return Path(config).parent.name
    return None


def teacher_identity(teacher: PreTrainedModel) -> dict[str, str | None]:
    """Return name (no path of this machine), Hub commit and digest of the weights of a teacher."""
    return {
        "name": public_name(teacher.name_or_path),
        "revision": hub_commit(teacher.name_or_path),
        "weights_sha256": weights_digest(teacher),
    }
