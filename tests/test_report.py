import json

import numpy as np
import pytest

from raptor_hf.report import load_results, mean_std, results_table, write_report


def result(model, task, seed, metrics, phases=None, parameters=1200):
    facts = {"model": model, "task": task, "seed": seed, "metrics": metrics, "phases": phases}
    facts |= {"block_parameters": parameters, "dataset": "digits", "split": "test"}
    return facts | {"num_images": 360, "environment": {}}


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
