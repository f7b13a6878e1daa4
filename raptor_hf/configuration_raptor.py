"""The configuration of a Raptor: its teacher's, and how few blocks replace its layers.

This file and `modeling_raptor.py` travel with every model to the Hub: they import torch,
transformers and each other, and nothing else of this package.
"""

import copy
import difflib
from typing import Literal, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


class TeacherFamily(NamedTuple):
    """Where the models of one family in transformers keep the parts that a Raptor takes over."""

    embeddings: str
    layers: str
    final_norm: str


TEACHER_FAMILIES = {
    "dinov2": TeacherFamily("embeddings", "encoder.layer", "layernorm"),
    "dinov2_with_registers": TeacherFamily("embeddings", "encoder.layer", "layernorm"),
}


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
    """Return the row of `TEACHER_FAMILIES` for a teacher; a ValueError names all families."""
    if teacher_config.model_type not in TEACHER_FAMILIES:
        raise ValueError(
            f"A Raptor's teacher must be one of {', '.join(TEACHER_FAMILIES)}; "
            f"got a model of type {teacher_config.model_type!r}."
        )
    return TEACHER_FAMILIES[teacher_config.model_type]


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """Return the token layout of a teacher's or of a Raptor's states, worked out from its
    configuration.
    """
    teacher_config = getattr(config, "teacher_config", config)
    teacher_family(teacher_config)
    return TokenLayout(1, getattr(teacher_config, "num_register_tokens", 0))


def phase_spans(phases: list[int]) -> list[tuple[int, int]]:
    """Return phases as spans: (start, stop) takes the state after layer start to the one after
    stop.
    """
    stops = [sum(phases[: p + 1]) for p in range(len(phases))]
    return [(stop - length, stop) for stop, length in zip(stops, phases, strict=True)]


class RaptorConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a `RaptorModel`.

    What belongs to the teacher (image and patch size, channels, width, heads, registers, the final
    norm's eps) lives in `teacher_config` alone; the properties below read it there.

    Args:
        teacher_config: configuration of the teacher (or a dict of it with its `model_type`).
        phases: how many consecutive layers each block stands for; sums to the teacher's depth L.
            `[7, 3, 2]` lets block 0 make layers 1-7, block 1 layers 8-10, block 2 layers 11-12.
        ffn: `"gelu"` (two linear layers) or `"swiglu"` (gated, three).
        intermediate_size: hidden width of the FFN. None takes the width at which a block costs what
            a teacher's layer with a 4·D GELU FFN costs: 4·D for gelu, 8/3·D for swiglu.
        depth_scaling: let the layer index scale a block's branches and output (paper, App. A.3).
        layerscale_value: initial value of both LayerScales.
        block_norm_eps: eps of the blocks' LayerNorms (the final norm keeps the teacher's own).
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
        output_hidden_states: as everywhere in transformers, but on by default: a trajectory is what
            one loads a Raptor for. Turn it off to save memory.

    Raises:
        ValueError: phases that are empty, not positive or do not sum to the teacher's depth; a
            teacher of an unknown family; an unknown ffn; an empty range of depths; too many or too
            few applications; an exit angle out of range; a misspelt argument.
    """

    model_type = "raptor"
    sub_configs = {"teacher_config": AutoConfig}
    keys_to_ignore_at_inference = ["hidden_states"]

    teacher_config: dict | PreTrainedConfig | None = None
    phases: list[int] | tuple[int, ...] = (7, 3, 2)
    ffn: Literal["gelu", "swiglu"] = "gelu"
    intermediate_size: int | None = None
    depth_scaling: bool = True
    layerscale_value: float = 1e-5
    block_norm_eps: float = 1e-6
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
    output_hidden_states: bool | None = True

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
        if self.ffn not in ("gelu", "swiglu"):
            raise ValueError(f"ffn must be 'gelu' or 'swiglu'; got {self.ffn!r}.")
        if self.num_applications is not None and not 1 <= self.num_applications <= depth:
            raise ValueError(
                f"num_applications must lie in 1 … {depth}, the teacher's layers; got "
                f"{self.num_applications}."
            )
        if self.exit_angle is not None and not 0 < self.exit_angle <= 180:
            raise ValueError(
                f"exit_angle is an angle in degrees, above 0 and up to 180; got {self.exit_angle}."
            )
        if self.depth_bins < 1 or not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                "A depth head needs depth_bins ≥ 1 and 0 < min_depth < max_depth (metres); got "
                f"{self.depth_bins}, {self.min_depth}, {self.max_depth}."
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
        if self.ffn == "gelu":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 3 // 8) * 8  # a multiple of 8, as DINOv2's own SwiGLU

    def spans(self) -> list[tuple[int, int]]:
        """Return the spans (start, stop) of the phases, see `phase_spans`."""
        return phase_spans(self.phases)

    def depths(self) -> list[int]:
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


__all__ = [
    "TEACHER_FAMILIES",
    "RaptorConfig",
    "TokenLayout",
    "phase_spans",
    "teacher_family",
    "token_layout",
]
