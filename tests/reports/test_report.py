import json

import pytest

from evaluation.report import PUBLISHED
from raptor_hf.reports.report import ablation_section, write_report
from raptor_hf.reports.tables import ABLATION, load_results, published_table, results_table
from raptor_hf.runs.files import read_json
from tests.helpers import result


@pytest.fixture
def results():
    rows = []
    for seed, (teacher, student) in enumerate([(0.98, 0.96), (0.96, 0.95)]):
        rows.append(result("teacher", "classification", seed, {"accuracy": teacher}))
        for name in ("raptor_k2", "raptor_k2_random_init"):
            rows.append(result(name, "classification", seed, {"accuracy": student}, [4, 2], 300))
            r2 = {group: 0.9 + 0.02 * seed for group in ("all", "cls", "patches")}
            layers = {group: [value] * 6 for group, value in r2.items()}
            rows.append(result(name, "r2", seed, {"mean": r2, "layers": layers}, [4, 2], 300))
    return rows


def written(folder, rows):
    """A folder with these results."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(row))
    return folder


def test_report_and_figures(results, tmp_path):
    loaded = load_results([written(tmp_path / "results", results)])
    table = write_report(loaded, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert table in text and "- r2: 360 images of 'digits' (test)" in text
    assert (tmp_path / "r2_per_layer.png").read_bytes().startswith(b"\x89PNG")
    assert "![r2 per layer](r2_per_layer.png)" in text


def test_the_table_takes_every_task_and_baseline_that_has_results(results):
    results.append(result("small", "classification", 0, {"accuracy": 0.873}, None, 600))
    for seed, rmse in enumerate((0.612, 0.618)):
        results.append(result("raptor_k2", "depth", seed, {"rmse_m": rmse}, [4, 2], 300))
        results.append(result("raptor_k2", "segmentation", seed, {"miou": 0.43}, [4, 2], 300))
    lines = results_table(results).splitlines()
    assert lines[0].startswith(
        "| model | phases | accuracy (%) | of the teacher's (%) | mIoU (%) | depth RMSE (m) | R²"
    )
    teacher = "| teacher | – | 97.0 ± 1.4 | 100.0 | – | – | – | – | – | 1,200 | 100.0 |"
    assert lines[2].startswith(teacher)
    # one seed has no spread
    assert lines[3].startswith("| small | – | 87.3 | 90.0 | – | – | – |")
    assert lines[4] == (
        "| raptor_k2 | [4, 2] | 95.5 ± 0.7 | 98.5 | 43.0 ± 0.0 | 0.615 ± 0.004 | 0.910 ± 0.014 "
        "| 0.910 ± 0.014 | 0.910 ± 0.014 | 300 | 25.0 |"
    )


def test_figures_have_a_column_where_they_were_measured(results):
    assert "reference" not in results_table(results)
    for row in results:
        if (row["model"], row["task"]) == ("raptor_k2", "r2"):
            row["metrics"]["reference"] = 0.75
        if (row["model"], row["task"]) == ("teacher", "classification"):
            row["metrics"]["knn"] = {"accuracy": 0.9}
    lines = results_table(results).splitlines()
    assert "| k-NN accuracy (%) |" in lines[0] and "| 90.0 ± 0.0 |" in lines[2]
    assert "| R² (reference's definition) |" in lines[0]
    assert "| 0.750 ± 0.000 | 300 |" in lines[3] and "| – | 300 |" in lines[4]


def test_published_numbers_are_the_papers_and_marked():
    lines = published_table(read_json(PUBLISHED)).splitlines()
    (row,) = (line for line in lines if line.startswith("| Raptor k=3"))
    assert row.startswith(
        "| Raptor k=3 (published) | [7, 3, 2] | 83.0 ± 0.1 | 98.2 | 43.0 ± 0.3 | 0.618 ± 0.006 |"
    )
    (row,) = (line for line in lines if line.startswith("| DINOv2 ViT-S"))
    assert row.startswith("| DINOv2 ViT-S/14 (published) | – | 80.9 | 95.7 | 44.6 | 0.600 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.fixture
def ablation(tmp_path):
    """Two seeds of an ablation in which every step adds two points."""
    for seed in (0, 1):
        rows = []
        for step, name in enumerate(ABLATION):
            accuracy = {"accuracy": 0.5 + 0.02 * step + 0.01 * seed}
            rows.append(result(name, "classification", seed, accuracy, [4, 2]))
            rows.append(result(name, "r2", seed, {"mean": {"all": 0.9, "cls": 0.8}}, [4, 2]))
        written(tmp_path / "ablation" / f"seed_{seed}" / "head" / "results", rows)
    return tmp_path / "ablation"


def test_the_ablation_by_hand(results, ablation, tmp_path):
    section = ablation_section(ablation, read_json(PUBLISHED))
    write_report(results, tmp_path, ablation=section)
    text = (tmp_path / "report.md").read_text()
    assert "Seeds [0, 1]" in text
    row = "| teacher forcing only | 50.5 ± 0.7 |  | 0.900 ± 0.000 | 0.800 ± 0.000 | 3.9 |"
    assert row in text
    assert "| + autoregressive | 52.5 ± 0.7 | +2.0 | 0.900 ± 0.000 | 0.800 ± 0.000 | 72.7 |" in text
    assert "| + tuned classifier | 60.5 ± 0.7 | +2.0 |" in text
    # depth_scaling's accuracy of one seed
    (ablation / "seed_1" / "head" / "results" / "4.json").unlink()
    with pytest.raises(ValueError, match=r"lacks results for depth_scaling \(seeds \[0, 1\]\)"):
        ablation_section(ablation, read_json(PUBLISHED))


def changed(rows, number, **changes):
    """The same results, one of them with changes."""
    rows = [{**row, "images_sha256": "def"} for row in rows]
    return [*rows[:number], {**rows[number], **changes}, *rows[number + 1 :]]


@pytest.mark.parametrize(
    ("rows", "error", "word"),
    [
        (lambda rows: [], FileNotFoundError, "No result files"),
        (lambda rows: [{}], ValueError, "no result file"),
        (lambda rows: [*rows, rows[0]], ValueError, "both hold"),
        (lambda rows: changed(rows, 1, num_images=7), ValueError, "num_images is 360 and 7"),
        (lambda rows: changed(rows, 1, images_sha256="abc"), ValueError, "'def' and 'abc'"),
        (lambda rows: changed(rows, 1, dataset="pets"), ValueError, "'digits' and 'pets'"),
    ],
)
def test_results_that_make_no_table_are_refused(rows, error, word, results, tmp_path):
    with pytest.raises(error, match=word):
        load_results([written(tmp_path / "results", rows(results))])


def test_a_report_needs_the_teacher_and_a_raptor(results, tmp_path):
    with pytest.raises(ValueError, match="needs results of the teacher"):
        results_table([row for row in results if row["model"] != "teacher"])
    with pytest.raises(ValueError, match="about Raptors"):
        write_report([row for row in results if row["model"] == "teacher"], tmp_path)
