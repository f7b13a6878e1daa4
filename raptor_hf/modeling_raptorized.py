"""Raptors inside other models: a trunk of shared blocks stands where a tower's layers stood.

A CLIP model with a trunk stays a `CLIPModel`: its own forward, its heads and its methods run as
they are, and call the trunk as they called the layers. This file travels to the Hub beside the
weights.
"""

import copy
import functools
import inspect
import shutil
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .configuration_raptor import (
    RaptorConfig,
    RaptorizedConfig,
    TeacherFamily,
    teacher_family,
)
from .modeling_raptor import LayerContext, RaptorBlock, RaptorPreTrainedModel


class RaptorApplication(nn.Module):
    """One application of a shared block, called as the layer of a teacher that it stands for."""

    def __init__(self, block: RaptorBlock, depth: int, family: TeacherFamily):
        nn.Module.__init__(self)  # it is a layer of the teacher by name alone, see `RaptorTrunk`
        object.__setattr__(self, "block", block)  # whose weights are the trunk's
        self.depth, self.family = depth, family
        self._is_hf_initialized = True  # there are no weights of its own

    __call__ = nn.Module.__call__  # the block itself checkpoints gradients

    def __reduce__(self):  # pickle finds no class that is made at run time
        return _unfilled, (_application_class, type(self).__mro__[2]), self.__dict__

    def forward(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor]:
        """Return the states (B, N, D) one layer deeper; `args` are what the teacher hands on."""
        depth = self.block.at(self.depth, states.device)
        states = self.block(states, depth, None, LayerContext.of_call(args, kwargs))
        return (states,) if self.family.returns_tuple else states


@functools.cache
def _application_class(layer_class: type[nn.Module]) -> type[RaptorApplication]:
    """Return the class of applications that stand for layers of a class, a subclass of both."""
    return type("RaptorApplication", (RaptorApplication, layer_class), {})


def _unfilled(make_class, base: type[nn.Module]) -> nn.Module:
    """Return a module of a class that is made at run time, for pickle to fill."""
    made = make_class(base)
    return made.__new__(made)


class RaptorTrunk(nn.Module):
    """Shared blocks in the place of a teacher's list of layers.

    Indexing and iterating give L applications, one for every layer.

    Args:
        config: of the Raptor whose blocks these are.
        layer_class: of the layers that stood there: what transformers looks for to record hidden
            states.
    """

    def __init__(self, config: RaptorConfig, layer_class: type[nn.Module]):
        super().__init__()
        family = teacher_family(config.teacher_config)
        application = _application_class(layer_class)
        self.config = config
        self.blocks = nn.ModuleList(RaptorBlock(config, span) for span in config.spans())
        self.applications = nn.ModuleList(
            application(self.blocks[config.phase_of(depth)], depth, family)
            for depth in range(1, config.num_hidden_layers + 1)
        )

    def __len__(self) -> int:
        return len(self.applications)

    def __iter__(self):
        return iter(self.applications)

    def __getitem__(self, index: int | slice):
        return self.applications[index]

    def forward(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Apply all, for models that call their layers as one module."""
        for application in self.applications:
            states = application(states, *args, **kwargs)
        return states


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def install_trunk(model: PreTrainedModel, config: RaptorizedConfig) -> RaptorTrunk:
    """Put a trunk in the place of a tower's layers; its weights are still to come."""
    tower = model.get_submodule(config.tower)
    path = teacher_family(tower.config).layers
    layers = tower.get_submodule(path)
    trunk = RaptorTrunk(config.raptor, type(layers[0])).train(tower.training)
    for block in trunk.blocks:
        block.attention.config = tower.config  # where `set_attn_implementation` notes it
    # hooks such as record hidden states; shared, so that their handles go on removing them
    for old, new in zip((layers, *layers), (trunk, *trunk), strict=True):
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(old, hooks))
    tower.set_submodule(path, trunk)
    tower.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
    model._no_split_modules = {*(model._no_split_modules or ()), "RaptorBlock"}
    return trunk


def _refuse_attentions(tower: PreTrainedModel, _args: tuple, kwargs: dict) -> None:
    """Raise a ValueError where attentions are asked for: transformers would return none of them."""
    if kwargs.get("output_attentions") or tower.config.output_attentions:
        raise ValueError(
            f"The attentions of blocks within a {type(tower).__name__} are not recorded: leave out "
            "output_attentions, or ask a RaptorModel for them."
        )


class _Raptorized:
    """What the class of a model with a trunk has beside its own."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install_trunk(self, config.raptorized)

    _load_pretrained_model = RaptorPreTrainedModel.__dict__["_load_pretrained_model"]

    def __reduce__(self):  # pickle would find the class that it was
        return _unfilled, (raptorized_class, type(self).__mro__[2]), self.__dict__

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as everywhere in transformers, with the code that loads the model again."""
        own, config = self.config, copy.deepcopy(self.config.raptorized)
        config.teacher_config = copy.deepcopy(own)
        del config.teacher_config.raptorized
        config.dtype = own.dtype
        reference = "modeling_raptorized.RaptorizedModel"
        models = dict.fromkeys(auto_classes(config.architecture), reference)
        config.auto_map = {"AutoConfig": "configuration_raptor.RaptorizedConfig", **models}
        self.config = config
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = own
        self._add_code_and_card(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # called within `save_pretrained(push_to_hub=True)`. What lay there before that began would
        # be left out.
        self._add_code_and_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _add_code_and_card(self, folder) -> None:
        """Copy the code into a folder with weights; write a card where there is none, or an empty
        one of transformers.
        """
        for part in (RaptorConfig, RaptorBlock, RaptorTrunk):
            shutil.copy(inspect.getsourcefile(part), folder)
        shutil.copy(
            Path(inspect.getsourcefile(RaptorBlock)).with_name("modeling_raptor_heads.py"), folder
        )
        card = Path(folder) / "README.md"
        if not card.exists() or _EMPTY_CARD in card.read_text(encoding="utf-8"):
            card.write_text(model_card(self), encoding="utf-8")


_EMPTY_CARD = "This model card has been automatically generated."
_CARD = """---
library_name: transformers
tags:
- raptor
---

# A {architecture} with {blocks} blocks for {layers} layers

The {layers} layers of `{tower}` are {blocks} blocks here, applied {phases} times in a row:
{parameters:.3g} M parameters in place of {replaced:.3g} M. All else is as it was.
Method: [arXiv 2512.19941](https://arxiv.org/abs/2512.19941).

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("THIS REPOSITORY", trust_remote_code=True)
```
"""


def model_card(model: PreTrainedModel) -> str:
    """Return a model card that says what the blocks stand for, and how the model is loaded."""
    config: RaptorizedConfig = getattr(
        model.config, "raptorized", model.config
    )  # while it is saved
    [trunk] = [module for module in model.modules() if isinstance(module, RaptorTrunk)]
    return _CARD.format(
        architecture=config.architecture,
        tower=config.tower or type(model).__name__,
        blocks=len(trunk.blocks),
        layers=len(trunk),
        phases=", ".join(map(str, config.raptor.phases)),
        parameters=sum(weight.numel() for weight in trunk.blocks.parameters()) / 1e6,
        replaced=(config.layer_parameters or 0) / 1e6,
        auto_class=auto_classes(config.architecture)[:2][-1],
    )


def auto_classes(architecture: str | None = None) -> list[str]:
    """Return the names of transformers' Auto classes of models: all, or those of an architecture.

    `AutoModel` is among them in any case, as the first. The second is the one for the task.
    """
    names = [n for n in dir(transformers) if n.startswith(("AutoModelFor", "AutoBackbone"))]
    tables = {name: getattr(getattr(transformers, name), "_model_mapping", None) for name in names}
    found = ["AutoModel"]
    for name, table in tables.items():
        listed = [] if table is None else table._model_mapping.values()
        loaded = {n for entry in listed for n in ([entry] if isinstance(entry, str) else entry)}
        if architecture in loaded or (architecture is None and table is not None):
            found.append(name)
    return found


@functools.cache
def raptorized_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of a model with a trunk: a subclass with the same name.

    The name stays, as transformers finds by it what a class can record.
    """
    if issubclass(model_class, _Raptorized):
        return model_class
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (_Raptorized, model_class), names)


class RaptorizedModel(RaptorPreTrainedModel):
    """How transformers' Auto classes load a model with a trunk: as the class that it was."""

    config_class = RaptorizedConfig

    @classmethod
    def from_pretrained(cls, name_or_path, *args, config: RaptorizedConfig | None = None, **kwargs):
        """Load as everywhere in transformers, from safetensors only.

        Returns:
            A model of the class that was saved, `config.architecture`.

        Raises:
            ValueError: an architecture that transformers has not, or weights in other files.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("The weights of a Raptor are read from safetensors, never a pickle.")
        if not isinstance(config, RaptorizedConfig):
            hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir") if k in kwargs}
            config = RaptorizedConfig.from_pretrained(name_or_path, **hub)
        model_class, own = cls._class_and_config(config)
        return model_class.from_pretrained(
            name_or_path, *args, config=own, use_safetensors=True, **kwargs
        )

    @classmethod
    def _from_config(cls, config: RaptorizedConfig, **kwargs):
        model_class, own = cls._class_and_config(config)
        return model_class._from_config(own, **kwargs)

    @staticmethod
    def _class_and_config(config: RaptorizedConfig) -> tuple:
        """Return the class of the model that was saved, and its own configuration."""
        model_class = getattr(transformers, config.architecture or "", None)
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise ValueError(
                f"The model is a {config.architecture!r}, which transformers "
                f"{transformers.__version__} does not have. Install a version that does."
            )
        own = copy.deepcopy(config.teacher_config)
        own.raptorized = config
        return raptorized_class(model_class), own


__all__ = ["RaptorTrunk", "RaptorizedModel", "install_trunk", "raptorized_class"]
