import json

import numpy as np
import pytest

from evaluation.report import PUBLISHED
from raptor_hf.reports.figures import axis_limits
from raptor_hf.reports.report import write_report
from raptor_hf.reports.tables import ABLATION, load_results, mean_std, results_table
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


def test_table_by_hand(results):
    lines = results_table(results).splitlines()
    assert lines[2].startswith("| teacher | – | 97.0 ± 1.4 | 100.0 | – | – | – | 1,200 | 100.0 |")
    assert lines[3] == (
        "| raptor_k2 | [4, 2] | 95.5 ± 0.7 | 98.5 | 0.910 ± 0.014 | 0.910 ± 0.014 | 0.910 ± 0.014 "
        "| 300 | 25.0 |"
    )


def test_one_seed_has_no_spread():
    assert mean_std(np.array([0.12345]), 3) == "0.123"


def test_report_and_figures(results, tmp_path):
    (tmp_path / "results").mkdir()
    for number, row in enumerate(results):
        (tmp_path / "results" / f"{number}.json").write_text(json.dumps(row))
    loaded = load_results([tmp_path / "results"])
    table = write_report(loaded, tmp_path, pair=("raptor_k2", "raptor_k2_random_init"))
    text = (tmp_path / "report.md").read_text()
    assert table in text
    assert "| raptor_k2_random_init | random | 0.910 ± 0.014 |" in text
    for figure in ("against_k.png", "r2_per_layer.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
        assert figure in text


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No result files"):
        load_results([tmp_path])


def test_the_table_takes_every_task_and_baseline_that_has_results(results):
    results.append(result("small", "classification", 0, {"accuracy": 0.873}, None, 600))
    for seed, rmse in enumerate((0.612, 0.618)):
        results.append(result("raptor_k2", "depth", seed, {"rmse_m": rmse}, [4, 2], 300))
        results.append(result("raptor_k2", "segmentation", seed, {"miou": 0.43}, [4, 2], 300))
    lines = results_table(results).splitlines()
    assert lines[0].startswith(
        "| model | phases | accuracy (%) | of the teacher's (%) | mIoU (%) | depth RMSE (m) | R²"
    )
    assert lines[2].startswith("| teacher | – | 97.0 ± 1.4 | 100.0 | – | – | – |")
    assert lines[3].startswith("| small | – | 87.3 | 90.0 | – | – | – |")
    assert lines[4].startswith(
        "| raptor_k2 | [4, 2] | 95.5 ± 0.7 | 98.5 | 43.0 ± 0.0 | 0.615 ± 0.004 | 0.910 ± 0.014 |"
    )


def test_the_references_r2_has_a_column_where_it_was_measured(results):
    assert "reference" not in results_table(results)
    for number, row in enumerate(results):
        if row["task"] == "r2" and row["model"] == "raptor_k2":
            results[number] = {**row, "metrics": {**row["metrics"], "reference": 0.75}}
    lines = results_table(results).splitlines()
    assert "| R² (reference's definition) |" in lines[0]
    assert "| 0.750 ± 0.000 | 300 |" in lines[3]
    assert "| – | 300 |" in lines[4]


def test_published_numbers_are_the_papers_and_marked(results):
    published = read_json(PUBLISHED)
    lines = results_table(results, published).splitlines()
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
        folder = tmp_path / "ablation" / f"seed_{seed}" / "head" / "results"
        folder.mkdir(parents=True)
        for step, name in enumerate(ABLATION):
            accuracy = {"accuracy": 0.5 + 0.02 * step + 0.01 * seed}
            r2 = {"mean": {"all": 0.9, "cls": 0.8}}
            for task, metrics in (("classification", accuracy), ("r2", r2)):
                row = result(name, task, seed, metrics, [4, 2])
                (folder / f"{name}_{task}.json").write_text(json.dumps(row))
    time = {"command": "bash training/ablate.sh digits", "seconds": 600}
    (tmp_path / "ablation" / "time.json").write_text(json.dumps(time))
    return tmp_path / "ablation"


def test_the_ablation_by_hand(results, ablation, tmp_path):
    write_report(results, tmp_path, ablation=ablation, published=read_json(PUBLISHED))
    text = (tmp_path / "report.md").read_text()
    assert "Made by `bash training/ablate.sh digits` in 10 minutes; seeds [0, 1]" in text
    row = "| teacher forcing only | 50.5 ± 0.7 |  | 0.900 ± 0.000 | 0.800 ± 0.000 | 3.9 |"
    assert row in text
    assert "| + autoregressive | 52.5 ± 0.7 | +2.0 | 0.900 ± 0.000 | 0.800 ± 0.000 | 72.7 |" in text
    assert "| + tuned classifier | 60.5 ± 0.7 | +2.0 |" in text
    (ablation / "seed_0" / "head" / "results" / "depth_scaling_classification.json").unlink()
    (ablation / "seed_1" / "head" / "results" / "depth_scaling_classification.json").unlink()
    with pytest.raises(ValueError, match="lacks results for depth_scaling"):
        write_report(results, tmp_path, ablation=ablation)


def test_an_ablation_with_uneven_seeds_is_refused(results, ablation, tmp_path):
    (ablation / "seed_1" / "head" / "results" / "second_stage_classification.json").unlink()
    with pytest.raises(ValueError, match=r"lacks results for second_stage \(seeds \[0, 1\]\)"):
        write_report(results, tmp_path, ablation=ablation)


def test_results_that_count_twice_or_lack_a_model_are_refused(results, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results[0]))
    with pytest.raises(ValueError, match="both hold the result of .*'teacher', 'classification'"):
        load_results([tmp_path, tmp_path])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result file"):
        load_results([tmp_path])
    with pytest.raises(ValueError, match="no R² result of 'nope'"):
        write_report(results, tmp_path, pair=("raptor_k2", "nope"))
    with pytest.raises(ValueError, match="needs results of the teacher; got only raptor_k2"):
        results_table([row for row in results if row["model"] != "teacher"])
    with pytest.raises(ValueError, match="about Raptors"):
        write_report([row for row in results if row["model"] == "teacher"], tmp_path)


def test_the_baseline_of_the_figure_must_be_there(results, tmp_path):
    with pytest.raises(ValueError, match="no result for the baseline 'vit_s'; the models are"):
        write_report(results, tmp_path, baseline="vit_s")


def test_axes_are_the_published_ones_until_a_value_leaves_them():
    assert axis_limits(np.array([96.0, 99.0]), (90, 100), 5) == (90, 100)
    assert axis_limits(np.array([88.0, 101.0]), (90, 100), 5) == (85, 105)


def test_results_of_other_images_are_refused(results, tmp_path):
    for changes, message in (
        ({"num_images": 7}, "num_images 7, not 360"),
        ({"images_sha256": "abc"}, "images_sha256 'abc', not 'def'"),
        ({"dataset": "pets"}, "dataset 'pets', not 'digits'"),
    ):
        for number, row in enumerate(results):
            row = {**row, "images_sha256": "def", **(changes if number == 1 else {})}
            (tmp_path / f"{number}.json").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=f"judged on other images .*{message}"):
            load_results([tmp_path])
