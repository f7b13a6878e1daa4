"""The program: maps of tiny random teachers on digits, what is skipped, what fails."""

import json
import shutil
import sys

import numpy as np
import pytest

from evaluation.recurrence.atlas_arguments import AtlasArguments
from evaluation.recurrence.maps import file_name, named_teachers, phase_map
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.distillation.objective import state_variances
from raptor_hf.phases.distance import layer_distance
from tests.helpers import save_models
from tests.programs import ACCELERATE_LAUNCH, TWO_PROCESSES, run

PROGRAM = ("-m", "evaluation.recurrence.atlas")
FEW = ["--dataset", "digits", "--split", "test", "--num_images", "30", "--resamples", "20"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and a Raptor of six layers for images of 8 pixels, random; and no model at all."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "no_such_family"}')
    return folder


def command(folders, out, *more):
    two = [folders / "teacher", f"A <small> ViT/4={folders / 'bare_raptor'}"]
    return [sys.executable, *PROGRAM, "--teachers", *two, *more, *FEW, "--output_dir", out]


@pytest.fixture(scope="module")
def atlas(folders, tmp_path_factory):
    """The folder that the program wrote, and what it printed."""
    out = tmp_path_factory.mktemp("atlas") / "out"
    done = run(*ACCELERATE_LAUNCH, *command(folders, out)[1:])
    return out, done.stdout


def test_a_map_holds_what_the_page_needs(atlas, folders):
    out, printed = atlas
    assert f"page:    {out / 'atlas.html'}" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "a_small_vit_4.json", "atlas.html", "runs", "teacher.json",
    ]  # fmt: skip
    text = (out / "teacher.json").read_text()
    assert str(folders) not in text and str(out) not in text
    found = json.loads(text)
    assert (found["name"], found["model_type"]) == ("teacher", "dinov2_with_registers")
    assert (found["num_layers"], found["num_channels"], found["num_tokens"]) == (6, 24, 7)
    assert (found["dataset"], found["split"], found["num_images"]) == ("digits", "test", 30)
    assert found["image_size"] == [8, 8] and found["token_groups"] == {"cls": 1, "registers": 2}
    assert len(found["weights_sha256"]) == 64 and found["environment"]["transformers"]
    matrix = np.array(found["distance"])
    assert matrix.shape == (6, 6) and (matrix == matrix.T).all() and (matrix.diagonal() == 0).all()
    assert list(found["cuts"]) == ["recursive", "maxcut"]
    assert list(found["cuts"]["maxcut"]) == ["2", "3", "4", "5", "6"]
    for k, cut in found["cuts"]["maxcut"].items():
        assert len(cut["phases"]) == int(k) and cut["resamples"] == 20
        assert 0 <= cut["same"] <= 1 and len(cut["boundaries"]) == 5
        assert sum(cut["boundaries"]) == pytest.approx(int(k) - 1)
        assert 0 < cut["quality"]["cut_share"] <= 1
    assert found["cuts"]["recursive"]["6"]["phases"] is None  # no group is long enough
    assert set(found["speed"]) == {"cls", "registers", "patches"}
    assert len(found["speed"]["cls"]["mean"]) == 6 and len(found["norm"]["patches"]["std"]) == 7
    assert set(found["update_rank"]) == {"stable", "effective"}
    assert len(found["variance"]["registers"]) == 7


def test_a_finished_teacher_is_skipped_and_a_new_one_made(atlas, folders, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(atlas[0], out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    done = run(*command(folders, out, f"third={folders / 'teacher'}", "--resume"))
    assert done.stdout.count("finished already, nothing to do") == 2
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    third, first = (json.loads((out / f"{n}.json").read_text()) for n in ("third", "teacher"))
    assert {**third, "name": "teacher"} == first  # equal to the last digit: all is seeded
    assert "third" in (out / "atlas.html").read_text()

    (out / "third.json").unlink()  # what is lost is made again
    run(*command(folders, out, f"third={folders / 'teacher'}"))
    assert json.loads((out / "third.json").read_text()) == third
    changed = run(*command(folders, out), "--seed", "1", check=False)
    assert changed.returncode == 1 and "seed: made with 0, now asked for 1" in changed.stderr


def test_a_teacher_that_fails_is_said_at_the_end(folders, tmp_path):
    out = tmp_path / "out"
    arguments = command(folders, out)
    arguments.insert(arguments.index("--teachers") + 1, f"odd={folders / 'broken'}")
    done = run(*arguments, "--push_to_hub", "me/atlas", check=False)
    assert done.returncode == 1 and "page:" in done.stdout
    last = done.stderr.strip().splitlines()
    assert [line for line in last if line.startswith("failed:")][0].startswith("failed:  odd: ")
    assert "no_such_family" in done.stderr and "Nothing was published" in done.stderr
    assert {path.name for path in out.glob("*.json")} == {"teacher.json", "a_small_vit_4.json"}


def test_the_page_is_made_again_of_what_is_there(atlas, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(atlas[0], out)
    (out / "teacher.json").unlink()
    (out / "notes.json").write_text("[1]")  # of somebody else
    run(sys.executable, *PROGRAM, "--output_dir", out)
    html = (out / "atlas.html").read_text()
    assert "A &lt;small&gt; ViT/4" in html and 'id="teacher_teacher"' not in html


def test_bad_input_is_said_in_words(folders, tmp_path):
    teacher = folders / "teacher"
    cases = {
        "are looked at on images: give --dataset": ["--teachers", teacher],
        "takes recursive, maxcut, ncut; got uniform": ["--teachers", teacher, "--methods",
                                                        "uniform", "--dataset", "digits"],
        "the name 'teacher' is that of another model": ["--teachers", teacher, teacher, *FEW],
        "there is no folder '=": ["--teachers", f"???={teacher}", *FEW],
    }  # fmt: skip
    for message, arguments in cases.items():
        done = run(sys.executable, *PROGRAM, *arguments, "--output_dir", tmp_path, check=False)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    done = run(
        *TWO_PROCESSES, *PROGRAM, "--output_dir", tmp_path, check=False, ACCELERATE_USE_CPU="true"
    )
    assert "works on one process; 2 were started" in done.stderr


def test_names_become_files():
    assert file_name("DINOv2 ViT-S/14, as shipped 0.1.1") == "dinov2_vit_s_14_as_shipped_0_1_1"
    (one, other) = named_teachers(["facebook/dinov2-small", "Größe S/14=some/model"])
    assert one == ("facebook_dinov2_small", "facebook/dinov2-small", "facebook/dinov2-small")
    assert other == ("größe_s_14", "Größe S/14", "some/model")


def test_figures_are_those_of_the_library(teacher, images):
    source = OnlineActivations(teacher, images)
    found = phase_map(source, AtlasArguments(num_images=10, resamples=5, k=[2, 9], batch_size=3))
    states = source.states(images.__getitems__(list(range(10))))
    expected = layer_distance([states], source.layout)
    np.testing.assert_allclose(found["distance"], expected, atol=1e-6)
    assert list(found["cuts"]["maxcut"]) == ["2"]  # nine phases of six layers there are none
    for group, variances in state_variances(source).items():
        if group != "all":
            np.testing.assert_allclose(found["variance"][group], variances, rtol=1e-5, atol=1e-9)
