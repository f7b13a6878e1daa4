"""What a study makes of its figures: statistics by hand, claims, a report of JSON files alone."""

import json
import math
import shutil

import numpy as np
import pandas
import pytest

from evaluation.recurrence.claims import CLAIMS, beyond_floor, drifts, teachers_of
from evaluation.recurrence.experiments import EXPERIMENTS, Row, collect
from evaluation.recurrence.measures import (
    GAP,
    LAST,
    R2,
    R2_CLS,
    R2_PATCHES,
    better_rank,
    cut_share,
    mean_in_words,
    rank_correlation,
    table_of,
)
from evaluation.recurrence.report import judge_study, load_study, write_report
from evaluation.recurrence.students import Student, runs_of
from evaluation.recurrence.workbench import record_file, student_key
from tests.programs import ROOT

LAYERS = 4


def measured(r2=0.9, gap=0.3, parameters=100):
    layers = {group: [r2] * LAYERS for group in ("all", "cls", "patches")}
    return {
        "r2": {"layers": layers, "mean": {group: r2 for group in layers}},
        "to_spread": [gap] * LAYERS,
        "stored_parameters": parameters, "multiply_adds": 7, "steps": 5,
    }  # fmt: skip


def phase_map(similarity=0.5, rate=0.1):
    """A teacher whose phases hold together the more, the larger the rate."""
    depth = np.arange(LAYERS)
    distance = 0.1 * abs(depth[:, None] - depth)
    distance[0, 2] = distance[2, 0] = 0.19 - 0.1 * rate
    return {
        "distance": distance.tolist(), "phases": {"1": [4], "2": [3, 1], "3": [3, 1]},
        "similarity": similarity, "drop_path_rate": rate, "num_layers": LAYERS,
        "floor": {R2: 0.4, R2_CLS: 0.4, R2_PATCHES: 0.4},
    }  # fmt: skip


def made_study(better=0.05):
    """A study in which max-cut is better than the others, and all rises with the drop rate."""
    rng = np.random.default_rng(0)
    rates = {"teacher": 0.1, **{f"drop_{n / 10:g}": n / 10 for n in (0, 2, 3, 4, 5, 6)}}
    rates |= {f"{name}_seed_1": rate for name, rate in rates.items()}
    maps = {name: phase_map(0.2 + rate, rate) for name, rate in rates.items()}
    maps |= {"untrained": phase_map(0.99)}
    for run in range(3):
        for step in (9, 10, 100):
            maps[f"over_{run}_{step}"] = phase_map(0.9 - step / 200 + 1e-4 * rng.random(), 0)
    study = {"maps": maps, "about": {"dataset": "made", "num_images": 9, "units": 3}}
    study["gap"] = [
        {"k": k, **measured(0.95, gap=gap + 1e-5 * rng.random(), parameters=100 * k)}
        for k, gap in {1: 0.5, 2: 0.3, 3: 0.29}.items()
        for _ in range(3)
    ]
    parts = {"max-cut": [3, 1], "uniform": [2, 2], "random": [1, 3], "shuffled": [3, 1]}
    study["partitions"] = [
        {"teacher": "teacher", "k": k, "partition": kind, "parts": [[kind == "shuffled", k]],
         **measured(0.9 + (kind == "max-cut") * better + 1e-3 * rng.random())}
        for k in (2, 3) for kind in parts for _ in range(5)
    ]  # fmt: skip
    for row in study["partitions"]:
        lengths = parts[row["partition"]]
        row["parts"] = runs_of(lengths) if row["partition"] != "shuffled" else ((1, 3, 4), (2,))
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
    x = np.arange(5.0)
    # two of all 120 orders are as extreme
    assert rank_correlation([(x, x**3)]) == pytest.approx((1, 2 / 120), rel=0.2)
    assert rank_correlation([(x, -x)]) == pytest.approx((-1, 2 / 120), rel=0.2)
    rho, p = rank_correlation([(x, x**3), (x, [1, 0, 2, 3, 4])])  # ρ = 1 and 1 − 6 · 2 / 120
    assert rho == pytest.approx(0.95) and 0 < p < 0.01
    rho, p = rank_correlation([(x, x), (x, -x)])
    assert rho == pytest.approx(0) and p == 1
    # x orders y as it is, z knows nothing: of 2^10 exchanges few are as good
    y, z = np.arange(10.0), np.array([5, 1, 8, 2, 9, 0, 7, 4, 3, 6])
    gain, p = better_rank([(y, z, y)])
    assert gain == pytest.approx(1 - rank_correlation([(z, y)])[0]) and p < 0.05
    assert better_rank([(z, z, y)]) == (0, 1)
    # |i − j| of the pairs between [2, 3] and in all
    line = abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert cut_share(line, [[1, 2], [3, 4, 5]]) == pytest.approx(15 / 20)
    assert beyond_floor(0.9, 0.8) == pytest.approx(0.5)


def test_the_figures_of_a_student():
    # the median leaves out layers without variance, and one layer does not rule it
    row = measured()
    row["r2"]["layers"]["cls"] = [None, -9.0, 0.8, 0.9]
    row["r2"]["layers"]["all"] = [0.1, 0.2, 0.3, 0.4]
    found = table_of([row])
    assert found[R2_CLS][0] == 0.8 and found[LAST][0] == 0.4
    assert found[GAP][0] == pytest.approx(0.3)


def test_claims_follow_the_figures():
    study = made_study()
    found = verdicts(study)
    assert len(found) == len(CLAIMS)
    few = {
        "Raptors follow better where the cut share is larger",
        "… and better than by the cut share of a straight line",
        "… and better than by that of the layers' speeds alone",
    }  # four partitions
    assert {sentence for sentence, verdict in found.items() if verdict is None} == few
    unseen = {sentence: str(v) for sentence, v in found.items() if v and not v.seen}
    assert unseen == {}
    random = "Max-cut beats random runs, and even ones"
    for better, expected in ((0, None), (-0.05, False)):
        assert verdicts(made_study(better))[random].seen is expected
    # the gap goes on falling; a partition is not better than itself; one similarity is another's
    study["gap"] = study["gap"][:6]
    for row in study["partitions"]:
        if row["partition"] == "uniform":
            row["parts"] = runs_of([3, 1])
    study["maps"]["drop_0.6"]["similarity"] = study["maps"]["drop_0"]["similarity"]
    found = verdicts(study)
    assert found["ε saturates as blocks are added"].seen is False
    assert found[random].seen is None and "k = 2, uniform: the same" in found[random].figures
    assert found["Alike layers are easier to follow"].p > 0
    alone = {"maps": {"teacher": phase_map()}, "about": {"dataset": "made"}}
    assert set(verdicts(alone).values()) == {None}


def test_what_was_not_run_cant_be_told():
    study = made_study()
    for name, found in study["maps"].items():
        if name != "teacher":
            del found["floor"]
    study["gap"] = study["gap"][::3]
    found = verdicts(study)
    for sentence in ("… lets a Raptor follow: cls", "ε saturates as blocks are added"):
        assert found[sentence].seen is None and "not run" in found[sentence].figures
    assert found["Stochastic depth makes layers alike"].seen


def test_cut_shares_are_compared_with_those_of_drifts():
    points = np.cumsum(np.random.default_rng(1).random((8, 3)), axis=0)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) / 20
    turns, rows = drifts(distance)["the speeds alone"], []
    for first in range(1, 8):
        parts = runs_of([first, 8 - first])
        row = {"teacher": "teacher", "k": 2, "partition": "cut", "parts": parts}
        rows.append({**row, **measured(cut_share(turns, parts))})  # the speeds know all
    maps = {"teacher": {"distance": distance.tolist()}}
    found = verdicts({"maps": maps, "partitions": rows, "about": {"dataset": "made"}})
    assert found["Raptors follow better where the cut share is larger"].seen
    assert not found["… and better than by that of the layers' speeds alone"].seen
    # S of layers 1 and 3 is the product of the neighbours'
    steps = 1 - np.diagonal(distance, 1)
    assert turns[0, 2] == pytest.approx(1 - steps[0] * steps[1])


def test_r2_of_teachers_counts_beyond_the_floor():
    table = teachers_of(made_study()).set_index("teacher")
    row = table.loc["drop_0.2"]
    assert row[R2] == pytest.approx(1 - 0.4 / 0.6)


def test_the_report_is_a_function_of_its_files(tmp_path):
    study = made_study()
    (tmp_path / "maps.json").write_text(json.dumps({k: study[k] for k in ("maps", "about")}))
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": study[name]}))
    assert "| Max-cut beats random runs, and even ones | seen |" in write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"study.md", "partitions.png"} < set(first)
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert load_study(tmp_path)["gap"] == study["gap"]
    page = first["study.md"].decode()
    assert "9 held-out images of made, 3 units of compute" in page
    assert "| teacher | 2 | max-cut | 0.95" in page
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.json").unlink()
    assert "| Max-cut beats random runs, and even ones | – |" in write_report(tmp_path)


def test_students_of_the_experiments():
    own = {**phase_map(), "phases": {"1": [4], "2": [3, 1], "3": [1, 1, 2]}}
    maps = {"teacher": own, "drop_0.5": own, "seed_1": own}
    rows = {name: experiment(maps, [1, 2, 3], 2) for name, experiment in EXPERIMENTS.items()}
    assert len(rows["gap"]) == 3 * 2 and len(rows["partitions"]) == 2 * 3 + 2 * 4 * 2
    assert [row.teacher for row in rows["training"]] == list(maps)
    cuts = {}
    for row in rows["partitions"]:
        layers = sorted(layer for part in row.student.parts for layer in part)
        assert layers == [1, 2, 3, 4] and len(row.student.parts) == row.label["k"]
        lengths = [len(part) for part in row.student.parts]
        if row.label["partition"] == "random":
            assert row.student.contiguous
            assert lengths != maps["teacher"]["phases"][str(len(lengths))]
        if row.label["partition"] == "cut":
            cuts.setdefault(row.teacher, []).append(lengths)
    assert cuts == dict.fromkeys(("teacher", "seed_1"), [[1, 3], [2, 2], [3, 1]])
    assert Student(runs_of([3, 1])) in {row.student for row in rows["gap"]}


def test_results_follow_their_labels(tmp_path):
    (tmp_path / "students").mkdir()
    for seed, steps in ((0, 5), (1, 6)):
        student = Student(runs_of([2, 2]), seed=seed)
        content = student_key("teacher", student) | {"steps": steps}
        record_file(tmp_path, "teacher", student).write_text(json.dumps(content))
    row = Row({"k": 2, "kind": "Raptor"}, "teacher", Student(runs_of([2, 2]), seed=1))
    label = {"k": 2, "kind": "Raptor", "seed": 1, "parts": ((1, 2), (3, 4))}
    assert collect([row], tmp_path) == [{**label, "steps": 6}]


@pytest.mark.parametrize("name", ["study", "study_untrained"])
def test_the_reports_in_git_follow_from_their_figures(name, tmp_path):
    folder = ROOT / "evaluation" / "results" / name
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()
