"""The study of nulls: a tiny random teacher and its Raptor on digits."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.recurrence.nulls import all_swaps
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.teachers import trajectory
from tests.helpers import LAYOUT, save_models
from tests.programs import run


def test_a_swap_is_the_teacher_with_another_layer(teacher, pixel_values):
    batch = {"pixel_values": pixel_values, "image_id": torch.arange(3)}
    found = all_swaps(DepthSystem("teacher", teacher, LAYOUT), [batch])
    assert found.shape == (3, 6, 6) and (found.diagonal(axis1=1, axis2=2) == 1).all()
    layers, untouched = list(teacher.encoder.layer), trajectory(teacher, pixel_values)[:, -1, 0]
    for i, j in ((2, 5), (6, 3)):
        swapped = [*layers[: i - 1], layers[j - 1], *layers[i:]]
        teacher.encoder.layer = nn.ModuleList(swapped)
        last = trajectory(teacher, pixel_values)[:, -1, 0]
        cosines = nn.functional.cosine_similarity(last, untouched)
        np.testing.assert_allclose(found[:, i - 1, j - 1], cosines, rtol=1e-5)


def test_a_quick_study(tmp_path):
    models = save_models(tmp_path / "models")
    out = tmp_path / "out"
    run(
        sys.executable, "-m", "evaluation.recurrence.nulls", "--teacher", models / "teacher",
        "--raptors", models / "bare_raptor", "--dataset", "digits", "--quick", "--output_dir", out,
    )  # fmt: skip
    found = json.loads((out / "nulls.json").read_text())
    assert (found["num_images"], found["num_runs"], found["teacher"]) == (60, 16, "teacher")
    assert found["nulls"] == ["untrained 1", "untrained 2", "shuffled 1", "shuffled 2"]
    assert list(found["networks"]) == ["teacher", "bare_raptor", *found["nulls"]]
    teacher = found["networks"]["teacher"]

    # phases by measure and tokens
    assert list(teacher["phases"]) == ["raw cosine", "centred cosine", "debiased CKA"]
    for by_tokens in teacher["phases"].values():
        assert list(by_tokens) == ["cls", "patches", "all"]
        for k, cut in by_tokens["all"]["cuts"].items():
            assert len(cut["phases"]["maxcut"]) == int(k) and sum(cut["phases"]["maxcut"]) == 6
            value, error = cut["share"]
            assert -1 < value < 1 and error > 0
    for network in found["networks"].values():
        mean, error, dof = network["figures"]["debiased CKA, k = 2: within"]
        assert np.isfinite(mean) and error > 0 and dof == 59

    # all swaps of a teacher, none of a Raptor
    cosines = np.array(teacher["swaps"])
    assert cosines.shape == (6, 6) and (cosines.diagonal() == 1).all()
    assert (cosines[~np.eye(6, dtype=bool)] < 1).all()
    assert "swaps" not in found["networks"]["bare_raptor"]

    assert list(found["r2"])[0] == "constant" and "bare_raptor" in found["r2"]
    page = (out / "nulls.md").read_text()
    assert "| … centred cosine | centred cosine, k = " in page and "of 4 |" in page
    assert str(tmp_path) not in page + (out / "nulls.json").read_text()
    assert {path.stem for path in out.glob("*.png")} == {"phases", "swaps"}

    # the atlas lists it
    run(
        sys.executable, "-m", "evaluation.recurrence.atlas", "--results", f"A <small> ViT|4={out}",
        "--output_dir", tmp_path / "atlas",
    )  # fmt: skip
    page = (tmp_path / "atlas" / "README.md").read_text()
    assert "| A <small> ViT\\|4, 60 images of digits | debiased CKA | " in page
    assert (tmp_path / "atlas" / "atlas.png").exists()


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_cut_off(tmp_path):
    models, out = save_models(tmp_path / "models"), tmp_path / "out"
    command = [
        sys.executable, "-m", "evaluation.recurrence.nulls", "--teacher", models / "teacher",
        "--dataset", "digits", "--quick", "--output_dir", out,
    ]  # fmt: skip
    run(*command)
    whole = (out / "nulls.json").read_text()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    (out / "nulls.json").unlink()
    (out / "raw" / "shuffled 1.npz").unlink()
    kept = (out / "raw" / "teacher.npz").stat().st_mtime_ns
    run(*command, "--resume")
    assert (out / "nulls.json").read_text() == whole
    assert (out / "raw" / "teacher.npz").stat().st_mtime_ns == kept
