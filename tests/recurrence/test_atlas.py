"""The atlas: maps of tiny random teachers on digits, the page, finished teachers."""

import json
import shutil
import sys

import numpy as np
import pytest

from evaluation.recurrence.atlas import load_atlas, phase_map, write_page
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.phases.distance import layer_distance
from tests.helpers import save_models
from tests.programs import ACCELERATE_LAUNCH, ROOT, run

PROGRAM = ("-m", "evaluation.recurrence.atlas")
FEW = ["--dataset", "digits", "--split", "test", "--num_images", "30"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and a Raptor of six layers for images of 8 pixels, random."""
    return save_models(tmp_path_factory.mktemp("models"))


def command(folders, out, *more):
    two = [folders / "teacher", f"A <small> ViT|4={folders / 'bare_raptor'}"]
    return [sys.executable, *PROGRAM, "--teachers", *two, *more, *FEW, "--output_dir", out]


@pytest.fixture(scope="module")
def atlas(folders, tmp_path_factory):
    """The folder that the program wrote."""
    out = tmp_path_factory.mktemp("atlas") / "out"
    run(*ACCELERATE_LAUNCH, *command(folders, out)[1:])
    return out


def test_a_map_holds_what_the_page_needs(atlas, folders):
    assert sorted(path.name for path in atlas.iterdir()) == [
        "README.md", "a_small_vit_4.json", "a_small_vit_4.png", "runs", "teacher.json",
        "teacher.png",
    ]  # fmt: skip
    text = (atlas / "teacher.json").read_text()
    assert str(folders) not in text and str(atlas) not in text
    found = json.loads(text)
    assert (found["name"], found["model_type"]) == ("teacher", "dinov2_with_registers")
    assert (found["num_layers"], found["image_size"], found["num_images"]) == (6, [8, 8], 30)
    assert list(found["cuts"]) == ["recursive", "maxcut"]
    for k, cut in found["cuts"]["maxcut"].items():
        assert len(cut["phases"]) == int(k)
        assert sum(cut["boundaries"]) == pytest.approx(int(k) - 1)
    assert found["cuts"]["recursive"]["6"]["phases"] is None  # no group is long enough
    page = (atlas / "README.md").read_text()
    assert "| A <small> ViT\\|4 | maxcut |" in page
    assert "![phase map of teacher](teacher.png)" in page


def test_a_finished_teacher_is_skipped_and_a_new_one_made(atlas, folders, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(atlas, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    done = run(*command(folders, out, f"third={folders / 'teacher'}", "--resume"))
    assert done.stdout.count("finished already, nothing to do") == 2
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    third, first = (json.loads((out / f"{n}.json").read_text()) for n in ("third", "teacher"))
    assert {**third, "name": "teacher"} == first  # equal to the last digit: all is seeded
    (out / "third.json").unlink()  # a lost map is made again
    run(*command(folders, out, f"third={folders / 'teacher'}"))
    assert json.loads((out / "third.json").read_text()) == third
    changed = run(*command(folders, out), "--num_images", "20", check=False)
    assert changed.returncode == 2 and "made with 30, now asked for 20" in changed.stderr


def test_the_page_in_git_follows_from_its_maps(tmp_path):
    folder = ROOT / "evaluation" / "results" / "atlas"
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    page = write_page(tmp_path)
    assert page.read_text() == (folder / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    (tmp_path / "notes.json").write_text("[1]")  # of somebody else
    assert len(load_atlas(tmp_path)) == 2


def test_figures_are_those_of_the_library(teacher, images):
    source = OnlineActivations(teacher, images)
    found = phase_map(source, num_images=10)
    states = source.states(images.__getitems__(list(range(10))))
    expected = layer_distance([states], source.layout)
    np.testing.assert_allclose(found["distance"], expected, atol=1e-6)
