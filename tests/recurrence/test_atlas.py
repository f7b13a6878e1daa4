"""The atlas: maps of tiny random teachers on digits, the page, skipped and failing teachers."""

import json
import shutil
import sys

import numpy as np
import pytest

from evaluation.recurrence.atlas import named_teachers
from evaluation.recurrence.atlas_page import cut_in_words, cuts_table, write_page
from evaluation.recurrence.maps import MapArguments, file_name, first_cuts, load_atlas, phase_map
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.phases.distance import layer_distance
from tests.helpers import save_models
from tests.programs import ACCELERATE_LAUNCH, ROOT, TWO_PROCESSES, run

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
    assert (found["num_layers"], found["num_channels"], found["num_tokens"]) == (6, 24, 7)
    assert (found["dataset"], found["split"], found["num_images"]) == ("digits", "test", 30)
    assert found["image_size"] == [8, 8] and found["token_groups"] == {"cls": 1, "registers": 2}
    assert len(found["weights_sha256"]) == 64 and found["environment"]["transformers"]
    matrix = np.array(found["distance"])
    assert matrix.shape == (6, 6) and (matrix == matrix.T).all() and (matrix.diagonal() == 0).all()
    assert list(found["cuts"]) == ["recursive", "maxcut"]
    for k, cut in found["cuts"]["maxcut"].items():
        assert len(cut["phases"]) == int(k)
        assert sum(cut["boundaries"]) == pytest.approx(int(k) - 1)
    assert found["cuts"]["recursive"]["6"]["phases"] is None  # no group is long enough
    assert first_cuts(found)["6"]["method"] == "maxcut"
    assert len(found["speed"]["cls"]["mean"]) == 6 and len(found["norm"]["patches"]["std"]) == 7
    page = (atlas / "README.md").read_text()
    assert "| A <small> ViT/4 | maxcut |" in page and "![phase map of teacher](teacher.png)" in page


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
    changed = run(*command(folders, out), "--seed", "1", check=False)
    assert changed.returncode == 1 and "seed: made with 0, now asked for 1" in changed.stderr


def test_a_failing_teacher_stops_no_other_and_nothing_is_published(folders, tmp_path):
    out = tmp_path / "out"
    arguments = command(folders, out)
    arguments.insert(arguments.index("--teachers") + 1, f"odd={folders / 'broken'}")
    done = run(*arguments, "--push_to_hub", "me/atlas", check=False)
    assert done.returncode == 1 and "page:" in done.stdout and "dataset:" not in done.stdout
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed:")]
    assert len(failed) == 1 and "odd: " in failed[0] and "no_such_family" in failed[0]
    assert {path.name for path in out.glob("*.json")} == {"teacher.json", "a_small_vit_4.json"}


def test_the_page_is_made_again_of_what_is_there(atlas, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(atlas, out)
    (out / "teacher.json").unlink()
    (out / "notes.json").write_text("[1]")  # of somebody else
    write_page(out)
    page = (out / "README.md").read_text()
    assert "A <small> ViT/4" in page and "| teacher | recursive |" not in page
    shutil.copy(out / "a_small_vit_4.json", out / "again.json")
    with pytest.raises(ValueError, match="another phase map"):
        load_atlas(out)


def test_the_page_in_git_follows_from_its_maps(tmp_path):
    folder = ROOT / "evaluation" / "results" / "atlas"
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    page = write_page(tmp_path)
    assert page.read_text() == (folder / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_cuts_in_words():
    cut = {"phases": [7, 5], "same": 0.985}
    assert cut_in_words(cut) == "7, 5 (98 %)"
    assert cut_in_words(None) == "–" and cut_in_words({"phases": None}) == "no partition"
    table = cuts_table([{"name": "a | b", "cuts": {"maxcut": {"2": cut}}}])
    assert table.splitlines()[-1] == "| a \\| b | maxcut | 7, 5 (98 %) |"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teachers", "{teacher}"], "--dataset"),
        (["--teachers", "{teacher}", "{teacher}", *FEW], "the name 'teacher'"),
    ],
)
def test_wrong_arguments(folders, tmp_path, flags, words):
    flags = [flag.format(teacher=folders / "teacher") for flag in flags]
    done = run(sys.executable, *PROGRAM, *flags, "--output_dir", tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr


def test_it_runs_on_one_process(tmp_path):
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
    options = MapArguments(num_images=10, resamples=5, k=[2, 9])
    found = phase_map(source, options, batch_size=3)
    states = source.states(images.__getitems__(list(range(10))))
    expected = layer_distance([states], source.layout)
    np.testing.assert_allclose(found["distance"], expected, atol=1e-6)
    assert list(found["cuts"]["maxcut"]) == ["2"]  # six layers have no nine phases
