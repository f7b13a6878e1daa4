"""What a study makes of its figures: statistics by hand, claims, a report of JSON files alone."""

import json
import math
import shutil

import numpy as np
import pytest

from evaluation.recurrence.claims import CLAIMS
from evaluation.recurrence.experiments import EXPERIMENTS, Plan, Row, collect
from evaluation.recurrence.measures import (
    correlation,
    difference,
    interval,
    saturation,
    student_t,
    values_of,
)
from evaluation.recurrence.report import judge_study, load_study, write_report
from evaluation.recurrence.students import Student, runs_of
from evaluation.recurrence.workbench import record_file, student_key
from tests.programs import ROOT

LAYERS = 4


def measured(r2=0.9, accuracy=0.8, gap=0.3, parameters=100):
    layers = {group: [r2] * LAYERS for group in ("all", "cls", "patches")}
    return {
        "r2": {"layers": layers, "mean": {group: r2 for group in layers}},
        "to_spread": {group: [gap] * LAYERS for group in layers},
        "accuracy": accuracy, "stored_parameters": parameters, "multiply_adds": 7, "steps": 5,
    }  # fmt: skip


def phase_map(similarity=0.5, contrast=0.2, rate=0.1, accuracy=0.9):
    distance = [[0.0 if i == j else 0.1 * abs(i - j) for j in range(LAYERS)] for i in range(LAYERS)]
    phases = {"1": [4], "2": [2, 2], "3": [1, 1, 2]}
    return {
        "distance": distance, "phases": phases, "similarity": similarity, "contrast": contrast,
        "drop_path_rate": rate, "accuracy": accuracy, "sizes": {"24": phases},
        "stability": {k: {"same": 0.95} for k in ("2", "3")},
    }  # fmt: skip


def made_study(better=0.05):
    """A study in which max-cut is better than the others, and all rises with the drop rate."""
    rng = np.random.default_rng(0)
    rates = {"teacher": 0.1, **{f"drop_{n / 10:g}": n / 10 for n in (0, 2, 3, 4, 6)}}
    maps = {name: phase_map(0.4 + rate, 0.1 + rate, rate) for name, rate in rates.items()}
    maps |= {"untrained": phase_map(0.99), "overfitted": phase_map(0.1), "seed_1": phase_map()}
    study = {"maps": maps, "about": {"dataset": "made", "num_images": 9, "units": 3}}
    study["gap"] = [
        {"k": k, "seed": s, **measured(0.95, gap=gap, parameters=100 * k)}
        for k, gap in {1: 0.5, 2: 0.3, 3: 0.29}.items()
        for s in range(3)
    ]
    study["partitions"] = [
        {"k": k, "partition": kind, "seed": seed, "parts": kind,
         **measured(0.9 + (kind == "max-cut") * better + 1e-3 * rng.random())}
        for k in (2, 3) for kind in ("max-cut", "uniform", "random", "shuffled")
        for seed in range(5)
    ]  # fmt: skip
    study["alternatives"] = [
        {"k": k, "kind": kind, "seed": 0, **measured(r2, accuracy, parameters=parameters)}
        for k, kind, r2, accuracy, parameters in (
            (1, "Raptor", 0.8, 0.7, 100), (2, "Raptor", 0.9, 0.8, 200),
            (1, "few layers, last state", 0.1, 0.75, 100),
            (2, "Raptor, last state", 0.1, 0.6, 200),
        )
    ]  # fmt: skip
    study["training"] = [
        {"teacher": name, "seed": seed, **measured(0.5 + found["similarity"] / 4)}
        for name, found in maps.items() for seed in range(2)
    ]  # fmt: skip
    return study


def verdicts(study):
    """Return whether each claim is seen."""
    seen = {}
    for claim, by_name in judge_study(study):
        (verdict,) = by_name.values()
        seen[claim.sentence] = None if verdict is None else verdict.seen
    return seen


def figures_of(study, sentence):
    verdicts = {claim.sentence: found["made"] for claim, found in judge_study(study)}
    return verdicts[sentence].figures


def test_statistics_by_hand():
    mean, width = interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval(np.array([1.0]))[1])
    for freedom, t in ((1, 12.7062), (2.5, 3.5747), (8, 2.3060), (100, 1.9840)):
        assert student_t(freedom) == pytest.approx(t, rel=1e-4)  # of scipy
    mean, low, high = difference(np.array([2.0, 4.0]), np.array([1.0, 1.0]))  # t = 12.7, 1 degree
    assert mean == 2 and (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), rel=1e-4)
    x = np.arange(10.0)
    assert correlation(x, x**3) == pytest.approx((1, 1, 1))
    rho, low, high = correlation(x, np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3]))
    assert low < rho < high and correlation(x, -x) == pytest.approx((-1, -1, -1))
    study = made_study()
    assert saturation(study["gap"]) == 2 and saturation(study["gap"][:6]) is None
    assert values_of(study["gap"], "gap", k=2).tolist() == pytest.approx([0.3] * 3)
    # the median leaves out layers without variance, and one layer does not rule it
    row = measured()
    row["r2"]["layers"]["cls"] = [None, -9.0, 0.8, 0.9]
    assert values_of([row], "median cls").tolist() == [0.8]
    row["r2"]["layers"]["cls"] = [None] * 4
    assert not len(values_of([row], "median cls"))
    assert values_of(study["gap"], "last cls", k=2).tolist() == [0.95] * 3


def test_claims_follow_the_figures():
    seen = verdicts(made_study())
    assert len(seen) == len(CLAIMS)
    for sentence, expected in {
        "Few blocks reproduce all layers": True,
        "ε falls with every further block": True,
        "… and saturates": True,
        "Max-cut beats random runs: R²": True,
        "Max-cut beats random runs: accuracy": None,  # all are equal
        "Phases are stable over seeds of the teacher": True,
        "Stochastic depth makes layers alike": True,
        "… lets a Raptor follow: cls": True,
        "An untrained ViT is easier to follow than a trained one": True,
        "Overfitting lowers similarity and fidelity": True,
        "A Raptor beats a shallow ViT of as many bytes: accuracy": None,  # one seed
    }.items():
        assert seen[sentence] == expected, sentence
    uniform = "Repeated max-cut beats uniform runs: R²"
    text = figures_of(made_study(), uniform)
    assert text.startswith("k = 2") and "k = 3" in text
    same = made_study()
    for row in same["partitions"]:
        if row["k"] == 2:
            row["parts"] = 2
    assert figures_of(same, uniform).startswith("k = 3")  # both are one partition at k = 2
    for better, expected in ((0, None), (-0.05, False)):
        assert verdicts(made_study(better))["Max-cut beats random runs: R²"] == expected
    # a copy of the embeddings follows an untrained teacher's patches, and not its cls token
    copied = made_study()
    for row in copied["training"]:
        if row["teacher"] == "untrained":
            row["r2"]["layers"]["cls"] = [-9.0, -2, -1, 0.9]
    sentence = "An untrained ViT is easier to follow than a trained one"
    assert verdicts(copied)[sentence] == False  # noqa: E712
    assert "median cls -1.500 (untrained)" in figures_of(copied, sentence)
    # one teacher more or less similar than another says nothing where seeds differ by more
    seeds = made_study()
    seeds["maps"]["seed_1"]["similarity"] = 0.95
    assert verdicts(seeds)["Overfitting lowers similarity and fidelity"] is None
    alone = {"maps": {"teacher": phase_map()}, "about": {"dataset": "made"}}
    assert set(verdicts(alone).values()) == {True, None}


def test_the_report_is_a_function_of_its_files(tmp_path):
    study = made_study()
    (tmp_path / "maps.json").write_text(json.dumps({k: study[k] for k in ("maps", "about")}))
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": study[name]}))
    assert "| Few blocks reproduce all layers | paper | seen |" in write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"study.md", "gap.png", "alternatives.png"} < set(first)
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert load_study(tmp_path)["gap"] == study["gap"]
    page = first["study.md"].decode()
    assert "9 held-out images of made, 3 units of compute" in page
    assert "| 2 | max-cut | 0.95" in page and "| Raptor | 1 | 0.8000 | 0.8000 |" in page
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.json").unlink()
    assert "| Few blocks reproduce all layers | paper | – |" in write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"maps\.json"):
        load_study(tmp_path / "elsewhere")


def test_students_of_the_experiments():
    maps = {"teacher": phase_map(), "drop_0.5": phase_map()}
    plan = Plan(ks=[1, 2, 3], partition_ks=[2, 3], seeds=2, other_seeds=1)
    rows = {name: experiment(maps, plan) for name, experiment in EXPERIMENTS.items()}
    assert len(rows["gap"]) == 3 * 2 and len(rows["partitions"]) == 2 * 4 * 2
    assert {row.teacher for row in rows["training"]} == set(maps)
    for row in rows["partitions"]:
        layers = sorted(layer for part in row.student.parts for layer in part)
        assert layers == [1, 2, 3, 4] and len(row.student.parts) == row.label["k"]
        if row.label["partition"] == "random":
            lengths = [len(part) for part in row.student.parts]
            assert (
                row.student.contiguous and lengths != maps["teacher"]["phases"][str(len(lengths))]
            )
    kinds = {(row.label["kind"], row.label["k"]) for row in rows["alternatives"]}
    assert {("Raptor", 3), ("few layers, last state", 1)} <= kinds
    students = {row.student for own in rows.values() for row in own if row.teacher == "teacher"}
    assert Student(runs_of([2, 2])) in students


def test_results_follow_their_labels(tmp_path):
    (tmp_path / "students").mkdir()
    for seed, accuracy in ((0, 0.1), (1, 0.2)):
        student = Student(runs_of([2, 2]), seed=seed)
        content = student_key("teacher", student) | {"accuracy": accuracy}
        record_file(tmp_path, "teacher", student).write_text(json.dumps(content))
    row = Row({"k": 2, "kind": "Raptor"}, "teacher", Student(runs_of([2, 2]), seed=1))
    label = {"k": 2, "kind": "Raptor", "seed": 1, "untied": False}
    assert collect([row], tmp_path) == [{**label, "parts": [[1, 2], [3, 4]], "accuracy": 0.2}]


def test_the_report_in_git_follows_from_its_figures(tmp_path):
    folder = ROOT / "evaluation" / "results" / "study"
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()
