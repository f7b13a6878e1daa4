"""The study of nulls: a tiny random teacher and its Raptor on digits."""

import json
import sys

import numpy as np

from tests.helpers import save_models
from tests.programs import run


def test_a_quick_study(tmp_path):
    models = save_models(tmp_path / "models")
    out = tmp_path / "out"
    run(
        sys.executable, "-m", "evaluation.recurrence.nulls", "--teacher", models / "teacher",
        "--raptors", models / "bare_raptor", "--dataset", "digits", "--quick", "--output_dir", out,
    )  # fmt: skip
    found = json.loads((out / "nulls.json").read_text())
    assert (found["num_images"], found["num_runs"], found["teacher"]) == (60, 16, "teacher")
    assert list(found["networks"]) == ["teacher", "bare_raptor", "untrained", "shuffled 1"]
    teacher = found["networks"]["teacher"]

    # phases by measure and tokens
    assert list(teacher["phases"]) == ["raw cosine", "centred cosine", "debiased CKA"]
    for by_tokens in teacher["phases"].values():
        assert list(by_tokens) == ["cls", "patches", "all"]
        for k, cut in by_tokens["all"]["cuts"].items():
            assert len(cut["phases"]) == int(k) and sum(cut["phases"]) == 6
            assert cut["cut_share"]["low"] <= cut["cut_share"]["value"] <= cut["cut_share"]["high"]

    # all swaps of a teacher, none of a Raptor
    cosines = np.array(teacher["swaps"]["cosine"])
    assert cosines.shape == (6, 6) and (cosines.diagonal() == 1).all()
    assert (cosines[~np.eye(6, dtype=bool)] < 1).all()
    assert "swaps" not in found["networks"]["bare_raptor"]

    assert list(teacher["growth"]["cls"]) == ["0", "1", "3", "4"]
    assert list(found["r2"])[0] == "constant" and "bare_raptor" in found["r2"]
    page = (out / "nulls.md").read_text()
    assert "| claim | teacher | bare_raptor | untrained | shuffled 1 | against the nulls |" in page
    assert str(tmp_path) not in page + (out / "nulls.json").read_text()
    assert {path.stem for path in out.glob("*.png")} == {"phases", "swaps", "growth"}
