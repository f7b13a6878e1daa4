"""Store a teacher's trajectories of an image dataset as an activation dataset.

    accelerate launch training/extract_activations.py --teacher outputs/digits/teacher \
        --dataset digits --split train --views 8 --output_dir outputs/digits/activations

DINOv2-B at 224 px takes 5.2 MB an image; the size is printed before anything is written.
"""

from dataclasses import dataclass, field
from typing import Literal

from raptor_hf.activations.arguments import ImageArguments
from raptor_hf.activations.format import lost_shards
from raptor_hf.activations.writing import write_activations
from raptor_hf.dry_runs.extraction import print_extraction_plan
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.folder import finish_run, reopen_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone
from raptor_hf.weights import weights_digest


@dataclass(kw_only=True)
class Arguments(ImageArguments):
    """What to extract, and where to."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output_dir: str = field(metadata={"help": "folder of the activation dataset"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    layers: list[int] = field(
        default_factory=list, metadata={"help": "layers to store (7 8 9 10); default: all"}
    )
    tokens: int | None = field(
        default=None, metadata={"help": "random patches to store of each image; default: all"}
    )
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = field(default=64, metadata={"help": "images in one forward pass"})
    shard_megabytes: int = field(default=256, metadata={"help": "size of one file of the dataset"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode images ahead"})
    resume: bool = field(default=False, metadata={"help": "go on with an unfinished dataset"})
    dry_run: bool = field(
        default=False, metadata={"help": "measure for a few seconds, advise stored or online"}
    )
    planned_epochs: float = field(
        default=16, metadata={"help": "dry_run: epochs over it in all training together"}
    )
    planned_spans: list[str] = field(
        default_factory=list, metadata={"help": "dry_run: spans to train (7-10); default: all"}
    )


def main() -> None:
    """Write the shards that are missing, then the manifest."""
    arguments = parse_arguments(Arguments)
    if arguments.dry_run:
        return print_extraction_plan(arguments)
    state = process_state()
    teacher = load_backbone(arguments.teacher, arguments.revision).to(state.device)
    if state.is_main_process and lost_shards(arguments.output_dir):
        reopen_run(arguments.output_dir)
    if start_run(arguments, inputs={"teacher": weights_digest(teacher)}):
        return
    write_activations(
        teacher,
        arguments.image_views(arguments.teacher, arguments.revision),
        arguments.output_dir,
        layers=arguments.layers or None,
        num_patches=arguments.tokens,
        dtype=arguments.dtype,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        shard_megabytes=arguments.shard_megabytes,
        num_workers=arguments.num_workers,
        revision=arguments.revision,
    )
    if state.is_main_process:
        finish_run(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)
