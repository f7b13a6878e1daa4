"""Measure speed, memory and training recipes beside the reference, interleaved in one run.

    python -m evaluation.benchmarks model         # inference: minutes on one thread
    python -m evaluation.benchmarks train_step    # a training step, and the memory that it keeps
    python -m evaluation.benchmarks activations   # stored states: six minutes, 3 GB of disk
    python -m evaluation.benchmarks images        # image files to batches, on one core
    python -m evaluation.benchmarks recipe        # R² against compute, from `reproduce.sh digits`

Needs the extra `benchmark`. The first two take `--device cuda`, and then compute in bfloat16.
`recipe` takes hours, goes on where it stopped, and compares recipes on any teacher too, once
`reproduce.sh` has found its phases (docs/recipes.md). Every row is written as soon as it is
measured, to `evaluation/results/benchmarks/<name>.json`; the expected figures are in
docs/performance.md, docs/activations.md, docs/images.md and docs/recipes.md.
"""

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from evaluation.benchmarks.data import benchmark_activations, benchmark_images
from evaluation.benchmarks.models import SIZES, benchmark_model, benchmark_train_step
from evaluation.benchmarks.recipes import benchmark_recipes
from evaluation.benchmarks.timing import Row
from raptor_hf.runs.files import write_json
from raptor_hf.runs.folder import environment
from raptor_hf.runs.processes import run_program


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("benchmark", choices=["model", "train_step", "activations", "images", "recipe"])
    add("--size", default="base", choices=list(SIZES), help="of the models and stored states")
    add("--batch_sizes", type=int, nargs="+", help="of model and train_step")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="of model and train_step")
    add("--images", type=int, default=256, help="activations, images: how many")
    add("--rounds", type=int, default=10, help="each measures every candidate twice")
    add("--recipe", default="digits", help="recipe: <recipe>_raptor.yaml is ours")
    add("--line", help="recipe: folder of reproduce.sh; default: outputs/<recipe>")
    add("--model", help="recipe: the teacher, if not the digits'; a folder or Hub id")
    add("--dataset", help="recipe: its images, if not the digits; a folder or Hub id")
    add(
        "--resolution", type=int, nargs="+", help="recipe: height and width of the images in pixels"
    )
    add("--k", type=int, nargs="+", default=[2, 3, 4], help="recipe: numbers of blocks")
    add("--budgets", type=float, nargs="+", default=[10, 33, 100, 200, 400, 1600],
        help="recipe: compute, in steps of 64 images through all layers")  # fmt: skip
    add("--seeds", type=int, default=3, help="recipe: of every point")
    add("--output_dir", default="evaluation/results/benchmarks")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a benchmark as they are measured."""
    size, batches, rounds = arguments.size, arguments.batch_sizes, arguments.rounds
    files = Path(arguments.output_dir) / "files"
    if arguments.benchmark == "model":
        return benchmark_model(size, batches or [1, 8], rounds, arguments.device)
    if arguments.benchmark == "train_step":
        return benchmark_train_step(size, batches or [2], rounds, arguments.device)
    if arguments.benchmark == "activations":
        return benchmark_activations(size, arguments.images, rounds, files)
    return benchmark_images(arguments.images, rounds, files)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # the file is named after what was compared on which device or teacher
    name, machine = arguments.benchmark, platform.machine()
    if arguments.device == "cuda":
        name, machine = f"{name}_cuda", torch.cuda.get_device_name()
    if name == "recipe" and arguments.recipe != "digits":
        name = f"recipe_{arguments.recipe}"
    content = {"settings": vars(arguments), "machine": machine, "environment": environment()}

    if arguments.benchmark == "recipe":
        content["result"] = benchmark_recipes(arguments)
        write_json(output_dir / f"{name}.json", content)
        return
    result = {}
    for title, row in measure(arguments):
        result[title] = row
        print(title)
        for key, value in row.items():
            print(f"  {key:<24} {value:,.3g}", flush=True)
        write_json(output_dir / f"{name}.json", {"result": result, **content})


if __name__ == "__main__":
    run_program(main, alone=True)
