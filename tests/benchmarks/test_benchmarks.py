"""The benchmarks: what is compared is equal, ratios by hand, and every program in small."""

import json
import sys
import time
from functools import partial

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from evaluation.benchmarks.__main__ import main
from evaluation.benchmarks.models import Candidates, kept_bytes
from evaluation.benchmarks.recipes import recipes, tuned_rate
from evaluation.benchmarks.timing import interleaved, median_ratio, speed_rows
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.runs.files import read_json
from tests.programs import run


def benchmark(name, output_dir, *options):
    """What `python -m evaluation.benchmarks NAME` writes."""
    command = [sys.executable, "-m", "evaluation.benchmarks", name, *options]
    run(*command, "--output_dir", output_dir, new_process=True)  # it compiles
    return json.loads((output_dir / f"{name}.json").read_text())["result"]


def test_every_round_goes_forwards_and_backwards():
    visits = []
    candidates = {name: partial(visits.append, name) for name in "abc"}
    times = interleaved(candidates, rounds=2, clock=time.perf_counter)
    assert "".join(visits) == "abccba" * 3  # one round to warm up
    assert {len(values) for values in times.values()} == {4}


def test_ratios_are_of_neighbours():
    # the machine was ten times slower in the last round: the ratio does not see it
    times = {"slow": [2.0, 2.0, 40.0], "fast": [1.0, 1.0, 10.0]}
    assert median_ratio(times, "slow", "fast") == 2.0


def test_speeds_by_hand():
    times = {"reference": [2.0, 4.0, 2.0], "matched, checkpointed": [0.5, 0.5, 0.5]}
    rows = dict(speed_rows("x", times, {"reference": 400, "matched": 300}, batch=6, peak=1e4))
    assert rows["x"] == {"matched, checkpointed": 4.0}
    assert rows["x: images a second"] == {"reference": 3.0, "matched, checkpointed": 12.0}
    shares = {"reference": 0.12, "matched, checkpointed": 0.36}
    assert rows["x: share of the peak"] == pytest.approx(shares)


@torch.no_grad()
def test_candidates_cost_what_they_say():
    candidates = Candidates("digits")
    states = candidates.states(2)
    for rollout in candidates.rollouts.values():
        assert [tuple(layer.shape) for layer in rollout(states)] == [(2, 21, 64)] * 12
    # SwiGLU of hidden 4·D: 16 D² a token instead of 12 D², and attention's 2·N·D
    flops = candidates.flops
    ratio = (16 * 64 + 2 * 21) / (12 * 64 + 2 * 21)
    assert flops["exact"] / flops["teacher"] == pytest.approx(ratio)
    # the reference and ours have the same weights to within their LayerScales and depth MLPs
    weights = {name: sum(p.numel() for p in layers.parameters())
               for name, layers in candidates.layers.items()}  # fmt: skip
    assert weights["exact"] == pytest.approx(weights["reference"], rel=0.01)


def test_kept_bytes_by_hand():
    weight, states = torch.nn.Parameter(torch.randn(4, 8)), torch.randn(100, 8)
    # a linear layer keeps its input, tanh its output; weights don't count
    assert kept_bytes(lambda: torch.tanh(states @ weight.T).sum()) == 4 * (100 * 8 + 100 * 4)


def test_rates_are_doubled_and_halved_as_long_as_that_helps():
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(rate - 6)

    assert tuned_rate(score, 1.0) == 4.0  # as good as 8, and nearer
    assert sorted(tried) == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert tuned_rate(lambda rate: -rate if rate > 0.1 else -9, 1.0) == 0.125


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "train_step"])
def test_models_are_compared(name, tmp_path):
    result = benchmark(name, tmp_path, "--size", "digits", "--batch_sizes", "2", "--rounds", "1")
    title = "inference" if name == "model" else "training step"
    last = "teacher" if name == "model" else "matched, checkpointed"
    for form in ("plain", "compiled"):
        ratios = result[f"{title}, batch 2, {form}"]
        assert set(ratios) == {"exact", "matched", last, "reference again"}
        assert min(ratios.values()) > 0
        assert max(result[f"{title}, batch 2, {form}: share of the peak"].values()) < 1.5
    if name == "train_step":
        kept = result["kept for the backward pass, batch 2"]
        assert kept["matched, checkpointed"] < 0.2 < kept["matched"] < kept["exact"] < 1


@pytest.mark.slow
def test_recipes_are_compared_and_runs_on_record_are_not_made_again(tmp_path):
    """On what `reproduce.sh digits` leaves, of a small random teacher."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4,
        num_register_tokens=1, layerscale_value=0.3,
    )  # fmt: skip
    teacher, line = Dinov2WithRegistersModel(config).eval(), tmp_path / "digits"
    for folder in ("activations", "phases"):
        (line / folder).mkdir(parents=True)
    teacher.save_pretrained(line / "teacher")
    make_processor(16).save_pretrained(line / "teacher")
    images = ImageViews(load_images("digits", "train"), make_processor(16))
    write_activations(teacher, images, line / "activations")
    (line / "phases" / "phases.json").write_text(json.dumps({"phases": {"2": [2, 2]}}))

    options = ["recipe", "--k", "2", "--budgets", "0.2", "0.4", "--seeds", "2"]
    options += ["--line", str(line), "--output_dir", str(tmp_path)]
    main(options)
    found = read_json(tmp_path / "recipe.json")["result"]
    record = line / "recipe_runs.jsonl"
    all_runs = [json.loads(text) for text in record.read_text().splitlines()]
    named = [(row["recipe"], row["budget"]) for row in found["table"]]
    assert named == [(name, budget) for budget in (0.2, 0.4) for name in recipes("digits", 32)]
    for row in found["table"]:
        facts = {"recipe": row["recipe"], "budget": row["budget"], "seed": 0}
        runs = [run for run in all_runs if facts.items() <= run.items()]
        best = max(runs, key=lambda run: run["train_r2"])
        assert len(runs) >= 3 and best["rate"] == row["rate"] and best["r2"]["all"] == row["r2"][0]
        assert len(row["r2"]) == 2 and row["r2"][0] != row["r2"][1]
    main(options)
    assert len(record.read_text().splitlines()) == len(all_runs)
    assert read_json(tmp_path / "recipe.json")["result"] == found
