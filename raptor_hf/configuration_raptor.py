"""The configuration of a Raptor: its teacher's, and the blocks that replace the layers.

This file and the two `modeling_raptor*.py` are saved with every model: they import torch,
transformers and each other, and nothing else of this package.
"""

import copy
import difflib
from typing import Literal, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


class TeacherFamily(NamedTuple):
    """Where the models of one family of transformers keep the parts that a Raptor takes over."""

    # path of the list of layers
    layers: str
    # paths of the modules that make state 0 of images, one after the other
    embeddings: tuple[str, ...] = ("embeddings",)
    # path of the norm after the last layer, and whether `last_hidden_state` is after it
    final_norm: str | None = "layernorm"
    output_normed: bool = True
    # tokens before the patches: a number, or its name in the configuration
    cls: int | str = 1
    registers: int | str = 0
    # may images have another size than the teacher's own? asked: with `interpolate_pos_encoding`
    resizing: Literal["always", "asked", "never"] = "always"
    # the embeddings drop and shuffle patches by a noise (MAE)
    masks: bool = False
    # class in transformers, where `AutoModel` does not know the family
    model_class: str | None = None
    # changes of the configuration for embeddings without parts that a Raptor does not need
    shell: dict = {}


_VIT = TeacherFamily("layers", resizing="asked")
_CLIP = TeacherFamily(
    "encoder.layers",
    embeddings=("embeddings", "pre_layrnorm"),  # spelt so in transformers
    final_norm="post_layernorm",
    output_normed=False,
    resizing="asked",
)
_DINOV2 = TeacherFamily("encoder.layer")
# by `model_type` of the configuration
TEACHER_FAMILIES = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2._replace(registers="num_register_tokens"),
    "dinov3_vit": TeacherFamily("model.layer", final_norm="norm", registers="num_register_tokens"),
    "vit": _VIT,
    "deit": _VIT._replace(registers=1),  # the token of distillation
    "vit_msn": _VIT,
    "vit_mae": _VIT._replace(masks=True, shell={"mask_ratio": 0.0}),
    "ijepa": _VIT._replace(cls=0),
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP._replace(model_class="MetaClip2VisionModel"),
    "chinese_clip_vision_model": _CLIP,
    "mlcd_vision_model": _CLIP._replace(resizing="always"),
    "siglip_vision_model": _CLIP._replace(
        embeddings=("embeddings",), output_normed=True, cls=0, shell={"vision_use_head": False}
    ),
    "aimv2_vision_model": TeacherFamily(
        "encoder.layers", final_norm="rms_norm", cls=0, resizing="never", shell={"use_head": False}
    ),
    "internvl_vision": _DINOV2,
    "radio": TeacherFamily(
        "encoder.layer",
        embeddings=("input_conditioner", "embeddings"),
        final_norm=None,
        cls="num_cls_tokens",
        registers="num_registers",
    ),
    "tipsv2_vision_model": _DINOV2._replace(registers="num_register_tokens"),
}

# fields of earlier versions, and their values in plain models; others (...) have no effect
_REMOVED = {
    "correction_rank": 0, "correction_on": ..., "ffn_experts": 1, "position_bias": False,
    "exit_angle": None, "semantic_loss_ignore_index": 255, "initializer_range": ..., "qk_norm": ...,
}  # fmt: skip


class TokenLayout(NamedTuple):
    """Numbers of tokens before the patches of a state, in their order: cls, registers."""

    num_cls: int
    num_registers: int

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the first patch."""
        return self.num_cls + self.num_registers

    def groups(self) -> dict[str, slice]:
        """Return the non-empty token groups as slices of a state's token axis (…, N, D)."""
        groups = {}
        if self.num_cls:
            groups["cls"] = slice(0, self.num_cls)
        if self.num_registers:
            groups["registers"] = slice(self.num_cls, self.num_prefix_tokens)
        groups["patches"] = slice(self.num_prefix_tokens, None)
        return groups


def teacher_family(teacher_config: PreTrainedConfig) -> TeacherFamily:
    """Return the row of `TEACHER_FAMILIES` for a teacher; a ValueError if there is none."""
    if teacher_config.model_type not in TEACHER_FAMILIES:
        raise ValueError(
            f"A Raptor's teacher must be one of {', '.join(TEACHER_FAMILIES)}; got a model of type "
            f"{teacher_config.model_type!r}. docs/families.md says why others can't teach."
        )
    return TEACHER_FAMILIES[teacher_config.model_type]


def tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that describes a model's vision tower, or itself."""
    for name in ("vision_config", "backbone_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """Return the token layout of the states of a teacher or a Raptor."""
    teacher_config = getattr(config, "teacher_config", config)
    family = teacher_family(teacher_config)
    numbers = []
    for number in (family.cls, family.registers):
        if isinstance(number, str):  # a field of the configuration
            number = getattr(teacher_config, number)
        numbers.append(number)
    return TokenLayout(*numbers)


def phase_spans(phases: list[int]) -> list[tuple[int, int]]:
    """Return lengths of phases as spans: a block of (start, stop) makes layers start + 1 … stop."""
    spans, start = [], 0
    for length in phases:
        spans.append((start, start + length))
        start += length
    return spans


def _of_teacher(name: str, doc: str) -> property:
    """Return a read-only field that is kept in `teacher_config` only."""

    def read(config: "RaptorConfig") -> object:
        return getattr(config.teacher_config, name)

    def refuse(config: "RaptorConfig", value: object) -> None:
        raise ValueError(
            f"A Raptor's {name} is its teacher's, and can't be set (to {value!r}). "
            "raptor_hf.make_raptor makes a Raptor of a teacher."
        )

    return property(read, refuse, doc=doc)


class RaptorConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a `RaptorModel`.

    Everything that belongs to the teacher (image and patch size, channels, width, heads, registers,
    the final norm's eps) is in `teacher_config` only; the properties below read it there.

    Args:
        teacher_config: configuration of the teacher (or a dict of it with its `model_type`).
        phases: number of consecutive layers that each block stands for; they sum to the teacher's
            depth L. With `[7, 3, 2]` block 0 makes layers 1-7, block 1 layers 8-10, block 2 layers
            11-12.
        ffn: `"swiglu"` (three linear layers, one of them a gate), or the activation between two
            linear layers: `"gelu"` or another one of transformers.
        intermediate_size: hidden width of the FFN. None takes the width at which a block costs as
            much as a teacher's layer with a 4·D GELU FFN: 4·D for gelu, 8/3·D for swiglu.
        depth_scaling: let the layer index scale a block's branches and output (paper, App. A.3).
        layerscale_value: initial value of both LayerScales.
        block_norm: `"layernorm"` or `"rmsnorm"` in the blocks.
        block_norm_eps: its eps (the final norm keeps the teacher's own).
        biases: names of the linear layers of a block that have a bias, of "query", "key", "value",
            "output", "fc1" and "fc2"; None: all.
        weight_bits: the matrices of the blocks have values of so many bits, in groups of 32 inputs
            with a float16 scale each (`--quantize`); None: any values.
        num_applications: apply blocks for the first so many layers only; None: for all L.
            `hidden_states` has L + 1 entries in any case: later ones repeat the last state.
        depth_bins: number of equally wide bins that a depth head chooses among.
        min_depth, max_depth: the range of these bins in metres.
        out_features, out_indices: of a `RaptorBackbone`: layers whose states are feature maps, as
            names ("stem", "stage1", …) or numbers (0 … L); default: the last layer.
        apply_layernorm: apply the final norm to these maps.
        reshape_hidden_states: give them as (B, D, h, w) rather than tokens (B, 1 + h·w, D).

    Raises:
        ValueError: phases that are empty, not positive or do not sum to the teacher's depth; a
            teacher of an unknown family; an unknown ffn; an empty range of depths; too many or too
            few applications; a misspelt argument, or one that earlier versions had.
    """

    model_type = "raptor"
    sub_configs = {"teacher_config": AutoConfig}
    keys_to_ignore_at_inference = ["hidden_states"]

    teacher_config: dict | PreTrainedConfig | None = None
    phases: list[int] | tuple[int, ...] = (7, 3, 2)
    ffn: str = "gelu"
    intermediate_size: int | None = None
    depth_scaling: bool = True
    layerscale_value: float = 1e-5
    block_norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    block_norm_eps: float = 1e-6
    biases: list[str] | None = None
    weight_bits: int | None = None
    num_applications: int | None = None
    depth_bins: int = 256
    min_depth: float = 0.001
    max_depth: float = 10.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    # of transformers' backbones
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    # read from the teacher's configuration
    num_hidden_layers = _of_teacher("num_hidden_layers", "Number of applications L.")
    hidden_size = _of_teacher("hidden_size", "Number of channels D.")
    num_attention_heads = _of_teacher("num_attention_heads", "Attention heads of every block.")
    image_size = _of_teacher("image_size", "Side length in pixels of the images, or both sides.")
    patch_size = _of_teacher("patch_size", "Side length in pixels of a patch, or both sides.")
    num_channels = _of_teacher("num_channels", "Colour channels of an image.")

    def __post_init__(self, **kwargs):
        # the teacher's configuration: a copy, as a Raptor sets its attention implementation there
        if self.teacher_config is None:
            self.teacher_config = {"model_type": "dinov2_with_registers"}
        if isinstance(self.teacher_config, dict):
            fields = dict(self.teacher_config)
            self.teacher_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            self.teacher_config = copy.deepcopy(self.teacher_config)
        self.phases = [int(length) for length in self.phases]  # JSON knows no tuples, no numpy

        # transformers keeps arguments of any name: refuse those that would be ignored
        maps = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        for name, plain in _REMOVED.items():
            value = kwargs.pop(name, plain)
            if plain is not ... and value != plain:
                raise ValueError(
                    f"{name}={value!r} is no longer supported (it was, up to commit 67ff351 of "
                    "raptor_hf): leave it out, or train the model without it."
                )
        fields = [name.removeprefix("_") for name in RaptorConfig.__annotations__]
        for name in kwargs:
            if similar := difflib.get_close_matches(name, fields, 1, cutoff=0.8):
                raise ValueError(f"RaptorConfig has no {name!r}; did you mean {similar[0]!r}?")

        super().__post_init__(**kwargs)
        self.check_values()
        self.set_output_features_output_indices(**maps)

    def check_values(self) -> None:
        """Refuse phases that do not cover the teacher's layers exactly, and other wrong values.

        The model calls it again: overrides of `from_pretrained` are set after `__post_init__`.
        """
        teacher_family(self.teacher_config)
        # phases cover the teacher's layers
        depth = self.teacher_config.num_hidden_layers
        if any(length < 1 for length in self.phases) or sum(self.phases) != depth:
            raise ValueError(
                "phases must be positive numbers of layers that sum to the teacher's "
                f"{depth} layers; got {list(self.phases)}, which sums to {sum(self.phases)}."
            )
        # blocks, and how often they are applied
        if self.ffn != "swiglu" and self.ffn not in ACT2FN:
            raise ValueError(
                "ffn must be 'gelu', 'swiglu' or another activation of transformers, such as "
                f"'quick_gelu'; got {self.ffn!r}."
            )
        if self.num_applications is not None and not 1 <= self.num_applications <= depth:
            raise ValueError(
                f"num_applications must lie in 1 … {depth}, the teacher's layers; got "
                f"{self.num_applications}."
            )
        # the range of a depth head
        if self.depth_bins < 1 or not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                "A depth head needs depth_bins ≥ 1 and 0 < min_depth < max_depth (metres); got "
                f"{self.depth_bins}, {self.min_depth}, {self.max_depth}."
            )

    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's feature maps: "stem", then "stage1" … "stageL"."""
        return ["stem"] + [f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1)]

    @property
    def ffn_size(self) -> int:
        """Hidden width of the FFN: `intermediate_size`, or the width of equal cost."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.ffn != "swiglu":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 3 // 8) * 8  # a multiple of 8, as DINOv2's own SwiGLU

    def spans(self) -> list[tuple[int, int]]:
        """Return the spans (start, stop) of the phases, see `phase_spans`."""
        return phase_spans(self.phases)

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of the linear layers of a block, by their names."""
        size, hidden = self.hidden_size, self.ffn_size
        fc1_outputs = 2 * hidden if self.ffn == "swiglu" else hidden
        return {
            "qkv": (size, 3 * size),
            "proj": (size, size),
            "fc1": (size, fc1_outputs),
            "fc2": (hidden, size),
        }

    def has_bias(self, name: str) -> bool:
        """Return whether a linear layer of a block has a bias, see `biases`."""
        return self.biases is None or name in self.biases

    def phase_of(self, depth: int) -> int:
        """Return the index of the block that makes layer `depth`.

        Raises:
            ValueError: not a layer from 1 to L.
        """
        for phase, (start, stop) in enumerate(self.spans()):
            if start < depth <= stop:
                return phase
        raise ValueError(f"depth must be a layer from 1 to {self.num_hidden_layers}; got {depth}.")
