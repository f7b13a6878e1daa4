"""Compare what must be fast with other ways to do the same, in one interleaved run: ratios.

    python evaluation/benchmark.py activations     # 13 × 261 × 768 float16, about six minutes
    python evaluation/benchmark.py memory          # peak memory against the number of images
    python evaluation/benchmark.py model           # inference, beside the reference and the teacher
    python evaluation/benchmark.py train_step      # and a training step, with what it keeps

Needs the extra `benchmark` (zarr, for the reference's layout), and 3 GB of disk for 256 images.
Writes `evaluation/results/benchmarks/<name>.json`; the expected ratios are in the README.
"""

import argparse
import platform
from pathlib import Path

import torch

from raptor_hf.activation_benchmark import TEACHERS, benchmark_activations, benchmark_memory
from raptor_hf.launch import run_program
from raptor_hf.model_benchmark import benchmark_model, benchmark_train_step
from raptor_hf.runs import environment, write_json


def print_table(result: dict[str, dict[str, float]]) -> None:
    """A line a measurement."""
    for name, row in result.items():
        print(name)
        for key, value in row.items():
            print(f"  {key:<24} {value:,.3g}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=["activations", "memory", "model", "train_step"])
    parser.add_argument("--teacher", default="base", choices=list(TEACHERS), help="whose sizes")
    parser.add_argument("--images", type=int, default=256, help="trajectories in the dataset")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="of model and train_step")
    parser.add_argument("--threads", type=int, default=1, help="of model and train_step")
    parser.add_argument("--rounds", type=int, default=10, help="every round visits all ways twice")
    parser.add_argument("--folder", default="outputs/benchmark", help="for files, emptied after")
    parser.add_argument("--output_dir", default="evaluation/results/benchmarks")
    arguments = parser.parse_args()
    folder, settings = Path(arguments.folder), {}
    if arguments.benchmark == "activations":
        settings = {name: getattr(arguments, name) for name in ("teacher", "images", "rounds")}
        result = benchmark_activations(
            arguments.teacher, arguments.images, arguments.rounds, folder
        )
    elif arguments.benchmark in ("model", "train_step"):
        settings = {name: getattr(arguments, name) for name in ("teacher", "threads", "rounds")}
        torch.set_num_threads(arguments.threads)
        run = benchmark_model if arguments.benchmark == "model" else benchmark_train_step
        default = [1, 8] if arguments.benchmark == "model" else [2]
        result = run(arguments.teacher, arguments.batch_sizes or default, arguments.rounds)
    else:
        result = benchmark_memory({"digits": [200, 2000], "base": [64, 512]}, folder)
    print_table(result)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    content = {"result": result, "settings": settings, "machine": platform.machine()}
    write_json(
        output_dir / f"{arguments.benchmark}.json", {**content, "environment": environment()}
    )


if __name__ == "__main__":
    run_program(main, alone=True)
