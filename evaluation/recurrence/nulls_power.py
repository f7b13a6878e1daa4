"""Which phases can be told from drift: processes whose phases are known, and the published matrix.

    python -m evaluation.recurrence.nulls_power evaluation/results/nulls_power.json

Takes two minutes of one core. All randomness is fixed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaluation.recurrence.nulls import gathering
from evaluation.recurrence.nulls_page import GATHER
from evaluation.verdicts import judge_networks
from raptor_hf.phases import find_phases, load_distance, nulls
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import write_json
from raptor_hf.runs.processes import run_program

_MEASURES = ("centred cosine", "debiased CKA")
_IMAGES, _STRENGTHS, _DRAWS = (50, 200, 1000), (0.25, 0.5, 1.0, 2.0), 6
_LAYERS, _CHANNELS = 12, 48
_DRIFT = "Ornstein-Uhlenbeck walk"
_PUBLISHED = Path("tests/fixtures/dinov2_base_layer_distance.json")


def ornstein_uhlenbeck(steps: np.ndarray, memory: float = 0.9) -> np.ndarray:
    """Return a stationary walk through the layers, (n, L, D), from as many normal steps."""
    states = [steps[:, 0]]
    for step in np.swapaxes(steps[:, 1:], 0, 1):
        states.append(memory * states[-1] + np.sqrt(1 - memory**2) * step)
    return np.stack(states, axis=1)


def processes(images: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield states (n, L, D) of layers that drift, then of three blocks of four layers each.

    A block draws the walk to a state of its own, `strength` times as large as the walk's.
    """
    generator = np.random.default_rng((seed, images))
    steps = generator.standard_normal((images, _LAYERS, _CHANNELS))
    walk, straight = steps.cumsum(axis=1), np.linspace(0, 2.2, _LAYERS)[:, None]
    yield _DRIFT, ornstein_uhlenbeck(steps)
    yield "random walk", walk
    yield "great circle", np.cos(straight) * steps[:, :1] + np.sin(straight) * steps[:, 1:2]
    yield "random walk, noise in every layer", walk + 1.5 * generator.standard_normal(steps.shape)
    blocks = np.repeat(generator.standard_normal((images, 3, _CHANNELS)), 4, axis=1)
    for strength in _STRENGTHS:
        yield f"three blocks, {strength:g}", ornstein_uhlenbeck(steps) + strength * blocks


def count_seen(measure: str, images: int) -> dict[str, int]:
    """Return in how many draws of each process phases are seen; the nulls are Ornstein-Uhlenbeck's.

    The first process is judged beside its other draws.
    """
    networks = {}
    for seed in range(_DRAWS):
        for name, states in processes(images, seed):
            cuts = nulls.compare_with_turns({"cls": states}, measure, draws=25)["all"]["cuts"]
            networks[f"{name} {seed + 1}"] = gathering(measure, cuts, images)
    drifts = [name for name in networks if name.startswith(_DRIFT)]
    ((_, verdicts),) = judge_networks([GATHER[measure]], networks, drifts)
    seen: dict[str, int] = {}
    for name, verdict in verdicts.items():
        process = name.rpartition(" ")[0]
        seen[process] = seen.get(process, 0) + (verdict.seen is True)
    return seen


def share_gains() -> dict[str, dict[str, float]]:
    """Return how much larger a share max-cut cuts of each process than of independent turns."""
    gains = {}
    for name, states in processes(200, 0):
        cuts = nulls.compare_with_turns({"cls": states}, _MEASURES[0], draws=2)["all"]["cuts"]
        gains[name] = {k: cut["share"][0] for k, cut in cuts.items()}
    return gains


def published_phases() -> dict:
    """Cut the published matrix of DINOv2-B, its neighbours alone, and these in random order."""
    distance = load_distance(_PUBLISHED)
    turns, result = 1 - np.diagonal(distance, 1), {}
    null = 1 - nulls.independent_turns(turns)
    orders = 1 - nulls.reordered_turns(turns, 1000)
    for k in (2, 3, 4):
        shares = np.array([nulls.best_cut_share(order, k) for order in orders])
        result[str(k)] = {
            "observed": [find_phases(distance, k, method) for method in ("recursive", "maxcut")],
            "neighbours": [find_phases(null, k, method) for method in ("recursive", "maxcut")],
            "share": nulls.best_cut_share(distance, k),
            "orders_that_cut_as_much": float((shares >= nulls.best_cut_share(distance, k)).mean()),
        }
    return result


def power_table(result: dict) -> str:
    """Return a row a process: how many of its draws are seen, by measure and images."""
    rows, counts = [], result["seen"]
    cells = [(measure, images) for measure in counts for images in counts[measure]]
    for name in counts[cells[0][0]][cells[0][1]]:
        rows.append([name, *(str(counts[measure][images][name]) for measure, images in cells)])
    head = [f"{measure}, {images} images" for measure, images in cells]
    return markdown_table([f"process, seen in so many of {result['draws']} draws", *head], rows)


def main(argv: list[str] | None = None) -> None:
    """Write the JSON file that is named."""
    (path,) = sys.argv[1:] if argv is None else argv
    seen = {m: {str(images): count_seen(m, images) for images in _IMAGES} for m in _MEASURES}
    result = {"draws": _DRAWS, "seen": seen, "share_gained": share_gains()}
    write_json(path, {**result, "published": published_phases()})


if __name__ == "__main__":
    run_program(main, alone=True)
