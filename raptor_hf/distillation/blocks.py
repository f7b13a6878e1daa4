"""Spans of layers and their blocks: what stage 1 trains one by one and stage 2 chains."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..configuration_raptor import RaptorConfig
from ..loop.arguments import ComputeArguments
from ..loop.setup import configure_compute
from ..modeling_raptor import RaptorModel
from ..teachers.making import make_raptor
from .provenance import check_teacher
from .rollout import Chain, Span

# what blocks of one folder share, beside their teacher
ARCHITECTURE = ("ffn", "intermediate_size", "depth_scaling", "block_norm_eps")


def chain_of(model: RaptorModel, weights: dict[str, float] | None) -> Chain:
    """Return all blocks of a Raptor as one chain.

    Args:
        weights: token weights of its loss; None: the plain mean over tokens.
    """
    spans = zip(model.blocks, model.config.spans(), strict=True)
    return Chain([Span(block, start, stop) for block, (start, stop) in spans], weights)


def covered_layers(chains: list[Chain]) -> range:
    """Return the layers whose states some chains start from or learn."""
    first = min(chain.spans[0].start for chain in chains)
    return range(first, max(chain.spans[-1].stop for chain in chains) + 1)


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


def make_chains(
    teacher: PreTrainedModel,
    spans: list[tuple[int, int]],
    *,
    weights: dict[str, float] | None,
    last_weights: dict[str, float] | None,
    compute: ComputeArguments | None = None,
    **options,
) -> list[Chain]:
    """Make a new block for every span of a teacher's layers, each a chain of its own.

    Args:
        weights: token weights; None: the plain mean over tokens.
        last_weights: those of spans that end at the teacher's last layer.
        compute, options: as for `make_span`, whose errors are raised.
    """
    depth = teacher.config.num_hidden_layers
    made = [make_span(teacher, *span, compute=compute, **options) for span in spans]
    return [Chain([span], last_weights if span.stop == depth else weights) for span in made]


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
    """Make a Raptor of blocks that were trained in stage 1.

    Args:
        folder: of `pretrain_blocks.py`: `blocks.safetensors` and the architecture, `config.json`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no block for one of the phases, or blocks of another teacher.
    """
    if not (Path(folder) / "blocks.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no blocks of pretrain_blocks.py.")
    check_teacher(folder, teacher)
    config = RaptorConfig.from_pretrained(folder)
    options = {name: getattr(config, name) for name in ARCHITECTURE}
    model = make_raptor(teacher, phases, init="random", **options)
    weights = load_file(Path(folder) / "blocks.safetensors")
    for block, (start, stop) in zip(model.blocks, model.config.spans(), strict=True):
        prefix = f"{start}-{stop}."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not state:
            spans = sorted({name.split(".")[0] for name in weights})
            raise ValueError(
                f"{folder} has no block for the span {start}-{stop}, only for {spans}."
            )
        block.load_state_dict(state)
    return model
