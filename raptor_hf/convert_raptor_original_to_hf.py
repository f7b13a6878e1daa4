"""Turn checkpoints of the reference code into Raptors.

    python -m raptor_hf.convert_raptor_original_to_hf --checkpoint final_raptor3_….pt \
        --teacher facebook/dinov2-with-registers-base --output outputs/raptor_k3

takes whole models (`raptor.Raptor`), blocks of stage 1 (`block.Block`, several files of which may
be given), and plain state dicts. With `--head dinov2_vitb14_reg4_linear_head.pth` the output is a
classifier. The published files are pickled modules: `original_checkpoint.py` reads them safely.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedModel

from .heads import build_classifier, load_linear_head
from .modeling_raptor import RaptorBlock, RaptorModel
from .original_checkpoint import read_checkpoint
from .runs import environment, file_digest, write_json
from .spans import Span, make_span, parse_span, save_blocks
from .teachers import load_backbone, load_processor, teacher_identity


def convert_checkpoint(
    checkpoint: str | Path, teacher: PreTrainedModel, *, phases: list[int] | None = None
) -> RaptorModel:
    """A whole model of the reference as a Raptor around its teacher.

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
        found = [stop - start for start, stop in zip(stops, stops[1:], strict=False)]
        if phases is not None and list(phases) != found:
            raise ValueError(
                f"phases={list(phases)} contradict the thresholds {original.thresholds} of "
                f"{checkpoint}, which with {depth} layers are the phases {found}. Leave phases out."
            )
        phases = found
    if phases is None:
        raise ValueError(
            f"{checkpoint} is a plain state dict of {len(original.blocks)} blocks, which does not "
            "say how many layers each stands for: give phases, like 7 3 2."
        )
    if len(phases) != len(original.blocks):
        raise ValueError(
            f"{checkpoint} has {len(original.blocks)} blocks; got {len(phases)} phases, {phases}."
        )
    model = RaptorModel.from_teacher(teacher, list(phases), **original.architecture)
    for block, weights in zip(model.blocks, original.blocks, strict=True):
        fill_block(block, weights, original.num_heads, checkpoint)
    return model.eval()


def convert_block(
    checkpoint: str | Path, teacher: PreTrainedModel, *, span: tuple[int, int] | None = None
) -> Span:
    """A block of stage 1 of the reference as a `Span`.

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
    fill_block(made.block, original.blocks[0], original.num_heads, checkpoint)
    return made


def fill_block(
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
class Arguments:
    """What to convert, and where to."""

    checkpoint: list[str] = field(metadata={"help": "file of the reference; several of stage 1"})
    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output: str = field(metadata={"help": "folder of the converted model, or of the blocks"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    phases: list[int] = field(
        default_factory=list, metadata={"help": "layers of each block, for a plain state dict"}
    )
    spans: list[str] = field(
        default_factory=list, metadata={"help": "of blocks of stage 1, like 0-7 7-10"}
    )
    head: str | None = field(
        default=None, metadata={"help": "linear head (file, folder, Hub id): save a classifier"}
    )


def main() -> None:
    """Convert, save, say how to load it."""
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    files, output = arguments.checkpoint, Path(arguments.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Choose another --output, or delete it.")
    teacher = load_backbone(arguments.teacher, arguments.revision)
    if len(files) == 1 and not read_checkpoint(files[0]).is_block:
        model = convert_checkpoint(files[0], teacher, phases=arguments.phases or None)
    else:
        spans = [parse_span(text) for text in arguments.spans] or [None] * len(files)
        if len(spans) != len(files):
            raise ValueError(f"Give a span a file: got {len(spans)} spans, {len(files)} files.")
        blocks = [convert_block(f, teacher, span=s) for f, s in zip(files, spans, strict=True)]
        model = None
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "conversion.json",
        {
            "checkpoints": {Path(file).name: file_digest(file) for file in files},
            "teacher": teacher_identity(teacher, arguments.revision),
            "environment": environment(),
        },
    )
    if model is None:
        save_blocks(blocks, output)
        names = [f"{start}-{stop}" for _, start, stop in blocks]
        print(f"Blocks {', '.join(names)}: {output}, for training/distill_raptor.py --blocks")
        return
    kind = "AutoModel"
    if arguments.head:
        head, class_names = load_linear_head(arguments.head, hidden_size=teacher.config.hidden_size)
        model, kind = build_classifier(model, head, class_names), "AutoModelForImageClassification"
    model.save_pretrained(output)
    load_processor(arguments.teacher, arguments.revision).save_pretrained(output)
    phases = model.config.phases
    print(f"Raptor of {len(phases)} blocks, phases {phases}: import raptor_hf, then")
    print(f'transformers.{kind}.from_pretrained("{output}")')


if __name__ == "__main__":
    main()
