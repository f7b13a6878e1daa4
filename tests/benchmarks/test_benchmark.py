import json
import sys
import time

import numpy as np
import pytest
import torch

from evaluation.benchmarks.models import Candidates
from evaluation.benchmarks.speed import images_a_second
from evaluation.benchmarks.timing import interleaved, median_ratio, peak_memory, within
from evaluation.benchmarks.training import kept_bytes
from tests.programs import run


def test_every_round_goes_forwards_and_backwards():
    visits = []
    candidates = {name: lambda visit, name=name: visits.append((name, visit)) for name in "abc"}
    times = interleaved(candidates, rounds=2)
    order = "".join(name for name, _ in visits)
    assert order == "abccba" * 3  # one round to warm up
    assert {len(values) for values in times.values()} == {4}
    assert [visit for name, visit in visits if name == "b"] == [2, 3, 0, 1, 2, 3]


def test_ratios_are_of_neighbours():
    # the machine was ten times slower in the last round: the ratio does not see it
    times = {"slow": [2.0, 2.0, 40.0], "fast": [1.0, 1.0, 10.0]}
    assert median_ratio(times, "slow", "fast") == 2.0


def test_what_takes_too_long_is_left_out_and_the_rest_goes_on():
    def rows(seconds):
        yield "first", {"a": 1.0}
        time.sleep(seconds)
        yield "second", {"a": 2.0}

    assert dict(within(5, "quick", lambda: rows(0))) == {"first": {"a": 1.0}, "second": {"a": 2.0}}
    assert dict(within(0.05, "slow", lambda: rows(5))) == {
        "slow: left out": {"after seconds": 0.05}
    }
    time.sleep(0.06)  # no alarm is left


def take(megabytes):
    np.ones(megabytes * 2**20, dtype=np.uint8).sum()


def test_peak_memory_sees_what_was_there_for_a_moment():
    grown = peak_memory(take, 200) - peak_memory(take, 1)
    assert grown == pytest.approx(199 * 2**20, rel=0.1)


def fail():
    raise ValueError("on purpose")


def test_a_process_that_fails_is_said():
    with pytest.raises(RuntimeError, match="fail failed"):
        peak_memory(fail)


def test_the_references_block_and_ours_of_its_architecture_are_one_function():
    candidates = Candidates("digits")
    states = candidates.states(2)
    with torch.no_grad():
        found = {name: rollout(states) for name, rollout in candidates.rollouts().items()}
    assert {len(trajectory) for trajectory in found.values()} == {12}
    for model in (candidates.teacher, candidates.exact, candidates.matched):  # alike
        assert model.config._attn_implementation == "sdpa"
    for ours, theirs in zip(found["exact"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # SwiGLU of hidden 4·D: 16 D² a token instead of 12 D², and attention's 2·N·D
    flops = candidates.flops()
    assert flops["exact"] / flops["teacher"] == pytest.approx(
        (16 * 64 + 2 * 21) / (12 * 64 + 2 * 21)
    )
    # three blocks instead of twelve layers; D² · 12 weights, biases and norms aside
    weights = candidates.weight_bytes()
    assert weights["matched"] / weights["teacher"] == pytest.approx(3 / 12, rel=0.1)
    assert weights["exact"] / weights["matched"] == pytest.approx(16 / 12, rel=0.05)


def test_kept_bytes_by_hand():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    states = torch.randn(100, 8)
    # a linear layer keeps its input, tanh its output; weights don't count
    assert kept_bytes(lambda: torch.tanh(states @ weight.T).sum()) == 4 * (100 * 8 + 100 * 4)


def test_throughput_by_hand():
    candidates = Candidates("digits")
    times = {"reference": [2.0, 4.0, 2.0], "matched, checkpointed": [0.5], "reference again": [1.0]}
    rows = dict(images_a_second("x", candidates, times, batch=6, peak=1e9, passes=3))
    assert rows["x: images a second"] == {
        "reference": 3.0, "matched, checkpointed": 12.0, "reference again": 6.0
    }  # fmt: skip
    flops = candidates.flops()
    assert rows["x: share of the peak"]["reference"] == pytest.approx(
        3 * flops["reference"] * 3 / 1e9
    )
    assert rows["x: share of the peak"]["matched, checkpointed"] == pytest.approx(
        3 * flops["matched"] * 12 / 1e9
    )


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["model", "train_step"])
def test_models_are_compared(suite, tmp_path):
    forms = ["plain", "compiled"] if suite == "model" else ["plain"]  # compiling takes long
    sizes = ["--teacher", "digits", "--batch_sizes", "2", "--rounds", "1", "--forms", *forms]
    done = run(
        sys.executable, "-m", "evaluation.benchmarks", suite, *sizes, "--output_dir", tmp_path
    )
    result = json.loads((tmp_path / f"{suite}.json").read_text())["result"]
    assert (tmp_path / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    what = "inference" if suite == "model" else "training step"
    names = {"exact", "matched", "reference again"}
    checkpointed = {"matched, checkpointed", "matched, attention kept"}
    names |= {"teacher"} if suite == "model" else checkpointed
    for form in forms:
        times = result[f"{what}, batch 2, {form}"]
        assert set(times) == names and all(ratio > 0 for ratio in times.values())
        shares = result[f"{what}, batch 2, {form}: share of the peak"]
        assert all(0 < share < 1.5 for share in shares.values())
    assert "reference again" in done.stdout
    if suite == "model":
        assert result["seconds to compile"]["all 12 applications"] > 0
    else:
        kept = result["kept for the backward pass, batch 2"]
        assert kept["matched, checkpointed"] < 0.2 < kept["matched"] < kept["exact"] < 1


@pytest.mark.slow
def test_the_program_compares_and_writes_its_figures(tmp_path):
    done = run(
        sys.executable, "-m", "evaluation.benchmarks", "activations", "--teacher", "digits",
        "--images", "128", "--rounds", "1", "--folder", tmp_path / "files",
        "--output_dir", tmp_path, new_process=True,
    )  # fmt: skip
    written = json.loads((tmp_path / "activations.json").read_text())
    assert written["settings"] == {
        "teacher": "digits", "images": 128, "rounds": 1, "device": "cpu"
    }  # fmt: skip
    for name, others in {
        "reading, all layers": ["np.memmap", "torch format", "reference"],
        "reading, 4 layers": ["np.memmap", "torch format", "reference"],
        "writing": ["plain file"],
    }.items():
        assert name in done.stdout
        assert all(written["result"][name][other] > 0 for other in others)
    assert not (tmp_path / "files").exists()


@pytest.mark.slow
def test_the_pipeline_is_measured_row_by_row(tmp_path):
    options = ["--folder", tmp_path / "files", "--output_dir", tmp_path, "--images", "80"]
    run(sys.executable, "-m", "evaluation.benchmarks", "images", "--rounds", "1", *options)
    result = json.loads((tmp_path / "images.json").read_text())["result"]
    for size in ("500×375", "2000×1500"):
        speeds = result[f"JPEG of {size}: images a second"]
        assert speeds["ours, --image_cache"] > speeds["ours"] > speeds["plain"] > 0
    options += ["--teacher", "digits", "--steps", "6", "--batch_sizes", "8", "--forms", "plain"]
    run(sys.executable, "-m", "evaluation.benchmarks", "train", *options)
    result = json.loads((tmp_path / "train.json").read_text())["result"]
    assert result["training on the device"]["images a second"] > 0
    shares = result["training: of the speed on the device"]
    assert set(shares) == {"from files", "from the cache"} and min(shares.values()) > 0
