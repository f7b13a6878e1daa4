"""R² of students against the compute of their training: our recipe beside the published one.

At every number of blocks and every budget each recipe gets the best learning rate among its
doublings and halvings, judged on training images with the first seed. R² is that of images that it
did not learn from. Runs are kept in `recipe_runs.jsonl` of the line's folder, and not made again.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from evaluation.compute import step_units
from raptor_hf import make_raptor
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.data import ImageViews, load_images
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.fidelity import trajectory_r2
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.runs.files import read_json
from raptor_hf.teachers import load_backbone, load_processor
from training import distill_raptor

_RECIPES = Path(__file__).parents[2] / "training" / "recipes"
_NUM_IMAGES = 512  # of those that R² is measured on, at most
# lines of a recipe file that say how a run is watched, and how long it is
_OTHER = ("activations", "checkpoint", "report", "steps", "validat", "views", "warmup")


def recipes(name: str, width: int) -> dict[str, dict]:
    """Return the flags of both recipes.

    *reference* is the published one, end to end: random SwiGLU blocks of hidden width 4·D, teacher
    forcing that fades over the first quarter, plain mean squared error, AdamW, batches of 64.

    Args:
        name: of ours, training/recipes/<name>_raptor.yaml.
        width: D, channels of the teacher.
    """
    ours = yaml.safe_load((_RECIPES / f"{name}_raptor.yaml").read_text(encoding="utf-8"))
    reference = {
        "init": "random", "ffn": "swiglu", "intermediate_size": 4 * width,
        "block_norm_eps": 1e-5, "objective": "annealed",
        "normalize": "none", "token_weights": "0.45,0.10,0.45", "phase_fraction": 0.0,
        "optimizer": "adamw", "learning_rate": 1e-2 if name == "digits" else 2e-3,
        "batch_size": 64,
    }  # fmt: skip
    ours = {key: value for key, value in ours.items() if not key.startswith(_OTHER)}
    return {"ours": ours, "reference": reference}


class Setting:
    """A teacher, its phases and its images, as `reproduce.sh` leaves them or as flags name them."""

    def __init__(self, a: argparse.Namespace):
        line = Path(a.line)
        name = a.teacher or str(line / "teacher")
        self.teacher, self.record = load_backbone(name), line / "recipe_runs.jsonl"
        self.flags = {"teacher": name, "phases_file": line / "phases" / "phases.json"}
        self.phases = read_json(self.flags["phases_file"])["phases"]
        if a.dataset:
            self.flags |= {"activations": "online", "dataset": a.dataset, "views": 0}
        else:
            self.flags["activations"] = line / "activations"
        self.size = ["--resolution", *map(str, a.resolution)] if a.resolution else []
        processor = load_processor(name, a.resolution)

        def states(split: str) -> OnlineActivations:
            images = load_images(a.dataset or "digits", split)
            # at equal distances: a folder's images are sorted by class
            rows = np.linspace(0, len(images) - 1, min(_NUM_IMAGES, len(images))).astype(int)
            return OnlineActivations(self.teacher, ImageViews(images, processor, image_ids=rows))

        self.learned, self.tested = states("train"), states("val" if a.dataset else "test")

    def units(self, recipe: dict, k: int) -> float:
        """Return the compute of a step, in steps of 64 images through blocks like the teacher's."""
        shape = {name: recipe[name] for name in ("ffn", "intermediate_size") if name in recipe}
        student = make_raptor(self.teacher, self.phases[str(k)], init="random", **shape)
        objective = ObjectiveArguments(objective=recipe.get("objective", "autoregressive"))
        loop = LoopArguments(
            output_dir="", batch_size=recipe["batch_size"], optimizer=recipe["optimizer"]
        )
        num_tokens = self.tested.states(self.tested.__getitems__([0])).shape[-2]
        return step_units(objective, loop, student.config, num_tokens)

    def run(self, recipe: dict, facts: dict, rate: float, seed: int) -> dict:
        """Return a run with its R²; train, if it is not on record.

        Args:
            facts: name of the recipe, k, and budget in units.
        """
        facts = {**facts, "rate": rate, "seed": seed}
        record = self.record.read_text(encoding="utf-8") if self.record.exists() else ""
        for run in map(json.loads, record.splitlines()):
            if facts.items() <= run.items():
                return run
        units = self.units(recipe, facts["k"])
        steps = max(1, round(facts["budget"] / units))
        flags = {
            **self.flags, **recipe, "k": facts["k"], "learning_rate": rate, "seed": seed,
            "steps": steps, "warmup_steps": max(1, steps // 10), "report_to": "none",
        }  # fmt: skip

        # the program of the recipes, and R² of what it saves
        with tempfile.TemporaryDirectory() as folder:
            words = [*(f"--{name}={value}" for name, value in flags.items()), *self.size]
            with contextlib.redirect_stdout(io.StringIO()):
                distill_raptor.main([*words, f"--output_dir={folder}/raptor"])
            student = load_backbone(f"{folder}/raptor")
        train_r2 = trajectory_r2(student, self.learned)["mean"]["all"]
        r2 = trajectory_r2(student, self.tested)["mean"]
        run = {**facts, "units": units * steps, "steps": steps, "train_r2": train_r2, "r2": r2}
        print(f"{facts}: R² {r2['all']:.4f}", flush=True)
        with open(self.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        return run


def tuned_rate(score: Callable[[float], float], rate: float) -> float:
    """Return the best of rate · 2ⁿ: search on as long as the last rate tried was the best."""
    scores = {candidate: score(candidate) for candidate in (rate, rate / 2, 2 * rate)}
    for factor, end in ((2, max), (0.5, min)):
        while max(scores, key=scores.get) == (edge := end(scores)):
            scores[factor * edge] = score(factor * edge)
    return max(scores, key=scores.get)


def benchmark_recipes(a: argparse.Namespace) -> dict:
    """Make all runs that are not on record, the cheap ones first.

    Returns:
        `table`: for each recipe, k and budget the tuned rate, and the R² of all tokens and of cls
        for every seed.
    """
    setting, table = Setting(a), []
    compared = recipes(Path(a.line).name.split("_")[0], setting.teacher.config.hidden_size)
    points = [(budget, k) for budget in sorted(a.budgets) for k in a.k]
    for budget, k in points:
        for name, recipe in compared.items():
            facts = {"recipe": name, "k": k, "budget": budget}
            run = partial(setting.run, recipe, facts)
            rate = tuned_rate(
                lambda rate, run=run: run(rate, 0)["train_r2"], recipe["learning_rate"]
            )
            r2 = [run(rate, seed)["r2"] for seed in range(a.seeds)]
            row = {"r2": [one["all"] for one in r2], "r2_cls": [one.get("cls") for one in r2]}
            table.append({**facts, "rate": rate, **row})
    return {"table": table}
