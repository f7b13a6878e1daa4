"""README.md and docs/: every block that is marked runs, and what the pages say is there."""

import ast
import importlib.util
import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification

from tests.pages import PAGES, Block, block, blocks, read, replaced
from tests.programs import ROOT, run

PROGRAM = re.compile(r"(?:training|evaluation|model_cards)/\w+\.py")
# words of ours that nobody looks for; the field's are: evaluate, selected, knn, depth mode
RIDDLES = {"judge", "judged", "judges", "voters", "told", "advice", "unmet"}
MOST_WORDS, MOST_NUMBERS = 40, 10  # in a sentence


def bash(code, changes=()):
    """A block's commands, stopped by the first that fails: what they printed."""
    return run("bash", "-c", "set -e\n" + replaced(code, dict(changes))).stdout


def python(code, changes=()):
    """What a block of Python prints."""
    return run(sys.executable, "-c", replaced(code, dict(changes))).stdout


@pytest.fixture
def digits(line):
    """The digits models stand for those of the command: what to replace in a block."""
    return {"outputs/digits": line[0]}


@pytest.fixture
def image_folder(tmp_path):
    """Eighty random images of two classes, as people have them on the disk."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(40):
                pixels = rng.integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


# the blocks, by page


def test_readme_states(digits):
    printed = python(block("README.md", "states"), digits)
    assert printed.endswith(" (1, 13, 18, 16)\n") and printed.startswith("[")


def test_families_raptorize(tmp_path):
    printed = python(block("docs/families.md", "raptorize"), {"outputs/": f"{tmp_path}/"})
    assert printed == "CLIPModel (1, 1) [4, 2]\n"


def test_readme_distil(line, image_folder, tmp_path):
    changes = {
        "facebook/dinov2-with-registers-base": line[0] / "teacher",
        "path/to/images": image_folder,
        "outputs/mine": tmp_path / "mine",
        "--num_workers 8": "--num_workers 1",
        "--steps 10000": "--steps 3",
    }
    printed = bash(block("README.md", "distil"), changes)
    assert "k=3: phases [" in printed
    assert "its snippet runs without raptor_hf" in printed
    folder = tmp_path / "mine" / "probe" / "models" / "raptor_k3"
    assert "NAME/" in (folder / "README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["cat", "dog"]
    assert len(model.config.phases) == 3


@pytest.mark.parametrize(
    "text", [block("README.md", "digits"), block("docs/quickstart.md", "line")]
)
def test_the_digits_command(line, text):
    assert text == "bash training/reproduce.sh digits\n"  # which the fixture ran
    assert "== report and model cards" in line[1]


def test_quickstart_stages_are_those_of_the_script():
    titles = re.findall(r'^ *stage "(.*?)"$', (ROOT / "training/reproduce.sh").read_text(), re.M)
    table = read("docs/quickstart.md").split("## What each stage does")[1].split("\n\n")[2]
    assert len(table.splitlines()) - 2 == len(titles) == 9


def test_quickstart_turns(digits):
    printed = python(block("docs/quickstart.md", "turns"), digits)
    assert printed.startswith("[") and "tensor([" in printed


def test_distil_own_teacher(line, image_folder, tmp_path):
    changes = {
        "source .venv/bin/activate\n": "",
        "facebook/dinov2-with-registers-small": line[0] / "teacher",
        "path/to/images": image_folder,
        "outputs/mine": tmp_path / "mine",
        "--steps 10000": "--steps 3",
    }
    bash(block("docs/distil.md", "own_teacher"), changes)
    assert len(AutoModel.from_pretrained(tmp_path / "mine" / "raptor_k3").config.phases) == 3


def test_activations_plan(line, tmp_path):
    changes = {
        "facebook/dinov2-with-registers-small": line[0] / "teacher",
        "path/to/images": "digits",
        "outputs/mine": tmp_path,
    }
    printed = bash(block("docs/activations.md", "plan"), changes)
    assert "16 epochs of the layers 0 to 12" in printed and "  advice       stored: " in printed
    assert not list(tmp_path.iterdir())


def test_activations_verify(line):
    store = line[0] / "activations"
    changes = {"outputs/mine/activations": store}
    printed = bash(block("docs/activations.md", "verify"), changes)
    assert f"{store} is whole: 1,437 images" in printed


def test_clusters_processes(tmp_path):
    changes = {
        "torchrun": "torchrun --standalone",
        "training/recipes": "tests/recipes",
        "outputs": tmp_path,
    }
    script = replaced(block("docs/clusters.md", "processes"), changes)
    done = run("bash", "-c", f"set -e\n{script}")
    assert "1 process on cpu" in done.stderr and "2 processes on cpu" in done.stderr
    assert "32 images a step: 2 processes × 16 images" in done.stdout
    for number in ("one", "two"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / number / "teacher")
        assert model.config.num_labels == 10


def test_probes_probe(digits, tmp_path):
    changes = {
        "training/recipes": "tests/recipes",
        "outputs/mine": tmp_path,
    }
    bash(block("docs/probes.md", "probe"), {**changes, **digits})
    result = json.loads((tmp_path / "segmentation/results/raptor_k3_segmentation.json").read_text())
    assert 0 < result["metrics"]["miou"] < 1
    assert (tmp_path / "segmentation" / "models" / "raptor_k3" / "config.json").exists()


def test_probes_scenes(tmp_path):
    changes = {"scenes.png": tmp_path / "scenes.png"}
    bash(block("docs/probes.md", "scenes"), changes)
    assert Image.open(tmp_path / "scenes.png").width > 100


def test_probes_segmenter(digits):
    assert "'ground'" in python(block("docs/probes.md", "segmenter"), digits)


def test_atlas_of_a_teacher_and_its_raptor(digits, tmp_path):
    changes = {
        "outputs/digits/atlas": f"{tmp_path}/atlas --num_images 40 --resamples 20",
        **digits,
    }
    printed = bash(block("docs/atlas.md", "atlas"), changes)
    assert f"page:    {tmp_path}/atlas/atlas.html" in printed
    maps = {path.stem for path in (tmp_path / "atlas").glob("*.json")}
    assert maps == {"teacher", "raptor_of_3"}


def test_atlas_gaps(digits, tmp_path):
    changes = {
        "outputs/digits/atlas_gaps": f"{tmp_path}/atlas",
        **digits,
        "--num_images 100": "--num_images 20 --resamples 5",
        "--gap_units 2": "--gap_units 0.1",
    }
    bash(block("docs/atlas.md", "atlas_gaps"), changes)
    gaps = json.loads((tmp_path / "atlas" / "teacher.json").read_text())["gaps"]
    assert [(gap["k"], sum(gap["phases"])) for gap in gaps] == [(1, 12), (3, 12)]
    assert all(gap["units"] == 0.1 and "cls" in gap["to_spread"] for gap in gaps)


def test_study_student():
    printed = python(block("docs/study.md", "student"))
    assert printed == "((1, 2, 3, 4, 5, 6, 7), (8, 9, 10), (11, 12)) False 12\n"


def test_atlas_agreement():
    assert python(block("docs/atlas.md", "agreement")) == "0.5 1.0\n"


def test_dynamics_phases(tmp_path):
    changes = {"outputs": tmp_path}
    printed = bash(block("docs/dynamics.md", "phases"), changes)
    (said,) = (b.code for b in blocks("docs/dynamics.md") if b.code.startswith("k=2"))
    assert said in printed and said == (
        "k=2: phases [7, 5] (threshold 0.2)\n"
        "k=3: phases [7, 3, 2] (threshold 0.1)\n"
        "k=4: phases [4, 3, 3, 2] (threshold 0.09)\n"
    )
    assert "| ncut | 3 | [7, 3, 2] |" in printed


def test_dynamics_study_and_its_table_is_what_was_seen(line, tmp_path):
    changes = {
        "outputs/digits/dynamics": f"{tmp_path}/dynamics --num_images 40 --swap_draws 2",
        "outputs/digits": line[0],
    }
    printed = bash(block("docs/dynamics.md", "study"), changes)
    assert "| claim | source | teacher | raptor_k2 | raptor_k3 | raptor_k4 |" in printed
    study = json.loads((line[0] / "seed_0" / "dynamics" / "dynamics.json").read_text())
    assert study["num_images"] == 40 and len(study["models"]) == 4
    seen = ROOT / "evaluation" / "results" / "digits" / "dynamics" / "what_we_see.md"
    assert seen.read_text().split("\n\n")[1] in read("docs/dynamics.md")


def test_dynamics_speeds(digits):
    assert python(block("docs/dynamics.md", "speeds"), digits).startswith("tensor([")


@pytest.mark.slow
def test_hub_export(digits, tmp_path):
    changes = {'"raptor.onnx"': repr(str(tmp_path / "raptor.onnx")), **digits}
    printed = python(block("docs/hub.md", "export"), changes)
    error, states = printed.splitlines()[-1].split(", grad_fn")[0].split()
    assert float(error.strip("tensor()")) < 1e-3 and states == "13"


def test_hub_publish(line, digits, tmp_path):
    model = line[0] / "seed_0" / "classification" / "models" / "raptor_k3"
    copy = tmp_path / "raptor_k3"  # its card is another one
    shutil.copytree(model, copy)
    changes = {"outputs/digits/seed_0/classification/models/raptor_k3": str(copy), **digits}
    printed = bash(block("docs/hub.md", "publish"), changes)
    assert "its snippet runs without raptor_hf" in printed and "whole:" in printed
    card = (copy / "README.md").read_text()
    assert "# NAME/raptor_k3" in card and str(line[0]) not in card


def test_performance_fast(digits):
    printed = python(block("docs/performance.md", "fast"), digits)
    assert printed.splitlines()[-1] == "torch.Size([4, 10])"


# what holds for all pages


def claimed():
    """Yield (page, name) of every block that a test asks for, as often as tests do."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("block"):
                arguments = tuple(getattr(argument, "value", None) for argument in node.args)
                if arguments[:1] and arguments[0] in PAGES:
                    yield arguments


def test_every_block_that_is_marked_is_run_by_one_test():
    marked = [(page, b.name) for page in PAGES for b in blocks(page) if b.name]
    assert len(marked) >= 18
    assert Counter(marked) == Counter(claimed())


@pytest.mark.parametrize("page", PAGES)
def test_every_other_block_of_code_says_why_it_is_not_run(page):
    for each in blocks(page):
        if each.language in ("bash", "python") and not each.name:
            assert re.fullmatch(r"not run: \S.{8,}", each.mark), each
        if each.language not in ("bash", "python"):
            assert each.language in ("", "mermaid"), each.language
            assert not PROGRAM.search(each.code), "a command stands in a block marked bash"


def test_a_block_without_a_mark_has_no_name():
    assert Block("bash", "run it", "").name == "it"
    assert Block("bash", "not run: needs a GPU", "").name is None


def test_commands_that_are_not_run_name_arguments_that_there_are():
    flags = {}
    for page in PAGES:
        for each in blocks(page):
            for command in each.code.replace("\\\n", " ").splitlines() if not each.name else []:
                program = PROGRAM.search(command)
                if program:
                    own = command[program.end() :].split("#")[0]
                    flags.setdefault(program[0], set()).update(re.findall(r"--\w+", own))
    assert len(flags) >= 5
    for program, names in flags.items():
        known = set(re.findall(r"--\w+", run(sys.executable, program, "--help").stdout))
        assert names <= known, f"{program} has no {names - known}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    lines = read(page).splitlines()
    assert len(lines) <= 150
    wide = [line for line in lines if len(line) > 120 and not line.startswith("|")]
    assert not wide


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCES.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", FENCES.sub("", read(page)))
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), target


@pytest.mark.parametrize("page", PAGES)
def test_programs_tests_and_recipes_that_are_named_are_there(page):
    text = read(page)
    for path in re.findall(
        r"\b(?:training|evaluation|model_cards|tests|raptor_hf)/[\w/]+\.\w+", text
    ):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert list((ROOT / "tests").rglob(f"{name}.py")), name
    for name in re.findall(
        r"`((?:imagenet|ade20k|nyuv2|digits)_\w+(?:probe|blocks|raptor\w*))`", text
    ):
        assert (ROOT / "training" / "recipes" / f"{name}.yaml").exists(), name


def sentences(page):
    """The sentences of a page's prose, without code, tables and headings."""
    text = re.sub(r"<!-- table.*?/table -->", "", FENCES.sub("", read(page)), flags=re.DOTALL)
    text = re.sub(r"^(\||#|!\[|    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^(\d+\.|-) ", "\n", text, flags=re.MULTILINE))
    for paragraph in text.split("\n\n"):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short_and_plain(page):
    for sentence in sentences(page):
        plain = re.sub(r"`[^`]*`", "code", sentence)
        assert len(plain.split()) <= MOST_WORDS, plain
        assert len(re.findall(r"\d[\d.,]*", plain)) <= MOST_NUMBERS, plain
        assert not RIDDLES & set(re.findall(r"\w+", plain.lower())), plain


def test_tables_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for page in PAGES:
        assert len(render.MARKED.findall(read(page))) == read(page).count("<!-- table: ")
        assert render.render(read(page)) == read(page), "run: python docs/render.py"
