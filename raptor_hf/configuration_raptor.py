"""The configuration of a Raptor: its teacher's, and how few blocks replace its layers.

This file and the two `modeling_raptor*.py` travel with every model to the Hub: they import torch,
transformers and each other, and nothing else of this package.
"""
# Over 300 lines: the table of teachers travels with it.

import copy
import difflib
from typing import Literal, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


class TeacherFamily(NamedTuple):
    """Where the models of one family in transformers keep what a Raptor takes over.

    Args:
        layers: path of the list of layers.
        embeddings: paths of what makes state 0 of images, one module or method after the other.
        final_norm: path of the norm after the last layer; None: the model has none.
        output_normed: whether the model's own `last_hidden_state` is after that norm.
        cls, registers: tokens before the patches: a number, or its name in the configuration.
        resizing: whether images may have another size than the teacher was made for: `"always"`,
            `"asked"` (with `interpolate_pos_encoding`) or `"never"`.
        context: layers are handed more than states: rotary angles, or a bias of the attention.
        described: the configuration does not say how large the model is: see `describe`.
        returns_tuple: a layer returns its state as the first of a tuple.
        masks: the embeddings drop and shuffle patches by a noise (MAE).
        model_class: of transformers, where `AutoModel` does not know the family.
        shell: changes of the configuration for embeddings without what a Raptor does not need.
    """

    layers: str
    embeddings: tuple[str, ...] = ("embeddings",)
    final_norm: str | None = "layernorm"
    output_normed: bool = True
    cls: int | str = 1
    registers: int | str = 0
    resizing: Literal["always", "asked", "never"] = "always"
    context: bool = False
    described: bool = False
    returns_tuple: bool = False
    masks: bool = False
    model_class: str | None = None
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
_BEIT = TeacherFamily("layers", context=True)
# by `model_type` of the configuration
TEACHER_FAMILIES = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2._replace(registers="num_register_tokens"),
    "dinov3_vit": TeacherFamily(
        "model.layer", final_norm="norm", registers="num_register_tokens", context=True
    ),
    "vit": _VIT,
    "deit": _VIT._replace(registers=1),  # the token of distillation
    "vit_msn": _VIT,
    "vit_mae": _VIT._replace(masks=True, shell={"mask_ratio": 0.0}),
    "ijepa": _VIT._replace(cls=0),
    "beit": _BEIT,
    "data2vec-vision": _BEIT._replace(layers="encoder.layer", returns_tuple=True),
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP._replace(model_class="MetaClip2VisionModel"),
    "chinese_clip_vision_model": _CLIP,
    "mlcd_vision_model": _CLIP._replace(resizing="always", context=True),
    "siglip_vision_model": _CLIP._replace(
        embeddings=("embeddings",), output_normed=True, cls=0, shell={"vision_use_head": False}
    ),
    "aimv2_vision_model": TeacherFamily(
        "encoder.layers",
        final_norm="rms_norm",
        cls=0,
        resizing="never",
        shell={"use_head": False},
    ),
    "internvl_vision": _DINOV2,
    "radio": TeacherFamily(
        "encoder.layer",
        embeddings=("input_conditioner", "embeddings"),
        final_norm=None,
        cls="num_cls_tokens",
        registers="num_registers",
    ),
    "timm_wrapper": TeacherFamily(  # the VisionTransformer of timm
        "timm_model.blocks",
        embeddings=("timm_model.patch_embed", "timm_model._pos_embed", "timm_model.norm_pre"),
        final_norm="timm_model.norm",
        cls="num_cls_tokens",
        registers="num_registers",
        resizing="never",
        described=True,
    ),
    "tipsv2_vision_model": _DINOV2._replace(registers="num_register_tokens"),
}

# model types that are no plain Vision Transformers, and why blocks can't stand for their layers
_REFUSED = {
    **dict.fromkeys(
        ("swin", "swinv2", "hiera", "pvt", "pvt_v2", "cvt", "levit", "convnext", "convnextv2",
         "focalnet", "donut-swin", "mobilevit", "mobilevitv2", "segformer", "resnet"),
        "the width or the number of its tokens changes with depth",
    ),
    **dict.fromkeys(
        ("sam_vision_model", "vitdet", "sam3_vit_model", "sam_hq_vision_model"),
        "it mixes layers with windows and global ones, whose weights differ in shape",
    ),
    "sapiens2": "its layers have unlike numbers of heads for key and value",
    "yolos": "it has tokens after the patches, and adds positions between its layers",
    **dict.fromkeys(
        ("siglip2_vision_model", "idefics3_vision", "smolvlm_vision", "pixtral"),
        "it takes images cut into patches and padded, with a mask, and no plain pixels",
    ),
    **dict.fromkeys(("videomae", "vjepa2"), "it takes videos"),
}  # fmt: skip


class TokenLayout(NamedTuple):
    """How many tokens of each group a state holds, in their order: cls, registers, patches."""

    num_cls: int
    num_registers: int

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the first patch."""
        return self.num_cls + self.num_registers

    def groups(self) -> dict[str, slice]:
        """Return the non-empty token groups as slices of a state's token axis (…, N, D)."""
        ends = {"cls": self.num_cls, "registers": self.num_prefix_tokens, "patches": None}
        groups, start = {}, 0
        for name, end in ends.items():
            if end is None or end > start:
                groups[name] = slice(start, end)
            start = end
        return groups


def teacher_family(teacher_config: PreTrainedConfig) -> TeacherFamily:
    """Return the row of `TEACHER_FAMILIES` for a teacher.

    Raises:
        ValueError: there is none; the reason, and the families that there are.
    """
    model_type = teacher_config.model_type
    if model_type not in TEACHER_FAMILIES:
        reason = f": {_REFUSED[model_type]}" if model_type in _REFUSED else ""
        raise ValueError(
            f"A Raptor's teacher must be one of {', '.join(TEACHER_FAMILIES)}; "
            f"got a model of type {model_type!r}{reason}."
        )
    return TEACHER_FAMILIES[model_type]


def tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that describes a model's vision tower, or itself."""
    for name in ("vision_config", "backbone_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """Return the token layout of a teacher's or of a Raptor's states, worked out from its
    configuration.
    """
    teacher_config = getattr(config, "teacher_config", config)
    family = teacher_family(teacher_config)
    return TokenLayout(
        *(
            number if isinstance(number, int) else getattr(teacher_config, number)
            for number in (family.cls, family.registers)
        )
    )


def phase_spans(phases: list[int]) -> list[tuple[int, int]]:
    """Return phases as spans: (start, stop) takes the state after layer start to the one after
    stop.
    """
    stops = [sum(phases[: p + 1]) for p in range(len(phases))]
    return [(stop - length, stop) for stop, length in zip(stops, phases, strict=True)]


# which linear layers of a block are corrected at each depth, by `correction_on`
_CORRECTED = {"attention": ("proj",), "ffn": ("fc2",), "all": ("qkv", "proj", "fc1", "fc2")}


class RaptorConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a `RaptorModel`.

    What belongs to the teacher (image and patch size, channels, width, heads, registers, the final
    norm's eps) lives in `teacher_config` alone; the properties below read it there.

    Args:
        teacher_config: configuration of the teacher (or a dict of it with its `model_type`).
        phases: how many consecutive layers each block stands for; sums to the teacher's depth L.
            `[7, 3, 2]` lets block 0 make layers 1-7, block 1 layers 8-10, block 2 layers 11-12.
        ffn: `"swiglu"` (three linear layers, one of them a gate), or what comes between two of
            them: `"gelu"` or another activation of transformers.
        intermediate_size: hidden width of the FFN. None takes the width at which a block costs what
            a teacher's layer with a 4·D GELU FFN costs: 4·D for gelu, 8/3·D for swiglu.
        depth_scaling: let the layer index scale a block's branches and output (paper, App. A.3).
        correction_rank: rank r of what each layer adds to linear layers of its block: W·x becomes
            W·x + B·A·x, with a pair A (r, in) and B (out, r) for each layer. B starts at zero.
            0: no corrections. (As in relaxed recursive transformers, arXiv 2410.20672.)
        correction_on: of which linear layers: `"attention"` (its output projection), `"ffn"` (its
            second one) or `"all"`.
        ffn_experts: number E of FFNs that a block mixes, by shares of its own for each layer. What
            is mixed are their weights, so that an application costs what one FFN does. (As in
            ReViT, arXiv 2610.12448.)
        layerscale_value: initial value of both LayerScales.
        block_norm: `"layernorm"` or `"rmsnorm"` in the blocks.
        block_norm_eps: its eps (the final norm keeps the teacher's own).
        biases: which linear layers of a block have a bias, of "query", "key", "value", "output",
            "fc1" and "fc2"; None: all.
        qk_norm: let an RMSNorm over all channels of query and key come before the attention.
        position_bias: let a block have a table of relative positions (BEiT).
        initializer_range: standard deviation of the blocks' initial linear weights.
        num_applications: run so many applications only, their depths spread evenly over 1 … L;
            None: all L. `hidden_states` has L + 1 entries in any case: a layer that is left out
            has the state of the one before.
        exit_angle: let an image stop once an application of the last block has turned its cls token
            by less than so many degrees; it keeps the state that it has then. None: never.
        semantic_loss_ignore_index: label of pixels that segmentation does not count.
        depth_bins: number of equally wide bins that a depth head chooses among.
        min_depth, max_depth: the range of these bins in metres.
        out_features, out_indices: of a `RaptorBackbone`: after which layers it gives feature maps,
            as names ("stem", "stage1", …) or numbers (0 … L); default the last layer.
        apply_layernorm: let the final norm be applied to these maps.
        reshape_hidden_states: let them be (B, D, h, w) rather than tokens (B, 1 + h·w, D).

    Raises:
        ValueError: phases that are empty, not positive or do not sum to the teacher's depth; a
            teacher of an unknown family; an unknown ffn; corrections of a negative or too high
            rank, or of unknown layers; no expert; an empty range of depths; too many or too few
            applications; an exit angle out of range; a misspelt argument.
    """

    model_type = "raptor"
    sub_configs = {"teacher_config": AutoConfig}
    keys_to_ignore_at_inference = ["hidden_states"]

    teacher_config: dict | PreTrainedConfig | None = None
    phases: list[int] | tuple[int, ...] = (7, 3, 2)
    ffn: str = "gelu"
    intermediate_size: int | None = None
    depth_scaling: bool = True
    correction_rank: int = 0
    correction_on: str = "attention"
    ffn_experts: int = 1
    layerscale_value: float = 1e-5
    block_norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    block_norm_eps: float = 1e-6
    biases: list[str] | None = None
    qk_norm: bool = False
    position_bias: bool = False
    initializer_range: float = 0.02
    num_applications: int | None = None
    exit_angle: float | None = None
    semantic_loss_ignore_index: int = 255
    depth_bins: int = 256
    min_depth: float = 0.001
    max_depth: float = 10.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.teacher_config is None:
            self.teacher_config = {"model_type": "dinov2_with_registers"}
        if isinstance(self.teacher_config, dict):
            fields = dict(self.teacher_config)
            self.teacher_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:  # a Raptor sets things in its own, such as the attention implementation
            self.teacher_config = copy.deepcopy(self.teacher_config)
        self.phases = list(self.phases)  # a tuple comes back from JSON as a list
        maps = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        for name in kwargs:  # transformers takes any name and keeps it: a typo would go unnoticed
            known = [field.removeprefix("_") for field in RaptorConfig.__annotations__]
            if meant := difflib.get_close_matches(name, known, 1, cutoff=0.8):
                raise ValueError(f"RaptorConfig has no {name!r}; did you mean {meant[0]!r}?")
        super().__post_init__(**kwargs)
        self.check_phases()
        self.set_output_features_output_indices(**maps)

    def check_phases(self) -> None:
        """Refuse phases that do not cover the teacher's layers exactly, and other wrong values.

        The model calls it again: what `from_pretrained` overrides is set after `__post_init__`.
        """
        teacher_family(self.teacher_config)
        depth = self.teacher_config.num_hidden_layers
        if any(length < 1 for length in self.phases) or sum(self.phases) != depth:
            raise ValueError(
                "phases must be positive numbers of layers that sum to the teacher's "
                f"{depth} layers; got {list(self.phases)}, which sums to {sum(self.phases)}."
            )
        if self.ffn != "swiglu" and self.ffn not in ACT2FN:
            raise ValueError(
                "ffn must be 'gelu', 'swiglu' or another activation of transformers, such as "
                f"'quick_gelu'; got {self.ffn!r}."
            )
        self._check_depth_changes()
        if self.num_applications is not None and not 1 <= self.num_applications <= depth:
            raise ValueError(
                f"num_applications must lie in 1 … {depth}, the teacher's layers; got "
                f"{self.num_applications}."
            )
        if self.exit_angle is not None and not 0 < self.exit_angle <= 180:
            raise ValueError(
                f"exit_angle is an angle in degrees, above 0 and up to 180; got {self.exit_angle}."
            )
        if self.exit_angle is not None and not token_layout(self).num_cls:
            raise ValueError(
                f"exit_angle watches the cls token, and a {self.teacher_config.model_type!r} has "
                "none."
            )
        if self.depth_bins < 1 or not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                "A depth head needs depth_bins ≥ 1 and 0 < min_depth < max_depth (metres); got "
                f"{self.depth_bins}, {self.min_depth}, {self.max_depth}."
            )

    def _check_depth_changes(self) -> None:
        """Refuse wrong values of what depth changes in the linear layers of a block."""
        if not 0 <= self.correction_rank <= self.hidden_size:
            raise ValueError(
                f"correction_rank must lie in 0 … {self.hidden_size}, the channels (0: no "
                f"corrections); got {self.correction_rank}."
            )
        if self.correction_on not in _CORRECTED:
            raise ValueError(
                f"correction_on must be 'attention', 'ffn' or 'all'; got {self.correction_on!r}."
            )
        if self.ffn_experts < 1:
            raise ValueError(
                f"ffn_experts must be 1 (a plain FFN) or more; got {self.ffn_experts}."
            )

    @property
    def num_hidden_layers(self) -> int:
        """Number of applications L: the teacher's depth."""
        return sum(self.phases)

    @property
    def stage_names(self) -> list[str]:
        """What a backbone's feature maps are called: "stem", then "stage1" … "stageL"."""
        return ["stem"] + [f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1)]

    @property
    def hidden_size(self) -> int:
        """Number of channels D."""
        return self.teacher_config.hidden_size

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads of the teacher, and so of every block."""
        return self.teacher_config.num_attention_heads

    @property
    def image_size(self) -> int | list[int] | tuple[int, int]:
        """Side length in pixels of the images that the teacher was made for."""
        return self.teacher_config.image_size

    @property
    def patch_size(self) -> int | list[int] | tuple[int, int]:
        """Side length of a patch in pixels."""
        return self.teacher_config.patch_size

    @property
    def num_channels(self) -> int:
        """Colour channels of an image."""
        return self.teacher_config.num_channels

    @property
    def ffn_size(self) -> int:
        """Hidden width of the FFN: `intermediate_size`, or what costs as much as a teacher's."""
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
        wide = (2 if self.ffn == "swiglu" else 1) * hidden
        return {
            "qkv": (size, 3 * size),
            "proj": (size, size),
            "fc1": (size, wide),
            "fc2": (hidden, size),
        }

    def corrected_layers(self) -> tuple[str, ...]:
        """Return the names of the linear layers of a block that have corrections."""
        return _CORRECTED[self.correction_on] if self.correction_rank else ()

    def has_bias(self, name: str) -> bool:
        """Return whether a linear layer of a block has a bias, see `biases`."""
        return self.biases is None or name in self.biases

    def applied_layers(self) -> list[int]:
        """Return the layers (1 … L) that `forward` applies a block for: all, or
        `num_applications`.
        """
        last = self.num_hidden_layers
        number = last if self.num_applications is None else self.num_applications
        return [last - round(n * (last - 1) / max(1, number - 1)) for n in reversed(range(number))]

    def phase_of(self, depth: int) -> int:
        """Return the index of the block that makes layer `depth` (1 … L); a ValueError says what
        was given.
        """
        for phase, (start, stop) in enumerate(self.spans()):
            if start < depth <= stop:
                return phase
        raise ValueError(f"depth must be a layer from 1 to {self.num_hidden_layers}; got {depth}.")


def _of_teacher(name: str) -> property:
    """Return an attribute that is kept in the nested `teacher_config` alone."""

    def read(config: PreTrainedConfig):
        return getattr(config.__dict__.get("teacher_config"), name, None)

    def write(config: PreTrainedConfig, value) -> None:
        # transformers sets the defaults of a new configuration before it has a nested one
        if isinstance(config.__dict__.get("teacher_config"), PreTrainedConfig):
            setattr(config.teacher_config, name, value)

    return property(read, write)


class RaptorizedConfig(PreTrainedConfig):
    """Configuration of a model whose vision tower's layers are the blocks of a Raptor.

    Labels and what a model returns are those of `teacher_config`, as is all that `from_pretrained`
    is given to override.

    Args:
        teacher_config: of the whole model, as it was.
        architecture: its class in transformers, such as `"CLIPModel"`.
        tower: path of the vision tower within it; empty: the model is the tower.
        raptor: of the blocks; its `teacher_config` is the tower's.
        layer_parameters: how many parameters the layers had that the blocks stand for.
    """

    model_type = "raptorized"
    sub_configs = {"teacher_config": AutoConfig, "raptor": RaptorConfig}

    teacher_config: dict | PreTrainedConfig | None = None
    architecture: str | None = None
    tower: str = ""
    raptor: dict | PreTrainedConfig | None = None
    layer_parameters: int | None = None
    id2label = _of_teacher("id2label")
    label2id = _of_teacher("label2id")
    problem_type = _of_teacher("problem_type")
    output_hidden_states = _of_teacher("output_hidden_states")
    return_dict = _of_teacher("return_dict")

    def __post_init__(self, **kwargs):
        if self.teacher_config is None:
            self.teacher_config = {"model_type": "vit"}
        if isinstance(self.teacher_config, dict):
            fields = dict(self.teacher_config)
            self.teacher_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            self.teacher_config = copy.deepcopy(self.teacher_config)
        if not isinstance(self.raptor, PreTrainedConfig):
            fields = self.raptor or {"phases": [12], "teacher_config": {"model_type": "vit"}}
            self.raptor = RaptorConfig(**{k: v for k, v in fields.items() if k != "model_type"})
        else:  # it may be that of a Raptor, which goes on by itself
            self.raptor = copy.deepcopy(self.raptor)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Make a configuration as everywhere in transformers; overrides are `teacher_config`'s."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config = super().from_dict(config_dict, name_or_path=kwargs.get("name_or_path", ""))
        own = config.teacher_config
        config.teacher_config, unused = own.from_dict(
            own.to_dict(), return_unused_kwargs=True, **kwargs
        )
        return (config, unused) if return_unused else config


__all__ = [
    "TEACHER_FAMILIES",
    "RaptorConfig",
    "RaptorizedConfig",
    "TokenLayout",
    "phase_spans",
    "teacher_family",
    "token_layout",
]
