"""Convert a checkpoint of the reference code to a Raptor, in seconds.

    python -m raptor_hf.reference --checkpoint final_raptor3_….pt \
        --teacher facebook/dinov2-with-registers-base --output_dir outputs/raptor_k3

With `--head dinov2_vitb14_reg4_linear_head.pth` the Raptor is saved as a classifier.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..runs.arguments import parse_arguments
from ..runs.files import file_digest, write_json
from ..runs.folder import apply_umask
from ..runs.processes import run_program
from ..tasks.heads import attach_head, load_linear_head
from ..teachers import load_backbone, load_processor, teacher_identity
from .convert import convert_checkpoint


@dataclass
class Arguments:
    """The checkpoint, its teacher, and where the Raptor goes."""

    checkpoint: str = field(metadata={"help": "file of a whole model, or of its state dict"})
    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    output_dir: str = field(metadata={"help": "folder of the Raptor"})
    phases: list[int] = field(
        default_factory=list, metadata={"help": "layers of each block, for a plain state dict"}
    )
    head: str | None = field(
        default=None, metadata={"help": "linear head (file, folder, Hub id): save a classifier"}
    )


def main(argv: list[str] | None = None) -> None:
    """Convert, save, and print how to load the Raptor."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    checkpoint, output = arguments.checkpoint, Path(arguments.output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Choose another --output_dir, or delete it.")

    # the Raptor, and its head
    teacher = load_backbone(arguments.teacher)
    model, auto_class = convert_checkpoint(checkpoint, teacher, phases=arguments.phases or None), ""
    if arguments.head:
        head, class_names = load_linear_head(arguments.head, config=teacher.config)
        model, auto_class = attach_head(model, head, class_names), "ForImageClassification"
    model.save_pretrained(output)
    apply_umask(output)
    try:
        load_processor(arguments.teacher).save_pretrained(output)
    except OSError as error:
        print(f"Saved without an image processor: {error}")
    record = {"checkpoint": Path(checkpoint).name, "sha256": file_digest(checkpoint)}
    record["teacher"] = teacher_identity(teacher)
    write_json(output / "conversion.json", record)
    print(f"Raptor of phases {model.config.phases}: import raptor_hf, then")
    print(f'transformers.AutoModel{auto_class}.from_pretrained("{output}")')


if __name__ == "__main__":
    run_program(main, alone=True)
