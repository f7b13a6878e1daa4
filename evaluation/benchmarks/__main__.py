"""Compare what must be fast with other ways to do the same, in one interleaved run: ratios.

    python -m evaluation.benchmarks activations   # 13 × 261 × 768 float16, about six minutes
    python -m evaluation.benchmarks memory        # peak memory against the number of images
    python -m evaluation.benchmarks model         # inference, beside the reference and the teacher
    python -m evaluation.benchmarks train_step    # and a training step, with what it keeps
    python -m evaluation.benchmarks images        # files to batches, on one core
    python -m evaluation.benchmarks train         # files to updates: does the device wait?
    python -m evaluation.benchmarks recipe        # R² against compute, on `reproduce.sh digits`

Needs the extra `benchmark`; `activations` 3 GB of disk for 256 images, `recipe` two hours on two
cores (an interrupted run goes on where it stopped). On a GPU: `--device cuda --dtype bfloat16`.
`recipe` takes any teacher too, once `reproduce.sh` has found its phases: `--recipe dinov2_small
--model facebook/dinov2-small --dataset IMAGES --resolution 98 --k 3 --budgets 100 400 1600`.
Writes `evaluation/results/benchmarks/<name>.json` and a picture; the expected ratios are in
docs/performance.md and docs/activations.md.
"""
# Over 120 lines: seven benchmarks share one program.

import argparse
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from evaluation.benchmarks.activations import benchmark_activations, benchmark_memory
from evaluation.benchmarks.figures import plot_ratios, plot_recipes
from evaluation.benchmarks.pipeline import benchmark_images, benchmark_train
from evaluation.benchmarks.recipe_sources import RecipeSource
from evaluation.benchmarks.recipes import benchmark_recipes, recipe_tables
from evaluation.benchmarks.settings import FORMS, TEACHERS
from evaluation.benchmarks.speed import benchmark_model
from evaluation.benchmarks.training import benchmark_train_step
from raptor_hf.runs.files import write_json
from raptor_hf.runs.folder import environment
from raptor_hf.runs.processes import run_program

COMPARED = ["teacher", "threads", "rounds", "device", "dtype", "forms"]
SUITES = {  # and what their figures depend on
    "activations": ["teacher", "images", "rounds", "device"],
    "memory": [],
    "images": ["images", "rounds"],
    "model": COMPARED,
    "train_step": COMPARED,
    "train": ["teacher", "batch_sizes", "steps", "num_workers", "device", "dtype", "forms"],
    "recipe": ["recipe", "resolution", "k", "budgets", "seeds"],
}


def print_table(
    result: Iterable[tuple[str, dict[str, float]]], write: Callable[[dict], None]
) -> dict[str, dict[str, float]]:
    """A line a figure, as they come; each row is written when it is there."""
    found = {}
    for name, row in result:
        found[name] = row
        print(name)
        for key, value in row.items():
            print(f"  {key:<24} {value:,.3g}", flush=True)
        write(found)
    return found


def parse() -> argparse.Namespace:
    """The arguments; those of one benchmark say so."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("benchmark", choices=SUITES)
    add("--teacher", default="base", choices=list(TEACHERS), help="whose sizes")
    add("--images", type=int, default=256, help="activations, images: how many")
    add("--batch_sizes", type=int, nargs="+", help="of model, train_step and train")
    add("--threads", type=int, default=1, help="of model, train_step and train")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="of activations too: read onto it")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="computed in")
    add("--forms", nargs="+", default=FORMS, choices=FORMS, help="of model, train_step and train")
    add("--rounds", type=int, default=10, help="every round visits all ways twice")
    add("--row_limit", type=float, default=600, help="seconds; what takes longer is left out")
    add("--steps", type=int, default=60, help="train: of each way")
    add("--num_workers", type=int, default=0, help="train: processes that read images")
    add("--recipe", default="digits", help="recipe: whose <name>_raptor.yaml is ours")
    add("--line", help="recipe: folder of training/reproduce.sh; default: outputs/<recipe>")
    add("--model", help="recipe: the teacher, if not the digits'; a folder or Hub id")
    add("--dataset", help="recipe: its images, if not the digits; a folder or Hub id")
    add("--splits", nargs=2, default=["train", "val"], help="recipe: to learn from, to report on")
    add("--resolution", type=int, help="recipe: pixels of the images; default: the processor's")
    add("--k", type=int, nargs="+", default=[2, 3, 4], help="recipe: numbers of blocks")
    add("--budgets", type=float, nargs="+", default=[10, 33, 100, 200, 400, 1600],
        help="recipe: compute, in steps of 64 images through all layers")  # fmt: skip
    add("--seeds", type=int, default=3, help="recipe: of every point")
    add("--processes", type=int, default=2, help="recipe: at a time; 0: look at what is on record")
    add("--folder", default="outputs/benchmark", help="for files; emptied after all but recipe")
    add("--output_dir", default="evaluation/results/benchmarks")
    return parser.parse_args()


def recipe(arguments: argparse.Namespace) -> dict:
    """The runs of recipes, and their table, which is printed."""
    budgets = [int(b) if b == int(b) else b for b in arguments.budgets]
    name, own = arguments.recipe, arguments.recipe != "digits"
    folder = Path(arguments.folder) / ("recipe" if not own else f"recipe_{name}")
    source = RecipeSource(
        name, arguments.line or f"outputs/{name}", str(folder), arguments.model,
        arguments.dataset, tuple(arguments.splits), arguments.resolution,
    )  # fmt: skip
    result = benchmark_recipes(
        source, ks=arguments.k, budgets=budgets, seeds=arguments.seeds,
        processes=arguments.processes,
    )  # fmt: skip
    print(recipe_tables(result["table"]))
    return result


def rows_of(a: argparse.Namespace) -> Iterable[tuple[str, dict[str, float]]]:
    """The rows of a suite, measured one by one."""
    import torch

    torch.set_num_threads(a.threads)
    folder, dtype, batches = Path(a.folder), getattr(torch, a.dtype), a.batch_sizes
    compared = (a.rounds, a.device, dtype, a.forms, a.row_limit)
    if a.benchmark == "activations":
        return benchmark_activations(a.teacher, a.images, a.rounds, folder, a.device)
    if a.benchmark == "memory":
        return benchmark_memory({"digits": [200, 2000], "base": [64, 512]}, folder)
    if a.benchmark == "images":
        return benchmark_images(a.images, a.rounds, folder)
    if a.benchmark == "train":
        return benchmark_train(
            a.teacher, (batches or [64])[0], a.steps, a.device, dtype, folder, images=a.dataset,
            workers=a.num_workers, compiled=a.forms != ["plain"], limit=a.row_limit,
            graphs="graphs" in a.forms and a.device == "cuda",
        )  # fmt: skip
    if a.benchmark == "model":
        return benchmark_model(a.teacher, batches or [1, 8], *compared)
    return benchmark_train_step(a.teacher, batches or [2], *compared)


def main() -> None:
    """Measure, write, draw."""
    arguments = parse()
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    name = arguments.benchmark
    if name == "recipe" and arguments.recipe != "digits":
        name += f"_{arguments.recipe}"
    machine = platform.machine()
    if arguments.device == "cuda":
        import torch

        name, machine = f"{name}_cuda", torch.cuda.get_device_name()
    settings = {key: getattr(arguments, key) for key in SUITES[arguments.benchmark]}

    def write(result: dict) -> None:
        content = {"result": result, "settings": settings, "machine": machine}
        write_json(output_dir / f"{name}.json", {**content, "environment": environment()})

    if arguments.benchmark == "recipe":
        result = recipe(arguments)
        write(result)
        plot_recipes(result, output_dir / f"{name}.png")
        return
    result = print_table(rows_of(arguments), write)
    if arguments.benchmark not in ("memory", "train"):
        plot_ratios(result, output_dir / f"{name}.png")


if __name__ == "__main__":
    run_program(main, alone=True)
