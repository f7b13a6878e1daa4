"""Every program, run as a user runs it: the whole line, kills in mid-stage, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

import raptor_hf  # noqa: F401
from raptor_hf.distillation.blocks import make_span, save_blocks
from raptor_hf.hub.model_card import run_snippet
from raptor_hf.teachers import load_backbone
from tests.pages import block
from tests.programs import ENVIRONMENT, ROOT, run


def flags(out, stage):
    """The command of a stage of the pipeline, without its output folder."""
    recipe = ROOT / "tests" / "recipes"
    source = ["--teacher", out / "teacher", "--seed", "0", "--activations", out / "activations"]
    source += ["--phases_file", out / "phases" / "phases.json"]
    return {
        "activations": ["training/extract_activations.py", recipe / "digits_activations.yaml",
                        "--teacher", out / "teacher"],
        "seed_0/raptor_k3": ["training/distill_raptor.py", recipe / "digits_raptor.yaml", *source,
                             "--k", "3"],
    }[stage]  # fmt: skip


def test_the_line_ends_in_a_table_and_paths_that_exist(line):
    out, printed = line
    assert "| teacher | – |" in printed
    for k in (2, 3, 4):
        assert f"| raptor_k{k} | [" in printed
        model = out / "seed_0" / "classification" / "models" / f"raptor_k{k}"
        assert f"model:   {model}" in printed
        assert len(AutoModel.from_pretrained(model).config.phases) == k
        assert (model / "preprocessor_config.json").exists()
    assert "| accuracy (%) | of the teacher's (%) | mIoU (%) | depth RMSE (m) |" in printed
    assert "| constant | – | 9.7 |" in printed  # of ten digits one is as frequent as the others
    report = (out / "report" / "report.md").read_text()
    assert "| teacher | mIoU (%) |" in report and "| raptor_k4 | depth RMSE (m) |" in report
    names = ["segmentation.png", "depth.png"]
    for name in ("report.md", *names, "against_k.png", "r2_per_layer.png", "layer_distance.png"):
        assert (out / "report" / name).stat().st_size > 500
    assert "start | R², all tokens" in (out / "report" / "report.md").read_text()
    assert not list(out.rglob("checkpoints"))


def test_results_say_where_they_come_from(line):
    results = line[0] / "seed_0" / "classification" / "results"
    result = json.loads((results / "raptor_k3_r2.json").read_text())
    assert len(result["metrics"]["layers"]["cls"]) == 12
    assert result["environment"]["transformers"]
    assert (result["seed"], result["num_images"]) == (0, 360)
    stages = result["training"]["stages"]
    assert [stage["program"] for stage in stages] == ["distill_raptor"]
    assert all(stage["seconds"] > 0 for stage in stages)
    assert result["training"]["teacher"]["name"] == "teacher"


def test_the_saved_classifier_scores_what_the_result_says(line):
    from raptor_hf.data import ImageViews, load_images
    from raptor_hf.teachers import load_processor

    folder = line[0] / "seed_0" / "classification"
    model_dir = folder / "models" / "raptor_k3"
    model = AutoModelForImageClassification.from_pretrained(model_dir)
    batch = ImageViews(load_images("digits", "test"), load_processor(model_dir)).__getitems__(
        list(range(360))
    )
    with torch.no_grad():
        right = model(batch["pixel_values"]).logits.argmax(-1) == batch["label"]
    result = json.loads((folder / "results" / "raptor_k3_classification.json").read_text())
    assert right.float().mean().item() == pytest.approx(result["metrics"]["accuracy"])


def test_the_card_has_metadata_and_a_snippet_that_runs(line):
    from huggingface_hub import ModelCard

    model = line[0] / "seed_0" / "classification" / "models" / "raptor_k3"
    card = ModelCard.load(model / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert [figure.metric_type for figure in card.data.eval_results] == ["accuracy", "r2"]
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert run_snippet(snippet, model.parent).split()[-1] == "13"  # hidden states: layers 0 to 12
    with pytest.raises(RuntimeError, match="usage snippet of the model card fails"):
        run_snippet(snippet.replace("raptor_k3", "no_such_model"), model.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sign", "product"),
    [
        ("activations", "data-00000-*.arrow", "data-*.arrow"),
        ("seed_0/raptor_k3", "checkpoints/step_*", "model.safetensors"),
    ],
)
def test_kill_and_resume_end_in_the_same_bytes(line, stage, sign, product, tmp_path):
    out = line[0]
    again = tmp_path / "again"
    command = [sys.executable, *flags(out, stage), "--output_dir", again]
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(again.glob(sign)) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((again / "run.json").read_text())["finished"] is False
    refused = run(*command, check=False)
    assert refused.returncode != 0
    assert "unfinished run. Add --resume" in refused.stderr
    run(*command, "--resume")
    names = sorted(file.name for file in (out / stage).glob(product))
    assert names and names == sorted(file.name for file in again.glob(product))
    for name in names:
        assert (out / stage / name).read_bytes() == (again / name).read_bytes()


def test_finished_stages_are_skipped_and_changed_arguments_said(line):
    out = line[0]
    stage = "seed_0/raptor_k3"
    weights = (out / stage / "model.safetensors").stat()
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launch, *flags(out, stage), "--output_dir", out / stage, "--resume"]
    assert "finished already, nothing to do" in run(*command).stdout
    changed = run(*command, "--steps", "25", check=False)
    assert changed.returncode != 0
    assert "steps: made with 24, now asked for 25" in changed.stderr
    assert (out / stage / "model.safetensors").stat() == weights


@pytest.fixture
def blocks(line, tmp_path):
    """A folder as of stage 1, with blocks for two spans."""
    teacher = load_backbone(line[0] / "teacher")
    (tmp_path / "blocks").mkdir()
    save_blocks([make_span(teacher, *span) for span in ((0, 7), (7, 12))], tmp_path / "blocks")
    return tmp_path / "blocks"


def test_bad_input_is_said_in_words(line, blocks, tmp_path):
    out = line[0]
    distill = [sys.executable, *flags(out, "seed_0/raptor_k3"), "--output_dir", tmp_path / "new"]
    index = distill.index("--phases_file")
    cases = {
        "Give either --phases 7 3 2, or --phases_file FILE --k 3": [*distill, "--phases", "7", "5"],
        "sum to the teacher's 12 layers; got [7, 3, 1]": [
            *distill[:index], "--phases", "7", "3", "1", *distill[index + 4 :]
        ],
        "has no block for the span 0-5": [
            *distill[:index], "--phases", "5", "7", "--blocks", blocks, "--init", "teacher",
            *distill[index + 4 :],
        ],
        "--phase_fraction is for whole Raptors": [
            sys.executable, "training/pretrain_blocks.py", *distill[3:index], "--spans", "0-7",
            "--phase_fraction", "0.5", "--output_dir", tmp_path / "new",
        ],
    }  # fmt: skip
    for message, command in cases.items():
        done = run(*command, check=False)
        assert done.returncode != 0
        assert message in done.stderr
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    phases = run(
        sys.executable, "training/find_phases.py", "--activations", out / "activations",
        "--k", "13", "--output_dir", tmp_path / "phases", check=False,
    )  # fmt: skip
    assert phases.returncode != 0
    assert "between 1 and the number of layers, 12; got 13" in phases.stderr
    for script in ("training/reproduce.sh", "training/ablate.sh"):
        usage = run("bash", script, "imagenet", check=False)
        assert usage.returncode == 2
        assert f"usage: bash {script} digits [--seeds N]" in usage.stderr


def test_random_and_teacher_starts_differ(line):
    folder = line[0] / "seed_0"
    weights = [
        load_file(folder / name / "model.safetensors")
        for name in ("raptor_k3", "raptor_k3_random_init")
    ]
    assert not torch.equal(*(w["blocks.0.attention.qkv.weight"] for w in weights))


def test_training_online_follows_training_from_the_store(line, tmp_path):
    out = line[0]
    manifest = json.loads((out / "activations" / "manifest.json").read_text())
    command = [*flags(out, "seed_0/raptor_k3"), "--activations", "online", "--dataset", "digits"]
    command += ["--views", manifest["views"], "--num_workers", "1"]
    run(sys.executable, *command, "--output_dir", tmp_path / "online")
    logs = [
        [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "online", out / "seed_0" / "raptor_k3")
    ]
    for online, stored in zip(*logs, strict=True):
        # float16 rounds the stored states, and blocks that start as the teacher's layers are close
        assert online["loss"] == pytest.approx(stored["loss"], rel=0.05)
    assert json.loads((tmp_path / "online" / "run.json").read_text())["finished"]
    refused = run(sys.executable, *flags(out, "seed_0/raptor_k3"), "--dataset", "digits",
                  "--output_dir", tmp_path / "stored", check=False)  # fmt: skip
    assert "--dataset is for --activations online" in refused.stderr


@pytest.mark.slow
def test_the_ablation_ends_in_a_table_of_six_rows(line):
    out = line[0]
    command = block("docs/reference_code.md", "ablation").removesuffix(" --seeds 3\n").split()
    printed = run(*command, OUT=str(out), RECIPES="tests/recipes").stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    names = ["teacher forcing only", "+ autoregressive", "+ depth scaling"]
    names += ["+ weighted cls (last block)", "+ second stage", "+ tuned classifier"]
    found = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert [name for name in found if name in names] == names
    assert "## Ablation" in (out / "report" / "report.md").read_text()
    card = (
        out / "ablation" / "seed_0" / "head" / "models" / "second_stage" / "README.md"
    ).read_text()
    assert "# raptor_k3_reference_recipe" in card and "ffn swiglu" in card
    # the teacher's own head, untouched, and the same head fine-tuned
    run_dir = out / "ablation" / "seed_0"
    head = load_file(out / "teacher" / "model.safetensors")["classifier.weight"]
    for folder, name, same in (
        ("head", "second_stage", True),
        ("tuned_head", "tuned_classifier", False),
    ):
        saved = load_file(run_dir / folder / "models" / name / "model.safetensors")
        assert torch.equal(saved["classifier.weight"], head) is same
    # stage 1 alone: the chained blocks are the blocks
    blocks = load_file(run_dir / "weighted_cls_blocks" / "blocks.safetensors")
    chained = load_file(run_dir / "weighted_cls" / "model.safetensors")
    spans = sorted(
        {name.split(".")[0] for name in blocks}, key=lambda span: int(span.split("-")[0])
    )
    for number, span in enumerate(spans):
        name = "attention.qkv.weight"
        assert torch.equal(blocks[f"{span}.{name}"], chained[f"blocks.{number}.{name}"])


@pytest.mark.slow
def test_new_processes_make_what_forks_of_one_made(line, tmp_path):
    """Every program of the line started as a user does, so that no missing import can hide."""
    recipes = tmp_path / "recipes"
    shutil.copytree(ROOT / "tests" / "recipes", recipes)
    whole = "digits_dynamics.yaml"  # on all images, as the README says
    shutil.copy(ROOT / "training" / "recipes" / whole, recipes / whole)
    out = tmp_path / "out"
    command = ("bash", "training/reproduce.sh", "digits")
    run(*command, OUT=str(out), RECIPES=str(recipes), new_process=True)
    weights = sorted(path.relative_to(out) for path in out.rglob("*.safetensors"))
    assert len(weights) >= 15
    for path in weights:
        assert (out / path).read_bytes() == (line[0] / path).read_bytes(), path
    study = json.loads((out / "seed_0" / "dynamics" / "dynamics.json").read_text())
    assert study["num_images"] == 360 and len(study["models"]) == 4
    matrix = ROOT / "tests" / "fixtures" / "dinov2_base_layer_distance.json"
    compare = [
        "-m",
        "evaluation.recurrence.compare_phases",
        "--distance",
        matrix,
        "--output_dir",
        out / "cuts",
    ]
    assert "| recursive | 3 | [7, 3, 2] |" in run(sys.executable, *compare, new_process=True).stdout
