"""Spans of layers and their blocks: what stage 1 trains one by one and stage 2 chains."""

from collections import defaultdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig
from ..loop.arguments import ComputeArguments
from ..loop.setup import configure_compute
from ..modeling_raptor import RaptorModel
from ..teachers.loading import load_backbone
from ..teachers.making import make_raptor
from .provenance import check_teacher
from .rollout import Chain, Span

# what blocks of one folder share, beside their teacher
_ARCHITECTURE = ("ffn", "intermediate_size", "depth_scaling", "block_norm_eps")


def chain_of(model: RaptorModel, weights: dict[str, float] | None) -> Chain:
    """Return all blocks of a Raptor as one chain.

    Args:
        weights: token weights of its loss; None: the plain mean over tokens.
    """
    spans = zip(model.blocks, model.config.spans(), strict=True)
    return Chain([Span(block, start, stop) for block, (start, stop) in spans], weights)


def make_span(
    teacher: PreTrainedModel,
    start: int,
    stop: int,
    *,
    compute: ComputeArguments | None = None,
    **options,
) -> Span:
    """Make a new block for a span of a teacher's layers.

    Args:
        compute: how it computes; default: as transformers does.
        options: `init` and the architecture, as in `make_raptor`.

    Raises:
        ValueError: not 0 ≤ start < stop ≤ L, or options that don't fit the teacher.
    """
    num_layers = teacher.config.num_hidden_layers
    if not 0 <= start < stop <= num_layers:
        raise ValueError(f"A span needs 0 ≤ start < stop ≤ {num_layers}; got {start}-{stop}.")
    phases = [length for length in (start, stop - start, num_layers - stop) if length]
    model = make_raptor(teacher, phases, **options)
    configure_compute(model, compute or ComputeArguments())
    return Span(model.blocks[1 if start else 0], start, stop)


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
    """Make a Raptor of blocks that were trained in stage 1, or load one to train it on.

    Args:
        folder: of `pretrain_blocks.py` (`blocks.safetensors` and the architecture, `config.json`),
            or of a Raptor.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: other phases than asked for, or blocks of another teacher.
    """
    # a Raptor, whole
    check_teacher(folder, teacher)
    if (Path(folder) / "model.safetensors").is_file():
        model = load_backbone(str(folder))
        if getattr(model.config, "phases", None) != phases:
            raise ValueError(f"{folder} holds no Raptor of the phases {phases}.")
        model.blocks.requires_grad_(True)
        model.config.weight_bits = None  # if they were rounded, they will not be any more
        return model

    # a Raptor of the blocks' architecture
    file = Path(folder) / "blocks.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no blocks of pretrain_blocks.py, and no Raptor.")
    config = RaptorConfig.from_pretrained(folder)
    options = {name: getattr(config, name) for name in _ARCHITECTURE}
    model = make_raptor(teacher, phases, init="random", **options)

    # the weights of each block: their names begin with its span
    states = defaultdict(dict)
    for name, weight in load_file(file).items():
        span, _, name = name.partition(".")
        states[span][name] = weight
    for span in chain_of(model, None).spans:
        if span.name not in states:
            names = ", ".join(sorted(states))
            raise ValueError(f"{folder} has blocks for {names}; none for {span.name}.")
        span.block.load_state_dict(states[span.name])
    return model
