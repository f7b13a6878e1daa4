"""Depth as a dynamical system: measure it, draw it, walk through it; teacher and Raptors alike.

    accelerate launch evaluation/dynamics.py --output_dir outputs/digits/dynamics --data digits \
        --phases_file outputs/digits/phases/phases.json --model outputs/digits/teacher \
        outputs/digits/seed_0/classification/models/raptor_k{2,3,4}

Takes a minute for these four models and 360 digits. Writes dynamics.json with every figure,
what_we_see.md, the plots, and dynamics.html, one file to be opened from the disk. `--model` also
takes Hub ids, and NAME=FOLDER; `--data` an image folder, a Hub dataset, or an activation dataset,
which is analysed without any model if none is given. Runs on one process.
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf.dynamics.claims import judge_claims
from raptor_hf.dynamics.figures import draw_study
from raptor_hf.dynamics.report import claims_page, png, walk_rows, walk_through, write_report
from raptor_hf.dynamics.study import StudyArguments, study_models
from raptor_hf.dynamics.systems import System, is_store, load_inputs
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import require_one_process, run_program

TEMPLATE = Path(__file__).parent / "dynamics.html"


@dataclass(kw_only=True)
class Arguments(StudyArguments):
    """Which models, which images, and what is done to them."""

    model: list[str] = field(
        default_factory=list,
        metadata={"help": "teacher first, then Raptors: folders, Hub ids, or NAME=one of these"},
    )
    data: str = field(
        metadata={"help": "digits, an image folder, a Hub id, or an activation dataset's folder"}
    )
    output_dir: str = field(metadata={"help": "folder of dynamics.json, dynamics.html, plots"})
    split: str = field(default="test", metadata={"help": "of the images"})
    num_images: int = field(default=2000, metadata={"help": "at most, drawn at random"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py; default: the Raptors'"}
    )
    teacher_head: str | None = field(
        default=None,
        metadata={"help": "linear head of the first model, if it has none of its own"},
    )
    walk_images: int = field(default=10, metadata={"help": "images of the walk; 0: no walk"})
    batch_size: int = 64
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    resume: bool = field(default=False, metadata={"help": "leave a finished run as it is"})


def find_partitions(phases_file: str | None, systems: list[System]) -> list[list[int]]:
    """Phases of the teacher's layers: those of a file, or of the Raptors."""
    if phases_file:
        content = read_json(phases_file)
        if not isinstance(content.get("phases"), dict):
            raise ValueError(f"{phases_file} must be a phases.json of training/find_phases.py.")
        return list(content["phases"].values())
    found = {tuple(system.phases) for system in systems if system.phases}
    return [list(phases) for phases in sorted(found, key=lambda phases: (len(phases), phases))]


def main() -> None:
    """Load, measure, judge, draw, write."""
    require_one_process()
    arguments = parse_arguments(Arguments)
    arguments.check()
    folders = {name: Path(name.split("=", 1)[-1]) for name in (*arguments.model, arguments.data)}
    ours = {n: f for n, f in folders.items() if any(f.glob("*.safetensors")) or is_store(f)}
    if start_run(arguments, inputs={name: folder_digest(f) for name, f in ours.items()}):
        return
    inputs = load_inputs(
        arguments.model, arguments.data, split=arguments.split, teacher_head=arguments.teacher_head
    )
    output_dir = Path(arguments.output_dir)
    partitions = find_partitions(arguments.phases_file, inputs.systems)
    results = study_models(
        inputs.systems,
        inputs.images,
        partitions,
        arguments,
        folder=output_dir,
        num_images=arguments.num_images,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    study = {"data": public_name(arguments.data), "split": arguments.split}
    study |= {"num_images": results[0]["num_images"], "environment": environment()}
    study |= {"claims": judge_claims(results), "models": results}
    write_json(output_dir / "dynamics.json", rounded(study))
    page = claims_page(study["claims"])
    (output_dir / "what_we_see.md").write_text(page)
    figures = {name: png(figure) for name, figure in draw_study(results)}
    for name, content in figures.items():
        (output_dir / f"{name}.png").write_bytes(content)
    walk = walk_through(inputs, walk_rows(inputs.images, arguments.walk_images))
    write_report(
        output_dir / "dynamics.html", template=TEMPLATE, study=study, figures=figures, walk=walk
    )
    finish_run(output_dir)
    print(page.split("\n\n")[1], end="\n\n")
    for result in results:
        for analysis, reason in result["left_out"].items():
            print(f"left out for {result['model']}: {analysis.replace('_', ' ')}: {reason}")
    print(f"report:  {output_dir / 'dynamics.html'}\nfigures: {output_dir / 'dynamics.json'}")


if __name__ == "__main__":
    run_program(main)
