"""What a study makes of its figures: statistics by hand, claims, a report of JSON files alone."""

import json
import math
import shutil

import numpy as np
import pandas
import pytest

from evaluation.recurrence.claims import CLAIMS
from evaluation.recurrence.experiments import EXPERIMENTS, Row, collect
from evaluation.recurrence.measures import (
    GAP,
    LAST,
    R2,
    R2_CLS,
    difference,
    mean_in_words,
    rank_correlation,
    table_of,
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
        "to_spread": {group: [gap] * LAYERS for group in layers}, "untied": False,
        "accuracy": accuracy, "stored_parameters": parameters, "multiply_adds": 7, "steps": 5,
    }  # fmt: skip


def phase_map(similarity=0.5, rate=0.1):
    distance = [[0.1 * abs(i - j) for j in range(LAYERS)] for i in range(LAYERS)]
    return {
        "distance": distance, "phases": {"1": [4], "2": [2, 2], "3": [1, 1, 2]},
        "similarity": similarity, "contrast": 0.1 + rate, "drop_path_rate": rate,
    }  # fmt: skip


def made_study(better=0.05):
    """A study in which max-cut is better than the others, and all rises with the drop rate."""
    rng = np.random.default_rng(0)
    rates = {"teacher": 0.1, **{f"drop_{n / 10:g}": n / 10 for n in (0, 2, 3, 4, 6)}}
    maps = {name: phase_map(0.4 + rate, rate) for name, rate in rates.items()}
    maps |= {"untrained": phase_map(0.99), "seed_1": phase_map()}
    study = {"maps": maps, "about": {"dataset": "made", "num_images": 9, "units": 3}}
    study["gap"] = [
        {"k": k, **measured(0.95, gap=gap, parameters=100 * k)}
        for k, gap in {1: 0.5, 2: 0.3, 3: 0.29}.items()
        for _ in range(3)
    ]
    study["partitions"] = [
        {"k": k, "partition": kind,
         **measured(0.9 + (kind == "max-cut") * better + 1e-3 * rng.random())}
        for k in (2, 3) for kind in ("max-cut", "uniform", "random", "shuffled") for _ in range(5)
    ]  # fmt: skip
    study["alternatives"] = [
        {"k": k, "kind": kind, **measured(r2, accuracy, parameters=100 * k)}
        for k, kind, r2, accuracy in (
            (1, "Raptor", 0.8, 0.7), (2, "Raptor", 0.9, 0.8),
            (1, "few layers, last state", 0.1, 0.75), (2, "Raptor, last state", 0.1, 0.6),
        )
    ]  # fmt: skip
    study["training"] = [
        {"teacher": name, **measured(0.5 + found["similarity"] / 4, gap=1 - found["similarity"])}
        for name, found in maps.items() for _ in range(2)
    ]  # fmt: skip
    return study


def verdicts(study):
    """Return whether each claim is seen, and the figures that decide."""
    return {claim.sentence: by_name["made"] for claim, by_name in judge_study(study)}


def test_statistics_by_hand():
    words = mean_in_words(pandas.Series([1.0, 2.0, 3.0, np.nan]))
    assert words == f"2.0000 ± {4.302653 / math.sqrt(3):.4f}"
    assert mean_in_words(pandas.Series([1.0, 2.0])) == "1.5000"  # t = 12.7 says nothing
    mean, low, high = difference(np.array([2.0, 4.0]), np.array([1.0, 1.0]))  # 1 degree of freedom
    assert mean == 2 and (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), rel=1e-4)
    x = np.arange(5.0)
    # two of all 120 orders are as extreme
    assert rank_correlation(x, x**3) == pytest.approx((1, 2 / 120))
    assert rank_correlation(x, -x) == pytest.approx((-1, 2 / 120))


def test_the_figures_of_a_student():
    # the median leaves out layers without variance, and one layer does not rule it
    row = measured()
    row["r2"]["layers"]["cls"] = [None, -9.0, 0.8, 0.9]
    row["r2"]["layers"]["all"] = [0.1, 0.2, 0.3, 0.4]
    found = table_of([row, {**row, "untied": True}])
    assert found[R2_CLS][0] == 0.8 and list(found[LAST]) == [0.4, 0.4]
    assert found[GAP][0] == pytest.approx(0.3) and np.isnan(found[R2][1])


def test_claims_follow_the_figures():
    found = verdicts(made_study())
    assert len(found) == len(CLAIMS)
    assert {sentence for sentence, verdict in found.items() if not verdict.seen} == set()
    for better, expected in ((0, None), (-0.05, False)):
        assert verdicts(made_study(better))["Max-cut beats random runs"].seen is expected
    # the gap goes on falling; similarity is that of another teacher
    study = made_study()
    study["gap"] = study["gap"][:6]
    study["maps"]["drop_0.6"]["similarity"] = 0.3
    assert verdicts(study)["ε saturates as blocks are added"].seen is False
    assert verdicts(study)["Stochastic depth makes layers alike"].seen is None
    alone = {"maps": {"teacher": phase_map()}, "about": {"dataset": "made"}}
    assert set(verdicts(alone).values()) == {None}


def test_the_report_is_a_function_of_its_files(tmp_path):
    study = made_study()
    (tmp_path / "maps.json").write_text(json.dumps({k: study[k] for k in ("maps", "about")}))
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": study[name]}))
    assert "| Max-cut beats random runs | paper | seen |" in write_report(tmp_path)
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
    assert "| Max-cut beats random runs | paper | – |" in write_report(tmp_path)


def test_students_of_the_experiments():
    maps = {"teacher": phase_map(), "drop_0.5": phase_map()}
    rows = {name: experiment(maps, [1, 2, 3], 2) for name, experiment in EXPERIMENTS.items()}
    assert len(rows["gap"]) == 3 * 2 and len(rows["partitions"]) == 2 * 4 * 2
    assert {row.teacher for row in rows["training"]} == set(maps)
    for row in rows["partitions"]:
        layers = sorted(layer for part in row.student.parts for layer in part)
        assert layers == [1, 2, 3, 4] and len(row.student.parts) == row.label["k"]
        if row.label["partition"] == "random":
            lengths = [len(part) for part in row.student.parts]
            assert row.student.contiguous
            assert lengths != maps["teacher"]["phases"][str(len(lengths))]
    kinds = {(row.label["kind"], row.label["k"]) for row in rows["alternatives"]}
    assert {("Raptor", 3), ("few layers, last state", 1)} <= kinds
    assert Student(runs_of([2, 2])) in {row.student for row in rows["gap"]}


def test_results_follow_their_labels(tmp_path):
    (tmp_path / "students").mkdir()
    for seed, accuracy in ((0, 0.1), (1, 0.2)):
        student = Student(runs_of([2, 2]), seed=seed)
        content = student_key("teacher", student) | {"accuracy": accuracy}
        record_file(tmp_path, "teacher", student).write_text(json.dumps(content))
    row = Row({"k": 2, "kind": "Raptor"}, "teacher", Student(runs_of([2, 2]), seed=1))
    label = {"k": 2, "kind": "Raptor", "seed": 1, "untied": False}
    assert collect([row], tmp_path) == [{**label, "parts": ((1, 2), (3, 4)), "accuracy": 0.2}]


def test_the_report_in_git_follows_from_its_figures(tmp_path):
    folder = ROOT / "evaluation" / "results" / "study"
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()
