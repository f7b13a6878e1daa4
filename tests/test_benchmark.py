import json
import sys

import numpy as np
import pytest

from raptor_hf.benchmark import interleaved, median_ratio, peak_memory
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


def test_the_program_compares_and_writes_its_figures(tmp_path):
    done = run(
        sys.executable, "evaluation/benchmark.py", "activations", "--teacher", "digits",
        "--images", "128", "--rounds", "1", "--folder", tmp_path / "files",
        "--output_dir", tmp_path,
    )  # fmt: skip
    written = json.loads((tmp_path / "activations.json").read_text())
    assert written["settings"] == {"teacher": "digits", "images": 128, "rounds": 1}
    for name, others in {
        "reading, all layers": ["np.memmap", "torch format", "reference"],
        "reading, 4 layers": ["np.memmap", "torch format", "reference"],
        "writing": ["plain file"],
    }.items():
        assert name in done.stdout
        assert all(written["result"][name][other] > 0 for other in others)
    assert not (tmp_path / "files").exists()
