"""When is a ViT block-recurrent? Many short distillations of one teacher and its relatives.

    python -m evaluation.recurrence.study training/recipes/digits_study.yaml \
        --teacher outputs/digits/teacher \
        --activations outputs/digits/activations --output_dir outputs/study/results \
        --teachers drop_0=outputs/study/drop_0 untrained=outputs/study/untrained

Experiments: `gap` (ε for k = 1 … 6), `partitions` (all cuts at k = 2, max-cut against others),
`training` (`--teachers`: `drop_…`, `seed_…`, `untrained`, and `over_RUN_STEPS`, checkpoints of runs
that overfit). Every student has the same compute of training, `--units`; one that is trained stays
on record, and the same command goes on. Writes a JSON an experiment, `study.md` and a figure.
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation.recurrence.experiments import EXPERIMENTS, run_study
from evaluation.recurrence.report import write_report
from evaluation.recurrence.workbench import Settings
from raptor_hf import data
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.distillation.arguments import ObjectiveArguments, ValidationArguments
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.arguments import check_positive, named_folders, parse_arguments
from raptor_hf.runs.files import folder_digest
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import run_program


@dataclass(kw_only=True)
class Arguments:
    """Which experiments, and how much of each."""

    _argument_group_name = "study"

    experiments: list[str] = field(
        default_factory=lambda: list(EXPERIMENTS), metadata={"help": "which; default: all"}
    )
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER of other teachers, for training, maps and cuts"},
    )
    units: float = field(
        default=100,
        metadata={"help": "compute of a student, in steps of 64 images through all layers"},
    )
    k: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 5, 6],
        metadata={"help": "numbers of blocks; partitions are compared at those of 2, 3 and 4"},
    )
    seeds: int = field(default=3, metadata={"help": "of every student"})

    def __post_init__(self):
        check_positive(self, "units", "k", "seeds")
        if unknown := [name for name in self.experiments if name not in EXPERIMENTS]:
            raise ValueError(
                f"--experiments are {', '.join(EXPERIMENTS)}; got {', '.join(unknown)}."
            )


PARTS = (Arguments, ActivationArguments, ImageArguments, CropArguments, ReadingArguments)
PARTS += (ObjectiveArguments, ComputeArguments, ValidationArguments, LoopArguments)
DEFAULTS = {"objective": "autoregressive", "optimizer": "muon", "normalize": "group"}


def main(argv: list[str] | None = None) -> None:
    """Measure the teachers, train the students, write the results."""
    own, *parts = parse_arguments(*PARTS, argv=argv, defaults=DEFAULTS)
    settings = Settings(*parts, own.units)
    images, folder = settings.images, Path(settings.loop.output_dir)
    if settings.loop.dry_run:
        raise ValueError("A study has no --dry_run: its students follow from its teachers' phases.")
    if settings.source.also_resolution:
        raise ValueError("A study has one resolution: leave out --also_resolution.")
    others = named_folders("--teachers", own.teachers, reserved=["teacher"])
    teachers = {"teacher": settings.source.teacher, **others}

    # a run is its arguments, its teachers, its stored states and its images
    read = {**teachers, "activations": settings.source.activations}
    inputs = {name: folder_digest(path) for name, path in read.items() if Path(path).is_dir()}
    listed = {}
    for split in (images.split, settings.validation.validation_split):
        dataset = data.load_images(images.dataset, split, settings.reading)
        listed[f"images_{split}"] = data.list_images(images.dataset, dataset)
    if start_run(own, *parts, inputs=inputs, images=listed):
        return print(write_report(folder))

    # measure the teachers, train the students, report
    run_study(settings, teachers, own.experiments, folder, ks=own.k, seeds=own.seeds)
    table = write_report(folder)
    finish_run(folder)
    print(f"\n{table}\n\nreport: {folder / 'study.md'}")


if __name__ == "__main__":
    run_program(main, alone=True)
