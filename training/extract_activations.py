"""Store a teacher's trajectories of an image dataset as an activation dataset.

    accelerate launch training/extract_activations.py --teacher outputs/digits/teacher \
        --dataset digits --split train --views 8 --output_dir outputs/digits/activations

DINOv2-B at 224 px takes 5.2 MB an image; the size is printed before anything is written.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raptor_hf import activations
from raptor_hf.activations.arguments import ImageArguments
from raptor_hf.data import list_images, load_images
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.runs.arguments import check_not_negative, check_positive, parse_arguments
from raptor_hf.runs.folder import finish_run, mark_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone
from raptor_hf.weights import weights_digest


@dataclass(kw_only=True)
class Arguments:
    """What to extract, and where to."""

    _argument_group_name = "extraction"

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output_dir: str = field(metadata={"help": "folder of the activation dataset"})
    layers: list[int] = field(
        default_factory=list, metadata={"help": "layers to store (7 8 9 10); default: all"}
    )
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = field(default=64, metadata={"help": "images in one forward pass"})
    shard_megabytes: int = field(default=256, metadata={"help": "size of one file of the dataset"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode images ahead"})
    resume: bool = field(default=False, metadata={"help": "go on with an unfinished dataset"})
    dry_run: bool = field(
        default=False, metadata={"help": "print the plan and its cost, then stop"}
    )

    def __post_init__(self):
        check_positive(self, "batch_size")
        check_not_negative(self, "shard_megabytes")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"--layers takes each layer once; got {self.layers}.")


PARTS = (Arguments, ImageArguments, CropArguments, ReadingArguments)


def main(argv: list[str] | None = None) -> None:
    """Write the shards that are missing, then the manifest."""
    parts = parse_arguments(*PARTS, argv=argv, defaults={"dataset": "digits"})
    own, images, crops, reading = parts
    state = process_state()
    check_positive(images, "views")

    # the teacher; a store that lost a shard since it was finished is opened again
    teacher = load_backbone(own.teacher).to(state.device)
    store = Path(own.output_dir)
    finished = not own.dry_run and state.is_main_process and (store / "manifest.json").exists()
    if finished and activations.verify_activations(store, checksums=False):
        mark_run(store, finished=False)

    # the images
    dataset = load_images(images.dataset, images.split, reading)
    views = activations.image_views(dataset, images, crops, reading, own.teacher)
    inputs = {"teacher": weights_digest(teacher)}
    read = {"images": list_images(images.dataset, views.cells)}
    if start_run(*parts, inputs=inputs, images=read) and not own.dry_run:
        return

    # the missing shards
    activations.write_activations(
        teacher,
        views,
        own.output_dir,
        layers=own.layers,
        dtype=own.dtype,
        precision=images.precision,
        batch_size=own.batch_size,
        shard_megabytes=own.shard_megabytes,
        num_workers=own.num_workers,
        dataset=images.dataset,
        dry_run=own.dry_run,
    )
    if state.is_main_process and not own.dry_run:
        finish_run(own.output_dir)


if __name__ == "__main__":
    run_program(main)
