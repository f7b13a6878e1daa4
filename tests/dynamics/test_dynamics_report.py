"""The program and its report: one file that is opened from the disk, in a browser."""

import json
import shutil
import sys

import pytest
import torch
from playwright.sync_api import expect, sync_playwright

from evaluation.dynamics.report import patch_grid, token_names, walk_rows, walk_through
from raptor_hf.data import ReadingArguments, make_processor
from raptor_hf.dynamics.systems import load_inputs
from tests.helpers import LAYOUT, save_models
from tests.programs import ACCELERATE_LAUNCH, TWO_PROCESSES, run

CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=60_000)  # milliseconds: the machine may be busy
PROGRAM = ("-m", "evaluation.dynamics")
FEW = ["--swap_draws", "2", "--extra_applications", "2", "--random_partitions", "5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and a Raptor of six layers for images of 8 pixels, random."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    """The folder that the program wrote, as a user starts it, and what it printed."""
    out = tmp_path_factory.mktemp("report") / "dynamics"
    done = run(
        *ACCELERATE_LAUNCH, *PROGRAM, "--model", folders / "teacher", f"k2={folders / 'raptor'}",
        "--data", "digits", "--num_images", "40", "--walk_images", "3", "--output_dir", out,
        "--teacher_head", folders / "head.safetensors", *FEW,
    )  # fmt: skip
    return out, done.stdout


def test_the_program_writes_every_figure(report):
    out, printed = report
    study = json.loads((out / "dynamics.json").read_text())
    assert (study["data"], study["split"], study["num_images"]) == ("digits", "test", 40)
    assert [result["model"] for result in study["models"]] == ["teacher", "k2"]
    teacher, raptor = study["models"]
    assert teacher["partitions"] == [[4, 2]]  # the Raptor's
    assert len(teacher["layer_swap"]["4-2"]["same_phase"]["1"]["accuracy"]["mean"]) == 2
    assert len(raptor["more_time"]["held"]["accuracy"]["mean"]) == 3
    assert study["environment"]["transformers"]
    assert "| claim | of | teacher | k2 |" in printed
    assert f"report:  {out / 'dynamics.html'}" in printed
    assert "seen" in (out / "what_we_see.md").read_text()
    assert len(list(out.glob("*.png"))) == 9
    assert not list(out.glob("tmp*"))


def test_a_finished_study_is_left_alone_and_another_one_refused(report, folders):
    out, _ = report
    command = [
        sys.executable, *PROGRAM, "--model", folders / "teacher", f"k2={folders / 'raptor'}",
        "--data", "digits", "--num_images", "40", "--walk_images", "3", "--output_dir", out,
        "--teacher_head", folders / "head.safetensors", *FEW,
    ]  # fmt: skip
    before = (out / "dynamics.json").stat()
    assert "finished already" in run(*command, "--resume").stdout
    assert (out / "dynamics.json").stat() == before
    refused = run(*command, "--seed", "1", check=False)
    assert refused.returncode == 1 and "seed: made with 0, now asked for 1" in refused.stderr


def test_bad_input_is_said_in_words(folders, tmp_path):
    raptor, teacher = folders / "raptor", folders / "teacher"
    cases = {
        "Give --model, or an activation dataset": [],
        "--epsilons must be a number > 0; got 0.0": ["--model", teacher, "--epsilons", "0"],
        "got 5 images of 10 classes": ["--model", teacher, "--num_images", "5"],
        "the name 'raptor' is that of another model": ["--model", raptor, raptor],
        "sum to 6; got [3, 2]": ["--model", teacher, "--phases_file", tmp_path / "phases.json"],
    }
    (tmp_path / "phases.json").write_text(json.dumps({"phases": {"2": [3, 2]}}))
    for message, arguments in cases.items():
        done = run(
            sys.executable, *PROGRAM, *arguments, "--data", "digits", "--output_dir",
            tmp_path / "out", check=False,
        )  # fmt: skip
        assert done.returncode == 1 and message in done.stderr, done.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done = run(
        *TWO_PROCESSES, *PROGRAM, "--model", teacher, "--data", "digits", "--output_dir",
        tmp_path / "out", check=False, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert "works on one process; 2 were started" in done.stderr


def test_stored_states_need_no_model(store, tmp_path):
    done = run(
        sys.executable, *PROGRAM, "--data", store, "--output_dir", tmp_path / "out", *FEW,
        "--analyses", "class_basins",
    )  # fmt: skip
    assert "dynamics.html" in done.stdout
    study = json.loads((tmp_path / "out" / "dynamics.json").read_text())
    assert study["num_images"] == 5 and len(study["models"]) == 1
    html = (tmp_path / "out" / "dynamics.html").read_text()
    assert '"picture":null' in html and "Dinov2" not in html


def test_models_that_are_not_of_one_kind_are_refused(folders, plain_teacher, store, tmp_path):
    plain_teacher.save_pretrained(tmp_path / "plain")
    make_processor(8).save_pretrained(tmp_path / "plain")
    pair = [str(folders / "teacher"), str(tmp_path / "plain")]
    message = r"'teacher': \(6, 24, 1, 2\), 'plain': \(6, 24, 1, 0\)"
    with pytest.raises(ValueError, match=message):
        load_inputs(pair, "digits", split="test")
    with pytest.raises(ValueError, match="holds states, not images: leave out --model"):
        load_inputs(pair, str(store), split="test")


def test_a_study_at_another_resolution(folders, store):
    reading = ReadingArguments(resolution=[12])
    inputs = load_inputs([str(folders / "teacher")], "digits", split="test", reading=reading)
    assert inputs.images.__getitems__([0])["pixel_values"].shape == (1, 3, 12, 12)
    with pytest.raises(ValueError, match="holds states, not images: leave out .*--resolution"):
        load_inputs([], str(store), split="test", reading=reading)


def test_tokens_have_names():
    assert token_names(LAYOUT, (1, 2)) == [
        "cls", "register 1", "register 2", "patch, row 1, column 1", "patch, row 1, column 2",
    ]  # fmt: skip


def test_the_walk_holds_the_states_of_all_models(folders):
    inputs = load_inputs(
        [f"a={folders / 'teacher'}", f"b={folders / 'raptor'}"], "digits", split="test"
    )
    rows = walk_rows(inputs.images, 12)
    labels = inputs.images.labels[rows].tolist()
    assert labels == [*range(10), 0, 1] and len(set(rows)) == 12
    walk = walk_through(inputs, rows[:2])
    assert walk["models"] == ["a", "b"] and walk["spans"] == [[], [(0, 4), (4, 6)]]
    image = walk["images"][1]
    assert image["name"].endswith("class 1")
    states = [s.trajectory(inputs.images.__getitems__(rows[1:2]))[0] for s in inputs.systems]
    cosines = torch.nn.functional.cosine_similarity(*states, dim=-1)
    torch.testing.assert_close(torch.tensor(image["cosines"][1]), cosines.T)
    torch.testing.assert_close(torch.tensor(image["norms"][1]), states[1].norm(dim=-1).T)
    assert torch.tensor(image["turns"][0]).shape == (7, 6)
    assert [len(maps) for maps in image["maps"]] == [7, 7]
    assert patch_grid(inputs.systems[0], {}, 3 + 12) == (3, 4)  # of stored states


@pytest.fixture
def page(report):
    """The report in a browser, with all that it asked for and complained about."""
    if CHROMIUM is None:
        pytest.skip("needs chromium, which is not installed")
    address = (report[0] / "dynamics.html").as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.errors, page.addresses = [], []
        page.on("request", lambda request: page.addresses.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text))
        page.goto(address)
        yield page
        browser.close()
    assert [a for a in page.addresses if not a.startswith("data:")] == [address]
    assert page.errors == []


def sources(page, part):
    return page.locator(f"#{part} img").evaluate_all("images => images.map(image => image.src)")


def curves(page):
    return page.locator("#curves path").evaluate_all("paths => paths.map(p => p.getAttribute('d'))")


def test_another_image_changes_the_pictures_and_the_curves(page):
    before = {
        "maps": sources(page, "maps"),
        "strip": sources(page, "strip"),
        "curves": curves(page),
    }
    assert [len(found) for found in before.values()] == [3, 14, 6]
    page.locator("#image").select_option("2")
    after = {"maps": sources(page, "maps"), "strip": sources(page, "strip"), "curves": curves(page)}
    for part, old in before.items():
        assert len(after[part]) == len(old)
    assert not set(after["maps"]) & set(before["maps"])
    assert not set(after["strip"]) & set(before["strip"])
    assert sum(a != b for a, b in zip(after["curves"], before["curves"], strict=True)) >= 5
    expect(page.locator("#status")).to_contain_text("class 2, cls, layer 3")
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("img").evaluate_all(loaded)


def test_token_and_layer_are_chosen_by_keyboard(page):
    first, shown = curves(page), sources(page, "maps")
    page.locator("#token").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#status")).to_contain_text("register 1, layer 3")
    assert curves(page) != first
    assert page.locator(".mark").count() == 0  # no patch is chosen
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#status")).to_contain_text("layer 4: turned by teacher")
    now = sources(page, "maps")
    assert now[0] == shown[0] and now[1:] != shown[1:]
    expect(page.locator("#maps figcaption").nth(2)).to_have_text("k2, layer 4 (block 0)")
    assert page.locator("#strip td.now").count() == 2
    page.keyboard.press("Home")
    expect(page.locator("#status")).to_contain_text("layer 0: the embeddings")


def test_a_click_on_a_map_chooses_its_patch(page):
    shown = page.locator("#maps .map").nth(1)
    box = shown.bounding_box()
    shown.click(position={"x": 0.75 * box["width"], "y": 0.25 * box["height"]})
    expect(page.locator("#status")).to_contain_text("patch, row 1, column 2")
    assert page.locator("#token").input_value() == "4"
    assert page.locator(".mark").count() == 2


def test_a_screen_reader_finds_words_for_everything(page):
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator("html").get_attribute("lang") == "en"
    for name in ("Image", "Token", "Layer"):
        expect(page.get_by_label(name, exact=False).first).to_be_visible()
    labels = page.locator("#curves svg").evaluate_all(
        "s => s.map(x => x.getAttribute('aria-label'))"
    )
    assert labels[0].startswith("Turn of each layer (degrees): teacher ")
    page.get_by_text("The curves as numbers").click()
    cells = page.locator("#numbers tbody tr").nth(3).locator("td").all_inner_texts()
    assert len([float(cell) for cell in cells]) == 6
    expect(page.locator("#status")).to_have_attribute("aria-live", "polite")
