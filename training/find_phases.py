"""Measure how far apart a teacher's layers are, and cut them into phases.

    python training/find_phases.py --activations outputs/digits/activations --k 2 3 4 \
        --output_dir outputs/digits/phases

Writes `phases.json` (the matrix, the phases for every k) and `layer_distance.png`, in seconds.
"""

from dataclasses import dataclass, field

import numpy as np

from raptor_hf.activations import load_activations
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.phases import find_phases, layer_distance
from raptor_hf.report import plot_layer_distance
from raptor_hf.runs import finish_run, folder_digest, parse_arguments, start_run, write_json


@dataclass
class Arguments:
    """Which activations to cut, into how many phases."""

    activations: str = field(metadata={"help": "folder of an activation dataset"})
    output_dir: str = field(metadata={"help": "folder of phases.json and layer_distance.png"})
    k: list[int] = field(default_factory=lambda: [2, 3, 4], metadata={"help": "numbers of phases"})
    num_images: int = field(default=10_000, metadata={"help": "trajectories to look at, at most"})
    batch_size: int = 64
    resume: bool = field(default=False, metadata={"help": "go on with an unfinished run"})


def main() -> None:
    """Stream the trajectories, cut, write, print."""
    arguments = parse_arguments(Arguments)
    if start_run(arguments, inputs={"activations": folder_digest(arguments.activations)}):
        return
    activations = load_activations(arguments.activations)
    layout = TokenLayout(activations.manifest["num_cls"], activations.manifest["num_registers"])
    rows = np.arange(min(arguments.num_images, len(activations)))
    batches = np.array_split(rows, -(-len(rows) // arguments.batch_size))
    distance = layer_distance(
        (activations.__getitems__(batch)["states"] for batch in batches), layout
    )
    phases = {str(k): find_phases(distance, k) for k in arguments.k}
    for k, lengths in phases.items():
        print(f"k={k}: phases {lengths}")
    plot_layer_distance(distance, phases, f"{arguments.output_dir}/layer_distance.png")
    write_json(
        f"{arguments.output_dir}/phases.json",
        {"phases": phases, "distance": distance.round(6).tolist(), "num_images": len(rows)},
    )
    finish_run(arguments.output_dir)


if __name__ == "__main__":
    main()
