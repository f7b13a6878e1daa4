"""Store a teacher's trajectories of an image dataset as an activation dataset.

    accelerate launch training/extract_activations.py --teacher outputs/digits/teacher \
        --dataset digits --split train --views 8 --output_dir outputs/digits/activations

DINOv2-B at 224 px takes 5.2 MB an image; the size is printed before anything is written.
"""

from dataclasses import dataclass, field

from raptor_hf.activations import write_activations, write_manifest
from raptor_hf.data import ImageViews, load_images
from raptor_hf.plan import print_extraction_plan
from raptor_hf.runs import finish_run, parse_arguments, process_state, start_run
from raptor_hf.teachers import load_backbone, load_processor, teacher_identity


@dataclass
class Arguments:
    """What to extract, and where to."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output_dir: str = field(metadata={"help": "folder of the activation dataset"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    split: str = "train"
    views: int = field(
        default=1, metadata={"help": "views per image; all but the first are augmented"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the augmented views"})
    batch_size: int = field(default=64, metadata={"help": "images in one forward pass"})
    shard_megabytes: int = field(default=256, metadata={"help": "size of one file of the dataset"})
    resume: bool = field(default=False, metadata={"help": "go on with an unfinished dataset"})
    dry_run: bool = field(
        default=False, metadata={"help": "print what would be read and written; do nothing"}
    )


def main() -> None:
    """Write the shards that are missing, then the manifest."""
    arguments = parse_arguments(Arguments)
    if arguments.dry_run:
        return print_extraction_plan(arguments)
    state = process_state()
    teacher = load_backbone(arguments.teacher, arguments.revision).to(state.device)
    if start_run(arguments, inputs={"teacher": teacher_identity(teacher)["weights_sha256"]}):
        return
    images = ImageViews(
        load_images(arguments.dataset, arguments.split),
        load_processor(arguments.teacher, arguments.revision),
        views=arguments.views,
        seed=arguments.seed,
    )
    write_activations(
        teacher,
        images,
        arguments.output_dir,
        batch_size=arguments.batch_size,
        shard_megabytes=arguments.shard_megabytes,
        process_index=state.process_index,
        num_processes=state.num_processes,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(arguments.output_dir, teacher, images, revision=arguments.revision)
        finish_run(arguments.output_dir)


if __name__ == "__main__":
    main()
