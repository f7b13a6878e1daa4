"""Turn checkpoints of the reference code into Raptors.

    python -m raptor_hf.convert_raptor_original_to_hf --checkpoint final_raptor3_….pt \
        --teacher facebook/dinov2-with-registers-base --output outputs/raptor_k3

takes whole models (`raptor.Raptor`), blocks of stage 1 (`block.Block`, several files of which may
be given), and plain state dicts. Blocks become a folder for `training/distill_raptor.py --blocks`;
where their spans follow each other from 0 to L, the folder is a Raptor as well. With
`--head dinov2_vitb14_reg4_linear_head.pth` the Raptor is saved as a classifier. The published files
are pickled modules: `original_checkpoint.py` reads them safely.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .distillation.arguments import parse_span
from .distillation.blocks import ARCHITECTURE, Span, make_span, save_blocks
from .modeling_raptor import RaptorBlock, RaptorModel
from .original_checkpoint import read_checkpoint
from .runs.arguments import Checked, Positive, parse_arguments
from .runs.files import file_digest, write_json
from .runs.folder import environment
from .runs.processes import print_anything
from .tasks.heads import attach_head, load_linear_head
from .teachers import load_backbone, load_processor, teacher_identity
from .teachers.making import make_raptor


def convert_checkpoint(
    checkpoint: str | Path, teacher: PreTrainedModel, *, phases: list[int] | None = None
) -> RaptorModel:
    """Return a whole model of the reference as a Raptor around its teacher.

    Args:
        checkpoint: pickled module or state dict (`.pt`, `.pth`, `.safetensors`).
        teacher: the backbone that it was distilled from; embeddings and final norm are its own.
        phases: numbers of layers of the blocks; a pickled module knows them by its thresholds
            ([7, 10] of 12 layers are [7, 3, 2]), a state dict does not.

    Raises:
        ValueError: a pickle that names a foreign class (it is not run), a broken file, a single
            block, weights that are missing, left over or of another width than the teacher's, or
            phases that are missing, contradict the thresholds or do not sum to the teacher's depth.
    """
    original = read_checkpoint(checkpoint)
    if original.is_block:
        raise ValueError(f"{checkpoint} holds one block of stage 1: use convert_block.")
    depth = teacher.config.num_hidden_layers
    if original.thresholds is not None:
        stops = [0, *original.thresholds, depth]
        lengths = [stop - start for start, stop in zip(stops, stops[1:], strict=False)]
        if phases is not None and list(phases) != lengths:
            raise ValueError(
                f"phases={list(phases)} contradict the thresholds {original.thresholds} of "
                f"{checkpoint}, which with {depth} layers are the phases {lengths}. Leave "
                "phases out."
            )
        phases = lengths
    if phases is None:
        raise ValueError(
            f"{checkpoint} is a plain state dict of {len(original.blocks)} blocks, which does not "
            "say how many layers each stands for: give phases, like 7 3 2."
        )
    if len(phases) != len(original.blocks):
        raise ValueError(
            f"{checkpoint} has {len(original.blocks)} blocks; got {len(phases)} phases, {phases}."
        )
    model = make_raptor(teacher, list(phases), **original.architecture)
    for block, weights in zip(model.blocks, original.blocks, strict=True):
        _fill_block(block, weights, original.num_heads, checkpoint)
    return model.eval()


def convert_block(
    checkpoint: str | Path, teacher: PreTrainedModel, *, span: tuple[int, int] | None = None
) -> Span:
    """Return a block of stage 1 of the reference as a `Span`.

    Args:
        checkpoint: pickled module or state dict of one block.
        teacher: the backbone that it was distilled from.
        span: (start, stop); None reads it off the file name (`…_start_7_end_10_…`).

    Raises:
        ValueError: no span, a whole model, or what `convert_checkpoint` refuses.
    """
    original = read_checkpoint(checkpoint)
    if not original.is_block:
        raise ValueError(f"{checkpoint} holds a whole model: use convert_checkpoint.")
    named = re.search(r"_start_(\d+)_end_(\d+)_", Path(checkpoint).name)
    if span is None and named is None:
        raise ValueError(
            f"Which layers is the block in {checkpoint} for? Give its span, like 0-7; the file's "
            "name does not say (…_start_0_end_7_…)."
        )
    start, stop = span or (int(named[1]), int(named[2]))
    made = make_span(teacher, start, stop, **original.architecture)
    _fill_block(made.block, original.blocks[0], original.num_heads, checkpoint)
    return made


def _fill_block(
    block: RaptorBlock,
    weights: dict[str, torch.Tensor],
    num_heads: int | None,
    checkpoint: str | Path,
) -> None:
    """Load a block's weights, all of them; a ValueError says what does not fit the teacher."""
    width, expected = len(weights["norm1.weight"]), len(block.norm1.weight)
    if width != expected:
        raise ValueError(
            f"{checkpoint} has {width} channels, but the teacher has {expected}. "
            "Give the teacher that it was distilled from."
        )
    if num_heads not in (None, block.attention.num_heads):
        raise ValueError(
            f"{checkpoint} has {num_heads} attention heads, but the teacher has "
            f"{block.attention.num_heads}. Give the teacher that it was distilled from."
        )
    own = block.state_dict()
    wrong = [
        f"{name}: expected {tuple(own[name].shape) if name in own else 'nothing'}, got "
        f"{tuple(weights[name].shape) if name in weights else 'nothing'}"
        for name in sorted({*own, *weights})
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(f"{checkpoint} does not fill a block: {'; '.join(wrong[:5])}.")
    block.load_state_dict(weights)


@dataclass
class Arguments(Checked):
    """What to convert, and where to."""

    checkpoint: list[str] = field(metadata={"help": "file of the reference; several of stage 1"})
    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output: str = field(metadata={"help": "folder of the converted model, or of the blocks"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    phases: list[Positive[int]] = field(
        default_factory=list, metadata={"help": "layers of each block, for a plain state dict"}
    )
    spans: list[str] = field(
        default_factory=list, metadata={"help": "of blocks of stage 1, like 0-7 7-10"}
    )
    head: str | None = field(
        default=None, metadata={"help": "linear head (file, folder, Hub id): save a classifier"}
    )


def _convert_blocks(
    checkpoints: list[str | Path],
    teacher: PreTrainedModel,
    *,
    spans: list[tuple[int, int]] | None = None,
) -> list[Span]:
    """Return several blocks of stage 1, in the order of their layers.

    Args:
        checkpoints: files as of `convert_block`.
        teacher: the backbone that they were distilled from.
        spans: one a file; None reads them off the file names.

    Raises:
        ValueError: another number of spans than of files, two blocks for one span, blocks that are
            not built alike, or what `convert_block` refuses.
    """
    if spans and len(spans) != len(checkpoints):
        raise ValueError(
            f"Give one span a file, in the order of the files: got {len(spans)} spans for "
            f"{len(checkpoints)} files."
        )
    named = zip(checkpoints, spans or [None] * len(checkpoints), strict=True)
    blocks = [convert_block(file, teacher, span=span) for file, span in named]
    blocks.sort(key=lambda block: block[1:])
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        raise ValueError(f"Give one block a span; got blocks for {', '.join(names)}.")
    options = [_block_architecture(block) for block in blocks]
    if any(option != options[0] for option in options):  # a folder has one config.json for all
        built = "; ".join(f"{n}: {option}" for n, option in zip(names, options, strict=True))
        raise ValueError(f"Blocks of one folder must be built alike; got {built}.")
    return blocks


def _block_architecture(span: Span) -> dict:
    """Return what blocks of one folder share, read off a block's configuration."""
    return {name: getattr(span.block.attention.config, name) for name in ARCHITECTURE}


def _chain_blocks(blocks: list[Span], teacher: PreTrainedModel) -> RaptorModel | None:
    """Return blocks as one Raptor; None where their spans don't follow each other from 0 to L.

    Args:
        blocks: built alike, in the order of their layers (`_convert_blocks`).
        teacher: the backbone that they were distilled from.
    """
    ends = [stop for _, _, stop in blocks]
    if [start for _, start, _ in blocks] + [teacher.config.num_hidden_layers] != [0, *ends]:
        return None
    phases = [stop - start for _, start, stop in blocks]
    model = make_raptor(teacher, phases, **_block_architecture(blocks[0]))
    for block, (trained, _, _) in zip(model.blocks, blocks, strict=True):
        block.load_state_dict(trained.state_dict())
    return model.eval()


def convert(
    arguments: Arguments, teacher: PreTrainedModel
) -> tuple[RaptorModel | None, list[Span]]:
    """Convert files to a Raptor or None, and to blocks of stage 1 if they are such.

    Raises:
        ValueError: an argument that the files have no use for, or what the converters refuse.
    """
    files, phases = arguments.checkpoint, arguments.phases or None
    if len(files) == 1 and not read_checkpoint(files[0]).is_block:
        if arguments.spans:
            raise ValueError(
                f"{files[0]} holds a whole model, which has phases, not spans: leave out "
                f"--spans {' '.join(arguments.spans)}."
            )
        return convert_checkpoint(files[0], teacher, phases=phases), []
    spans = [parse_span(text) for text in arguments.spans]
    blocks = _convert_blocks(files, teacher, spans=spans or None)
    model = _chain_blocks(blocks, teacher)
    names = " ".join(block.name for block in blocks)
    if phases and (model is None or model.config.phases != phases):
        raise ValueError(
            f"--phases {' '.join(map(str, phases))} contradict the spans of the blocks, {names}. "
            "Leave --phases out."
        )
    if arguments.head and model is None:
        raise ValueError(
            f"--head needs a whole Raptor, but the spans {names} don't follow each other from 0 to "
            f"{teacher.config.num_hidden_layers}. Give all its blocks, or leave --head out."
        )
    return model, blocks


def _find_processor(arguments: Arguments):
    """Return the teacher's image processor, or print that it has none and return None."""
    try:
        return load_processor(arguments.teacher, arguments.revision)
    except OSError as error:
        print(f"Saved without an image processor: {error}")
        return None


def main() -> None:
    """Convert, save, say how to load it; nothing is written before everything has been checked."""
    print_anything()
    (arguments,) = parse_arguments(Arguments)
    files, output = arguments.checkpoint, Path(arguments.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Choose another --output, or delete it.")
    teacher = load_backbone(arguments.teacher, arguments.revision)
    model, blocks = convert(arguments, teacher)
    kind = "AutoModel"
    if arguments.head:
        head, class_names = load_linear_head(arguments.head, config=teacher.config)
        model, kind = attach_head(model, head, class_names), "AutoModelForImageClassification"
    processor = _find_processor(arguments) if model is not None else None
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "checkpoints": [{"file": Path(f).name, "sha256": file_digest(f)} for f in files],
        "teacher": teacher_identity(teacher, arguments.revision),
        "environment": environment(),
    }
    write_json(output / "conversion.json", record)
    if blocks:
        save_blocks(blocks, output)
        names = ", ".join(block.name for block in blocks)
        print(f"Blocks {names}: {output}, for training/distill_raptor.py --blocks")
    if model is None:
        return
    model.save_pretrained(output)  # after the blocks: its config.json serves both
    if processor is not None:
        processor.save_pretrained(output)
    phases = model.config.phases
    print(f"Raptor of {len(phases)} blocks, phases {phases}: import raptor_hf, then")
    print(f'transformers.{kind}.from_pretrained("{output}")')


if __name__ == "__main__":
    main()
