"""Put a Raptor's blocks into another model, in the place of its vision tower's layers."""

import copy
import functools
import json
import warnings
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.output_capturing import install_output_capuring_hook

from ..configuration_raptor import RaptorConfig, teacher_family
from ..modeling_raptor import RaptorBlock
from ..runs.files import read_json, write_json
from ..runs.folder import apply_umask
from .checks import check_weights
from .layers import layer_parts
from .loading import find_tower
from .making import make_raptor

# names that transformers does not look for: its classes would put random layers for the blocks
_DESCRIPTION, _WEIGHTS = "raptorized.json", "raptorized.safetensors"


class RaptorTrunk(nn.Module):
    """Shared blocks in the place of a teacher's list of layers.

    Its items are functions that are called like a layer. Each looks its block up when it is called,
    so that a block that is replaced or wrapped is used.
    """

    def __init__(self, config: RaptorConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(RaptorBlock(config) for _ in config.phases)
        self.depths = range(1, config.num_hidden_layers + 1)
        for block in self.blocks:  # where transformers looks for hidden states
            install_output_capuring_hook(block, "hidden_states", index=0)

    def __len__(self) -> int:
        return len(self.depths)

    def __getitem__(self, index: int | slice):
        if not isinstance(index, slice):
            return functools.partial(self.apply_block, self.depths[index])
        part = copy.copy(self)  # with the same blocks
        part.depths = self.depths[index]
        return part

    def apply_block(self, depth: int, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Return states (B, N, D) one layer deeper; of a layer's other arguments angles count."""
        angles = None
        for argument in (kwargs.get("position_embeddings"), *args):
            if isinstance(argument, (tuple, list)):
                angles = argument
        block = self.blocks[self.config.phase_of(depth)]
        depth = torch.full((1,), depth, device=states.device)
        return block(states, depth, None, angles)


def raptorize(
    model: PreTrainedModel,
    phases: list[int] | None = None,
    blocks: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Replace the layers of a model's vision tower by a few shared blocks, in place.

    The model keeps its class, its configuration and its other weights: a `CLIPModel` still gives
    `logits_per_image`, a vision language model generates. `save_raptorized` saves it.

    Args:
        model: of any class of transformers, with one vision tower of a family that can teach; of
            several, give the tower itself.
        phases: number of layers that each block stands for, for untrained blocks.
        blocks: a Raptor that was distilled from this tower; its blocks are copied.

    Attentions are not recorded within it, and `num_applications` of the blocks is not looked at.

    Raises:
        ValueError: a model without such a tower or with several, a tower that is offloaded or
            quantised, phases that don't sum to its depth, or blocks for another kind of tower.

    Returns:
        The model itself.
    """
    # the tower, and a Raptor that belongs into it
    tower = find_tower(model)
    check_weights(tower)
    if (phases is None) == (blocks is None):
        raise ValueError("Give either phases, such as [7, 3, 2], or blocks that were distilled.")
    if blocks is None:
        raptor = make_raptor(tower, phases)
    else:
        _check_blocks(blocks, tower)
        raptor = blocks.base_model
        # no error: a model that was fine-tuned from their teacher has moved its embeddings, too
        if differing := differing_weights(raptor, tower):
            warnings.warn(
                f"{len(differing)} weights around the layers of this {type(tower).__name__} differ "
                f"from those that the blocks were distilled with ({', '.join(differing[:3])} …): "
                "the blocks make nothing of the states of another teacher.",
                stacklevel=2,
            )

    # device, dtype and frozen weights are those of the layers that go
    like = next(tower.parameters())
    layers = tower.get_submodule(teacher_family(tower.config).layers)
    trained = any(weight.requires_grad for weight in layers.parameters())
    trunk = _install_trunk(tower, RaptorConfig.from_dict(_fields(raptor.config)))
    trunk.blocks.load_state_dict(raptor.blocks.state_dict())
    trunk.to(device=like.device, dtype=like.dtype).requires_grad_(trained)
    model._no_split_modules = {*(model._no_split_modules or ()), "RaptorBlock"}
    model.save_pretrained = _refuse_saving
    return model


def save_raptorized(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a model with a trunk of all layers for `load_raptorized`, as JSON and safetensors."""
    trunks = {path: m for path, m in model.named_modules() if isinstance(m, RaptorTrunk)}
    if len(trunks) != 1:
        raise ValueError(f"{type(model).__name__} has {len(trunks)} trunks; raptorize it first.")
    [(path, trunk)] = trunks.items()
    layers = trunk.config.num_hidden_layers
    if len(trunk) != layers:
        raise ValueError(f"Of the trunk's {layers} layers {len(trunk)} are left.")
    # where it belongs, and the two configurations
    family = teacher_family(trunk.config.teacher_config)
    description = {
        "architecture": type(model).__name__,
        "tower": path.removesuffix(family.layers).removesuffix("."),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": _fields(model.config),
        "raptor": _fields(trunk.config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _DESCRIPTION, description)
    save_model(model, str(folder / _WEIGHTS), metadata={"format": "pt"})
    apply_umask(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_raptorized(name_or_path: str | Path, revision: str | None = None) -> PreTrainedModel:
    """Load a model that `save_raptorized` saved, in evaluation mode.

    Args:
        name_or_path: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        files = ["*.json", _WEIGHTS]
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=files))

    # the model from its configuration, its trunk, then all weights
    description = read_json(folder / _DESCRIPTION)
    model_class = getattr(transformers, description["architecture"])
    fields = description["model"]
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    with no_init_weights():
        model = model_class._from_config(config, dtype=getattr(torch, description["dtype"]))
        tower = model.get_submodule(description["tower"])
        trunk = _install_trunk(tower, RaptorConfig.from_dict(description["raptor"]))
        trunk.to(model.dtype)
    load_model(model, folder / _WEIGHTS)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _fields(config: PreTrainedConfig) -> dict:
    """Return a configuration as JSON data, without the local folders that it came from."""
    fields = json.loads(config.to_json_string())
    for part in (fields, *fields.values()):
        if isinstance(part, dict):
            part.pop("_name_or_path", None)
    return fields


def _install_trunk(tower: PreTrainedModel, config: RaptorConfig) -> RaptorTrunk:
    """Put a trunk in the place of a tower's layers; its weights are still to come."""
    trunk = RaptorTrunk(config).train(tower.training)
    for block in trunk.blocks:
        block.attention.config = tower.config  # where `set_attn_implementation` writes
    tower.set_submodule(teacher_family(tower.config).layers, trunk)
    return trunk


def _refuse_saving(*_args, **_kwargs) -> None:
    """Raise a ValueError: transformers would load random layers for the blocks."""
    raise ValueError(
        "transformers would load this model with random layers in the place of its blocks. Save it "
        "with raptor_hf.save_raptorized."
    )


def _check_blocks(blocks: PreTrainedModel, tower: PreTrainedModel) -> None:
    """Refuse blocks that were made for another kind of tower, with a ValueError."""
    if blocks.config.model_type != "raptor":
        raise ValueError(
            "blocks must be a Raptor that was distilled from this tower, such as "
            f"RaptorModel.from_pretrained gives; got a {type(blocks).__name__}."
        )
    # a block computes with these, and weights of the same shape don't tell them
    ours, theirs = blocks.config.teacher_config, tower.config
    fields = ["model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"]
    fields += ["num_channels", "patch_size", "image_size", "norm_type", layer_parts(ours).eps]
    for name in fields:
        made, found = getattr(ours, name, None), getattr(theirs, name, None)
        if made != found:
            raise ValueError(f"The blocks were made for {name}={made}; the tower has {found}.")


def check_same_shell(
    raptor: PreTrainedModel, teacher: PreTrainedModel, *, name: str, teacher_name: str
) -> None:
    """Refuse a Raptor beside another teacher than its own; a ValueError names both."""
    if differing := differing_weights(raptor, teacher):
        raise ValueError(
            f"{name} was made from another teacher than {teacher_name}: their "
            f"{', '.join(differing[:3])} differ. Give its own teacher."
        )


@torch.no_grad()
def differing_weights(raptor: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Return the names of the weights around the layers in which a Raptor and a teacher differ.

    There are none where the Raptor was made from this teacher, but for the rounding of bfloat16.
    """
    weights = raptor.shell.state_dict()
    differing = []
    for name, theirs in teacher.state_dict().items():
        ours = weights.get(name, theirs)
        if ours.is_meta or not ours.is_floating_point():
            continue
        ours, theirs = ours.cpu().float(), theirs.cpu().float()
        # 2⁻⁸: one of the two may be in bfloat16
        if ours.shape != theirs.shape or (ours - theirs).norm() > 2**-8 * theirs.norm():
            differing.append(name)
    return differing
