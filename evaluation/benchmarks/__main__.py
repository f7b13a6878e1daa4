"""Measure speed, memory and training recipes beside the reference, interleaved in one run.

    python -m evaluation.benchmarks model         # inference: minutes on one thread
    python -m evaluation.benchmarks train_step    # a training step, and the memory that it keeps
    python -m evaluation.benchmarks recipe        # R² against compute, from `reproduce.sh digits`
    python -m evaluation.benchmarks fidelity --models raptor_k3=DIR    # what bytes buy, the same

Needs the extra `train`. The first two take `--device cuda`, and then compute in bfloat16. `recipe`
takes hours, goes on where it stopped, and compares recipes on any teacher once `reproduce.sh` has
found its phases. The figures go to evaluation/results/benchmarks/<name>.json as they are measured;
the expected ones are in docs/performance.md, recipes.md and bytes.md.
"""

import argparse
import platform
from pathlib import Path

import torch

from evaluation.benchmarks.fidelity import benchmark_fidelity, draw
from evaluation.benchmarks.models import SIZES, benchmark_model, benchmark_train_step
from evaluation.benchmarks.recipes import benchmark_recipes
from raptor_hf.runs.files import public_name, write_json
from raptor_hf.runs.folder import environment
from raptor_hf.runs.processes import run_program

_FOLDERS = ("line", "output_dir", "models", "shallow")  # paths, left out of the settings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("benchmark", choices=["model", "train_step", "recipe", "fidelity"])
    # speed
    add("--size", default="base", choices=list(SIZES), help="of model and train_step")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8], help="of model and train_step")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="of model and train_step")
    add("--rounds", type=int, default=10, help="each measures every candidate twice")
    # the models of a line, and what they are compared on
    add("--line", default="outputs/digits", help="recipe, fidelity: output folder of reproduce.sh")
    add("--teacher", help="recipe, fidelity: the teacher; default: that of the line")
    add("--dataset", help="recipe, fidelity: images; default: the stored digits")
    add("--resolution", type=int, nargs="+", help="recipe, fidelity: height and width in pixels")
    # what bytes buy
    add("--models", nargs="*", default=[], help="fidelity: Raptors, NAME=FOLDER")
    add(
        "--shallow",
        help="fidelity: folder of a ViT of as many layers as the first of the models "
        "has blocks; it is trained if it is not there",
    )
    add("--train_images", type=int, default=0, help="fidelity: of the classifiers; 0: all")
    add("--test_images", type=int, default=0, help="fidelity: held out; 0: all")
    # R² against compute
    add("--k", type=int, nargs="+", default=[2, 3, 4], help="recipe: numbers of blocks")
    add("--budgets", type=float, nargs="+", default=[10, 33, 100, 200, 400, 1600],
        help="recipe: compute, in steps of 64 images through all layers")  # fmt: skip
    add("--seeds", type=int, default=3, help="recipe: of every point")
    add("--output_dir", default="evaluation/results/benchmarks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    a = parse(argv)
    torch.set_num_threads(1)
    Path(a.output_dir).mkdir(parents=True, exist_ok=True)

    # the file is named after what was compared on which device or teacher
    name, machine = a.benchmark, platform.machine()
    if a.device == "cuda":
        name, machine = f"{name}_cuda", torch.cuda.get_device_name()
    line = Path(a.line).name
    if name == "fidelity" or (name == "recipe" and line != "digits"):
        name = f"{name}_{line}"
    path = Path(a.output_dir) / f"{name}.json"
    settings = {key: value for key, value in vars(a).items() if key not in _FOLDERS}
    for key in ("teacher", "dataset"):
        settings[key] = settings[key] and public_name(settings[key])
    content = {"settings": settings, "machine": machine, "environment": environment()}

    if a.benchmark == "recipe":
        write_json(path, {"result": benchmark_recipes(a), **content})
        return
    if a.benchmark == "fidelity":
        rows = []
        for row in benchmark_fidelity(a):
            rows.append(row)
            write_json(path, {"result": rows, **content})
        draw(rows, path.with_suffix(".png"))
        return
    measure, result = benchmark_model, {}
    if a.benchmark == "train_step":
        measure = benchmark_train_step
    for title, row in measure(a.size, a.batch_sizes, a.rounds, a.device):
        result[title] = row
        print(title)
        for key, value in row.items():
            print(f"  {key:<24} {value:,.3g}", flush=True)
        write_json(path, {"result": result, **content})


if __name__ == "__main__":
    run_program(main, alone=True)
