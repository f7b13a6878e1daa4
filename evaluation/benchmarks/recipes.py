"""Training recipes beside the reference's: how well a student follows after how much compute.

Compute is counted in multiply-adds of the student and of its optimiser, see `step_units`.
At every budget and k each recipe gets the learning rate that suits it: its own one is doubled and
halved as long as that helps, judged on images that it learns from, with the first seed (at budgets
of minutes, `_LONG`, ours is not tuned); the figures are of the teacher's test images. Runs that are
on record are not made again.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import set_seed

from raptor_hf import make_raptor
from raptor_hf.data import keep_batch
from raptor_hf.distillation.arguments import (
    BlockArguments,
    ObjectiveArguments,
    parse_token_weights,
)
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.compute import step_units
from raptor_hf.distillation.fidelity import trajectory_r2
from raptor_hf.distillation.training import train_chains
from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.reports.tables import markdown_table, mean_std
from raptor_hf.runs.arguments import build_arguments
from raptor_hf.runs.processes import progress_bar
from raptor_hf.runs.workers import in_processes, mend_record, quietly, read_record, write_entries

from .recipe_sources import RecipeSource, load_config, open_source, prepare_images

_RECIPES = Path(__file__).parents[2] / "training" / "recipes"
_JUDGED_ROWS = 256  # of the training set, for the choice of the learning rate
_WARMUP = 0.1  # of the steps
_LONG = 300  # units: from here on the reference has two rates to choose from, and ours its own
_LAST_WITH_OUR_BATCHES = 200  # units: the reference has them up to here
_VARIANTS_AT = (3, 100)  # k and units
_RECORD = "recipe_runs.jsonl"


# what `distill_raptor.py` reads of a recipe file, for new blocks; ours says whatever else differs
# from the defaults of the parts, which are the reference's
PARTS = (BlockArguments, ComputeArguments, ObjectiveArguments, LoopArguments)
_DEFAULTS = {"objective": "autoregressive"}


def recipe_arguments(recipe: dict) -> tuple:
    """Return the arguments that a recipe gives, an instance of each of `PARTS`."""
    return build_arguments(_DEFAULTS | recipe, *PARTS)


def recipes(name: str = "digits", width: int = 64) -> dict[str, dict]:
    """Return what is compared: arguments by name, see `PARTS`.

    *ours* is a recipe as it is shipped. *reference* is the published one: a random start, SwiGLU of
    hidden width 4·D, teacher forcing that fades over the first quarter, the plain mean squared
    error, batches of 64. *reference, our batches* has ours, where they are others.

    Args:
        name: of our recipe, `<name>_raptor.yaml`.
        width: D, channels of the teacher.
    """
    known = {field.name for part in PARTS for field in fields(part)}
    ours = yaml.safe_load((_RECIPES / f"{name}_raptor.yaml").read_text(encoding="utf-8"))
    ours = {name: value for name, value in ours.items() if name in known}
    digits = name == "digits"
    reference = {
        "init": "random", "ffn": "swiglu", "intermediate_size": 4 * width,
        "layerscale_value": 1e-5, "block_norm_eps": 1e-5, "objective": "annealed",
        "learning_rate": 1e-2 if digits else 2e-3, "batch_size": 64,
        "token_weights": "0.45,0.10,0.45",
        "attn_implementation": ours.get("attn_implementation", "sdpa"),
    }  # fmt: skip
    compared = {"ours": ours, "reference": reference}
    if ours["batch_size"] != reference["batch_size"]:
        small = {"batch_size": ours["batch_size"], "learning_rate": reference["learning_rate"] / 2}
        compared["reference, our batches"] = reference | small
    return compared


def variants(name: str = "digits") -> dict[str, dict]:
    """Return our recipe with one thing changed at a time, to see what helps."""
    ours = recipes(name)["ours"]
    changes = {
        "AdamW": {"optimizer": "adamw", "learning_rate": ours["learning_rate"] / 4},
        "batches of 64": {"batch_size": 64},
        "batches of 16": {"batch_size": 16},
        "random blocks": {"init": "random"},
        "layers averaged as they are": {"init": "teacher"},
        "end to end from the first step": {"phase_fraction": 0.0},
        "teacher forcing over the first quarter": {"objective": "annealed", "annealing": "drawn"},
        "plain mean squared error": {"normalize": "none"},
        "over the variance of each layer": {"normalize": "layer", "token_weights": "none"},
    }
    return {
        f"ours, {what}": ours | change
        for what, change in changes.items()
        if any(ours.get(key) != value for key, value in change.items())
    }


@dataclass(frozen=True)
class _Group:
    """The runs of one recipe at one k and one budget: the learning rates, then the other seeds."""

    folder: str
    recipe: str
    k: int
    units: float
    seeds: int

    def runs(self) -> list[dict]:
        """Return what is on record of them."""
        facts = {"recipe": self.recipe, "k": self.k, "budget": self.units}
        return [
            run for run in read_record(Path(self.folder) / _RECORD) if facts.items() <= run.items()
        ]


def train(
    source: RecipeSource, recipe: dict, *, k: int, units: float, rate: float, seed: int
) -> dict:
    """Train once: return R² on test and on training images after so many units of compute."""
    teacher, activations, test = open_source(source)
    with tempfile.TemporaryDirectory() as output_dir:
        own = {"output_dir": output_dir, "learning_rate": rate, "seed": seed, "report_to": "none"}
        blocks, compute, objective, loop = recipe_arguments(recipe | own)
        set_seed(seed)
        model = make_raptor(teacher, source.phases(k), **asdict(blocks))
        num_tokens = activations.states(keep_batch(activations.__getitems__([0]))).shape[-2]
        cost = step_units(objective, loop, model.config, num_tokens)
        loop.steps = max(1, round(units / cost))
        loop.warmup_steps = max(1, round(_WARMUP * loop.steps))
        loop.log_every = loop.checkpoint_every = loop.steps
        configure_compute(model, compute)
        chain = chain_of(model, parse_token_weights(objective.token_weights))
        train_chains([chain], teacher, activations, objective, loop)
    model.to(teacher.device)
    judged = torch.linspace(0, len(activations) - 1, _JUDGED_ROWS).long().tolist()
    return {
        "units": cost * loop.steps,
        "steps": loop.steps,
        "train_r2": trajectory_r2(model, activations, rows=judged)["mean"]["all"],
        "r2": trajectory_r2(model, test)["mean"],
    }


def _run_group(source: RecipeSource, group: _Group) -> None:
    """Make the runs of a group that are not on record, quietly."""
    torch.set_num_threads(1)
    width = load_config(source).hidden_size
    recipe = (recipes(source.recipe, width) | variants(source.recipe))[group.recipe]
    with quietly():
        rate = recipe["learning_rate"]
        digits = source.recipe == "digits"  # what took minutes there was not tuned at length
        if not digits or group.units < _LONG or group.recipe != "ours":
            rate = tuned_rate(
                lambda rate: _run_once(source, group, recipe, rate, seed=0)["train_r2"],
                rate,
                extend=not digits or group.units < _LONG,
            )
        for seed in range(group.seeds):
            _run_once(source, group, recipe, rate, seed)


def tuned_rate(score: Callable[[float], float], rate: float, *, extend: bool = True) -> float:
    """Return the best of rate · 2ⁿ: search on as long as the last rate was the best.

    Args:
        score: the quality of a run at a rate.
        rate: where the search starts.
        extend: else only the rate itself and its half are tried.
    """
    scores = {candidate: score(candidate) for candidate in (rate, rate / 2)}
    if extend:
        scores[2 * rate] = score(2 * rate)
        for factor, end in ((2, max), (0.5, min)):
            while max(scores, key=scores.get) == (edge := end(scores)):
                scores[factor * edge] = score(factor * edge)
    return max(scores, key=scores.get)


def _run_once(source: RecipeSource, group: _Group, recipe: dict, rate: float, seed: int) -> dict:
    """Make a run, or return what is on record of it."""
    facts = {"rate": rate, "seed": seed}
    for run in group.runs():
        if facts.items() <= run.items():
            return run
    result = train(source, recipe, k=group.k, units=group.units, **facts)
    run = {"recipe": group.recipe, "k": group.k, "budget": group.units, **facts, **result}
    write_entries(Path(group.folder) / _RECORD, [run])
    return run


def benchmark_recipes(
    source: RecipeSource,
    *,
    ks: list[int],
    budgets: list[float],
    seeds: int,
    processes: int,
) -> dict:
    """Make all runs, several processes at once, the cheap ones first.

    Args:
        source: teacher, images and phases; its folder gets the record of the runs.
        processes: 0 makes no runs: what is on record is looked at.

    Raises:
        ValueError: a folder with the runs of another comparison.

    Returns:
        `runs`, all of them, and `table`: for each recipe, k and budget the rate that was chosen,
        R² of all tokens and of cls for every seed.
    """
    folder = Path(source.folder)
    source.claim_folder()
    if processes:
        prepare_images(source, num_workers=processes)
    names = recipes(source.recipe)
    points = [(name, k, budget) for budget in budgets for k in ks for name in names]
    if _VARIANTS_AT[0] in ks and _VARIANTS_AT[1] in budgets:
        points += [(name, *_VARIANTS_AT) for name in variants(source.recipe)]
    groups = [
        _Group(str(folder), *point, seeds)
        for point in sorted(points, key=lambda point: point[2])
        if point[2] <= _LAST_WITH_OUR_BATCHES or point[0] in ("ours", "reference")
    ]
    if processes:
        mend_record(folder / _RECORD)
        tasks = {group: (source, group) for group in groups}
        with progress_bar("recipes", len(groups), unit="budget") as bar:
            for _ in in_processes(_run_group, tasks, processes):
                bar.update()
    table = [row(group) for group in groups if group.runs()]
    return {"runs": read_record(folder / _RECORD), "table": table}


def row(group: _Group) -> dict:
    """Return the chosen learning rate of a group, and the R² of its seeds."""
    runs = group.runs()
    best = max((run for run in runs if run["seed"] == 0), key=lambda run: run["train_r2"])["rate"]
    best_runs = sorted((run for run in runs if run["rate"] == best), key=lambda run: run["seed"])
    return {
        "recipe": group.recipe,
        "k": group.k,
        "budget": group.units,
        "rate": best,
        "r2": [run["r2"]["all"] for run in best_runs],
        "r2_cls": [run["r2"].get("cls") for run in best_runs],  # some families have none
    }


def recipe_tables(rows: list[dict]) -> str:
    """Return R² of all tokens, `mean ± std` over seeds: a line a k and budget, a column a recipe.

    A second table has the variants of ours.
    """
    cells = {(row["k"], row["budget"], row["recipe"]): row for row in rows}
    lines, compared = [], [name for name in recipes() if any(row["recipe"] == name for row in rows)]
    for k, budget in sorted({(row["k"], row["budget"]) for row in rows}):
        results = [cells.get((k, budget, name)) for name in compared]
        cells_of_row = [
            f"{_mean_of(row, 'r2')} (rate {row['rate']:g})" if row else "–" for row in results
        ]
        lines.append([str(k), f"{budget:g}", *cells_of_row])
    tables = [markdown_table(["k", "compute", *compared], lines)]
    names = sorted(name for k, budget, name in cells if (k, budget) == _VARIANTS_AT)
    names = [name for name in names if name.startswith("ours")]
    if names[1:]:
        heading = [f"k = {_VARIANTS_AT[0]}, compute {_VARIANTS_AT[1]}", "R², all tokens", "R², cls"]
        results = [cells[(*_VARIANTS_AT, name)] for name in names]
        lines = [[row["recipe"], _mean_of(row, "r2"), _mean_of(row, "r2_cls")] for row in results]
        tables.append(markdown_table([*heading, "rate"], [
            [*line, f"{row['rate']:g}"] for line, row in zip(lines, results, strict=True)
        ]))  # fmt: skip
    return "\n\n".join(tables)


def _mean_of(row: dict, figure: str) -> str:
    """Return a figure of a row over its seeds; "–" where there is none."""
    if None in row[figure]:
        return "–"
    return mean_std(np.array(row[figure]), 4)
