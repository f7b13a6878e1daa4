"""Spans of layers and their blocks: what stage 1 trains one by one and stage 2 chains."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig
from ..loop.arguments import ComputeArguments
from ..modeling_raptor import RaptorModel

# what blocks of one folder share, beside their teacher
ARCHITECTURE = ("ffn", "intermediate_size", "depth_scaling", "block_norm_eps")


@dataclass(kw_only=True)
class BlockArguments:
    """What new blocks look like and start from, see `RaptorModel.from_teacher`."""

    init: Literal["teacher", "random"] = field(
        default="teacher", metadata={"help": "what blocks start from"}
    )
    ffn: Literal["gelu", "swiglu"] = "gelu"
    intermediate_size: int | None = field(
        default=None, metadata={"help": "hidden width of the FFN"}
    )
    depth_scaling: bool = field(default=True, metadata={"help": "scale by the layer index"})
    layerscale_value: float | None = field(
        default=None, metadata={"help": "initial LayerScale of init=random; default: 1e-5"}
    )
    block_norm_eps: float | None = field(
        default=None, metadata={"help": "eps of the blocks' LayerNorms; default: the teacher's"}
    )

    def block_options(self) -> dict:
        """The options as keyword arguments of `RaptorModel.from_teacher`."""
        return {name: getattr(self, name) for name in BlockArguments.__dataclass_fields__}


class Span(NamedTuple):
    """A block that takes the state after layer `start` to the state after layer `stop`."""

    block: nn.Module
    start: int
    stop: int

    @property
    def name(self) -> str:
        """First and last layer, like `"0-7"`."""
        return f"{self.start}-{self.stop}"


class Chain(NamedTuple):
    """Consecutive spans that are rolled out together, and the token weights of their loss."""

    spans: list[Span]
    weights: dict[str, float] | None

    @property
    def name(self) -> str:
        """First and last layer, like `"0-7"`."""
        return f"{self.spans[0].start}-{self.spans[-1].stop}"


def make_span(
    teacher: PreTrainedModel,
    start: int,
    stop: int,
    *,
    compute: ComputeArguments | None = None,
    **options,
) -> Span:
    """A new block for a span of a teacher's layers.

    Args:
        compute: how it computes; default: as transformers does.
        options: `init` and the architecture, as in `RaptorModel.from_teacher`.

    Raises:
        ValueError: not 0 ≤ start < stop ≤ L, or options that don't fit the teacher.
    """
    num_layers = teacher.config.num_hidden_layers
    if not 0 <= start < stop <= num_layers:
        raise ValueError(f"A span needs 0 ≤ start < stop ≤ {num_layers}; got {start}-{stop}.")
    phases = [length for length in (start, stop - start, num_layers - stop) if length]
    model = RaptorModel.from_teacher(teacher, phases, **options)
    (compute or ComputeArguments()).set_up(model)
    return Span(model.blocks[1 if start else 0], start, stop)


def parse_span(text: str) -> tuple[int, int]:
    """`"0-7"` as (0, 7); a ValueError says what was given."""
    start, dash, stop = text.partition("-")
    if not (dash and start.isdigit() and stop.isdigit()):
        raise ValueError(f"A span is written start-stop, like 0-7; got {text!r}.")
    return int(start), int(stop)


def save_blocks(spans: list[Span], folder: str | Path) -> None:
    """Write the blocks of stage 1 (`blocks.safetensors`) and their architecture (`config.json`)."""
    weights = {
        f"{span.name}.{name}": weight.contiguous()
        for span in spans
        for name, weight in span.block.state_dict().items()
    }
    save_file(weights, Path(folder) / "blocks.safetensors")
    spans[0].block.attention.config.save_pretrained(folder)


def raptor_from_blocks(
    teacher: PreTrainedModel, phases: list[int], folder: str | Path
) -> RaptorModel:
    """A Raptor whose blocks were trained in stage 1.

    Args:
        folder: of `pretrain_blocks.py`: `blocks.safetensors` and the architecture, `config.json`.

    Raises:
        ValueError: no block for one of the phases (those that there are are named).
    """
    config = RaptorConfig.from_pretrained(folder)
    options = {name: getattr(config, name) for name in ARCHITECTURE}
    model = RaptorModel.from_teacher(teacher, phases, **options)
    weights = load_file(Path(folder) / "blocks.safetensors")
    for block, (start, stop) in zip(model.blocks, model.config.spans(), strict=True):
        prefix = f"{start}-{stop}."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not state:
            there = sorted({name.split(".")[0] for name in weights})
            raise ValueError(
                f"{folder} has no block for the span {start}-{stop}, only for {there}."
            )
        block.load_state_dict(state)
    return model
