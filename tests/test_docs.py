"""README.md and docs/: every block that is marked runs, and the pages name what there is."""

import importlib.util
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification

from tests.pages import PAGES, block, blocks, read
from tests.programs import ROOT, run

PROGRAM = re.compile(
    r"(?:training|evaluation|model_cards)/\w+\.py|-m (?:evaluation|raptor_hf)[.\w]*"
)
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# every block that is marked `run NAME`: its page and name, what replaces words of it besides those
# of `stand_ins`, and a part of what it prints
CASES = [
    ("README.md", "states", {}, " (1, 13, 21, 16)\n"),
    ("README.md", "distil", {}, "its snippet runs without raptor_hf"),
    ("docs/activations.md", "plan", {"path/to/images": "digits"}, "1,437 trajectories of 13"),
    ("docs/activations.md", "verify", {"outputs/mine": "LINE"}, "is complete: 1,437 images"),
    ("docs/atlas.md", "atlas",
     {"--num_runs 0": "--quick", "outputs/digits/phases": "OUT/phases",
      "outputs/digits/atlas": "OUT/atlas"}, "OUT/atlas/README.md"),
    ("docs/clusters.md", "processes", {"torchrun": "torchrun --standalone"}, "2 processes"),
    ("docs/distil.md", "own_teacher", {"source .venv/bin/activate\n": ""}, ""),
    ("docs/dynamics.md", "phases", {}, "k=3: phases [7, 3, 2] (threshold 0.1)\n"),
    ("docs/dynamics.md", "study",
     {"outputs/digits/dynamics": "OUT/dynamics --num_images 40"}, "| raptor_k4 |"),
    ("docs/dynamics.md", "speeds", {}, "tensor(["),
    ("docs/families.md", "raptorize", {}, "CLIPModel (1, 1) [4, 2]\n"),
    ("docs/hub.md", "layers", {}, "True torch.Size([1, 16, 4, 4])\n"),
    ("docs/hub.md", "publish",
     {"outputs/digits/seed_0/classification/models/raptor_k3": "OUT/raptor_k3"}, "snippet runs"),
    ("docs/phases.md", "nulls",
     {"outputs/digits/nulls": "OUT/nulls --quick"}, "OUT/nulls/nulls.md"),
    ("docs/probes.md", "probe", {}, "OUT/mine/segmentation"),
    ("docs/probes.md", "segmenter", {}, "'ground'"),
    ("docs/quickstart.md", "curve", {}, ""),
    ("docs/quickstart.md", "turns", {}, "tensor(["),
    ("docs/study.md", "student", {}, "((1, 2, 3, 4, 5, 6, 7), (8, 9, 10), (11, 12)) False\n"),
    # export and the compiler take long
    pytest.param(
        "docs/performance.md", "fast", {}, "torch.Size([4, 10])\n", marks=pytest.mark.slow
    ),
    pytest.param(
        "docs/deploy.md", "program", {}, "torch.Size([5, 10])\n", marks=pytest.mark.slow
    ),
    pytest.param(
        "docs/deploy.md", "onnx",
        {"outputs/digits/seed_0/classification/models/raptor_k3": "OUT/raptor_k3"}, "q4f16.onnx:",
        marks=pytest.mark.slow,
    ),
]  # fmt: skip
# blocks that other tests run
ELSEWHERE = {
    ("README.md", "digits"), ("docs/quickstart.md", "line"),  # the fixture `line`
    ("docs/reference_code.md", "convert"), ("docs/reference_code.md", "ablation"),
    ("docs/deploy.md", "session"), ("docs/deploy.md", "pull"), ("docs/hub.md", "hf"),
}  # fmt: skip


@pytest.fixture
def stand_ins(line, tmp_path):
    """What is small and here, by the words of the pages: models, images, numbers, folders."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(40):
                pixels = rng.integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return {
        "outputs/digits": str(line[0]),
        "outputs/": f"{tmp_path}/",
        "path/to/images": str(tmp_path / "images"),
        "facebook/dinov2-with-registers-base": str(line[0] / "teacher"),
        "facebook/dinov2-with-registers-small": str(line[0] / "teacher"),
        "training/recipes": "tests/recipes",
        "--steps 10000": "--steps 3",
        "--num_workers 8": "--num_workers 1",
    }


@pytest.mark.parametrize(("page", "name", "changes", "expected"), CASES)
def test_blocks_of_code_run(page, name, changes, expected, stand_ins, line, tmp_path):
    code = block(page, name)
    if name in ("publish", "onnx"):  # they write beside the weights
        published = line[0] / "seed_0" / "classification" / "models" / "raptor_k3"
        shutil.copytree(published, tmp_path / "raptor_k3")
    for written, here in changes.items():
        assert written in code, written
        code = code.replace(written, here)
    for written, here in (stand_ins | {"OUT/": f"{tmp_path}/", "LINE/": f"{line[0]}/"}).items():
        code = code.replace(written, here)
    bash = block_language(page, name) == "bash"
    command = ["bash", "-c", f"set -e\n{code}"] if bash else [sys.executable, "-c", code]
    done = run(*command, new_process="compile" in code)
    assert expected.replace("OUT/", f"{tmp_path}/") in done.stdout + done.stderr
    if (page, name) == ("README.md", "distil"):
        model = AutoModelForImageClassification.from_pretrained(
            tmp_path / "mine/probe/models/raptor_k3"
        )
        assert list(model.config.id2label.values()) == ["cat", "dog"]
        assert len(model.config.phases) == 3


def block_language(page, name):
    return next(each.language for each in blocks(page) if each.name == name)


def test_every_marked_block_is_run():
    marked = {(page, each.name) for page in PAGES for each in blocks(page) if each.name}
    cases = [getattr(case, "values", case) for case in CASES]
    assert marked == {case[:2] for case in cases} | ELSEWHERE
    for page, name in {("README.md", "digits"), ("docs/quickstart.md", "line")}:
        assert block(page, name) == "bash training/reproduce.sh digits\n"


@pytest.mark.parametrize("page", PAGES)
def test_every_other_block_of_code_says_why_it_is_not_run(page):
    for each in blocks(page):
        if each.language in ("bash", "python") and not each.name:
            assert re.fullmatch(r"not run: \S.{8,}", each.mark), each


def test_flags_that_pages_name_are_there():
    """In all commands, and in tables and sentences."""
    flags, named = {}, set()
    for page in PAGES:
        named |= set(re.findall(r"`(--\w+)", FENCES.sub("", read(page))))
        code = "\n".join(each.code for each in blocks(page)).replace("\\\n", " ")
        for command in code.splitlines():
            if program := PROGRAM.search(command):
                own = re.findall(r"--\w+", command[program.end() :].split("#")[0])
                flags.setdefault(program[0], set()).update(own)
    known = {}
    for program in flags:
        printed = run(sys.executable, *program.split(), "--help").stdout
        known[program] = set(re.findall(r"--\w+", printed))
        assert flags[program] <= known[program], (program, flags[program] - known[program])
    scripts = set()
    for script in (ROOT / "training").glob("*.sh"):
        scripts |= set(re.findall(r"--\w+", script.read_text()))
    assert named <= set().union(scripts, LAUNCHERS, *known.values())


# flags of accelerate, docker and SLURM that pages name
LAUNCHERS = {
    "--mixed_precision", "--dynamo_backend", "--multi_gpu", "--nodes", "--num_processes",
    "--shm", "--signal",
}  # fmt: skip


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCES.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)]+)\)", FENCES.sub("", text)):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(str(file.relative_to(ROOT))), target
    for path in re.findall(
        r"\b(?:training|evaluation|model_cards|tests|raptor_hf)/[\w/]+\.\w+", text
    ):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert list((ROOT / "tests").rglob(f"{name}.py")), name


def test_tables_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for page in PAGES:
        assert len(render.MARKED.findall(read(page))) == read(page).count("<!-- table: ")
        assert render.render(read(page)) == read(page), "run: python docs/render.py"
