"""The programs as a user runs them: the whole line, kills in mid-stage, bad input."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from raptor_hf.data import ImageViews, load_images
from raptor_hf.hub.model_card import run_snippet
from raptor_hf.runs.files import read_json
from raptor_hf.teachers import load_processor
from tests.pages import block
from tests.programs import ACCELERATE_LAUNCH, ROOT, run, start


def flags(out, stage):
    """The command of a stage of the line, without its output folder."""
    recipes, source = ROOT / "tests" / "recipes", ["--teacher", out / "teacher"]
    if stage == "activations":
        program = "training/extract_activations.py"
        return [program, recipes / "digits_activations.yaml", *source]
    source += ["--seed", "0", "--activations", out / "activations"]
    source += ["--phases_file", out / "phases" / "phases.json", "--k", "3"]
    return ["training/distill_raptor.py", recipes / "digits_raptor.yaml", *source]


def classifier(out):
    """The folder of the line's Raptor with its linear head."""
    return out / "seed_0" / "classification" / "models" / "raptor_k3"


def test_the_line_ends_in_a_table_and_paths_that_exist(line):
    out, printed = line
    assert "== report and model cards" in printed
    assert "| teacher | – |" in printed and "| raptor_k3 | [" in printed
    assert "| constant | – | 10.0 |" in printed  # the most frequent of ten digits
    assert f"model:   {classifier(out)}" in printed
    assert len(AutoModel.from_pretrained(classifier(out)).config.phases) == 3
    assert (classifier(out) / "preprocessor_config.json").exists()
    for name in ("report.md", "r2_per_layer.png", "layer_distance.png"):
        assert (out / "report" / name).stat().st_size > 500
    assert not list(out.rglob("checkpoints"))


def test_results_say_where_they_come_from(line):
    results = line[0] / "seed_0" / "classification" / "results"
    result = read_json(results / "raptor_k3_r2.json")
    assert len(result["metrics"]["layers"]["cls"]) == 12
    assert result["environment"]["transformers"]
    assert (result["seed"], result["num_images"]) == (0, 360)
    (stage,) = result["training"]["stages"]
    assert stage["program"] == "distill_raptor" and stage["seconds"] > 0
    assert result["training"]["teacher"]["name"] == "teacher"


def test_the_saved_classifier_scores_what_the_result_says(line):
    folder = classifier(line[0])
    model = AutoModelForImageClassification.from_pretrained(folder)
    images = ImageViews(load_images("digits", "test"), load_processor(folder))
    batch = images.__getitems__(list(range(360)))
    with torch.no_grad():
        right = model(batch["pixel_values"]).logits.argmax(-1) == batch["label"]
    result = read_json(folder.parents[1] / "results" / "raptor_k3_classification.json")
    assert right.float().mean().item() == pytest.approx(result["metrics"]["accuracy"])


def test_the_card_has_metadata_and_a_snippet_that_runs(line):
    folder = classifier(line[0])
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert [figure.metric_type for figure in card.data.eval_results] == ["accuracy", "r2"]
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert run_snippet(snippet, folder.parent).split()[-1] == "13"  # hidden states: 0 to 12


def kill_and_resume(line, stage, sign, again):
    """Kill a stage with `kill -9` when a file like `sign` is there, and let it go on."""
    command = [sys.executable, *flags(line[0], stage), "--output_dir", again]
    process = start(*command)
    while not list(again.glob(sign)) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert read_json(again / "run.json")["finished"] is False
    refused = run(*command, check=False)
    assert refused.returncode != 0 and "unfinished run. Add --resume" in refused.stderr
    run(*command, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sign", "product"),
    [
        ("activations", "data-00000-*.arrow", "data-*.arrow"),
        ("seed_0/raptor_k3", "checkpoints/step_*", "model.safetensors"),
    ],
)
def test_kill_and_resume_end_in_the_same_bytes(line, stage, sign, product, tmp_path):
    kill_and_resume(line, stage, sign, tmp_path / "again")
    names = sorted(file.name for file in (line[0] / stage).glob(product))
    assert names and names == sorted(file.name for file in (tmp_path / "again").glob(product))
    for name in names:
        again = (tmp_path / "again" / name).read_bytes()
        assert (line[0] / stage / name).read_bytes() == again


def test_finished_stages_are_skipped_and_changed_arguments_said(line):
    folder = line[0] / "seed_0" / "raptor_k3"
    weights = (folder / "model.safetensors").stat()
    command = [*ACCELERATE_LAUNCH, *flags(line[0], "raptor"), "--output_dir", folder, "--resume"]
    assert "finished already, nothing to do" in run(*command).stdout
    changed = run(*command, "--steps", "25", check=False)
    assert changed.returncode != 0
    assert "steps: made with 24, now asked for 25" in changed.stderr
    assert (folder / "model.safetensors").stat() == weights


def test_a_partition_that_is_missing_is_said(line, tmp_path):
    out = line[0]
    command = ["training/distill_raptor.py", "--teacher", out / "teacher", "--k", "11"]
    command += ["--activations", out / "activations", "--output_dir", tmp_path / "out"]
    done = run(sys.executable, *command, "--phases_file", out / "phases/phases.json", check=False)
    assert done.returncode == 2 and "has the partitions k = " in done.stderr


def test_scripts_show_their_usage():
    for script in ("training/reproduce.sh", "training/ablate.sh"):
        usage = run("bash", script, "imagenet", check=False)
        assert usage.returncode == 2 and f"usage: bash {script} digits" in usage.stderr


def test_training_online_follows_training_from_the_store(line, tmp_path):
    out = line[0]
    views = read_json(out / "activations" / "manifest.json")["views"]
    command = [*flags(out, "raptor"), "--activations", "online", "--dataset", "digits"]
    command += ["--views", views, "--num_workers", "1", "--output_dir", tmp_path / "online"]
    run(sys.executable, *command)
    logs = [
        [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "online", out / "seed_0" / "raptor_k3")
    ]
    for online, stored in zip(*logs, strict=True):
        # float16 rounds the stored states, and blocks that start as the teacher's layers are close:
        # the loss is some 1e-6, and changes by a factor of ten from line to line
        assert online["loss"] == pytest.approx(stored["loss"], rel=0.25)
    assert read_json(tmp_path / "online" / "run.json")["finished"]


@pytest.mark.slow
def test_the_ablation_ends_in_a_table_of_six_rows(line):
    out = line[0]
    command = block("docs/reference_code.md", "ablation").removesuffix(" --seeds 3\n").split()
    printed = run(*command, OUT=str(out), RECIPES="tests/recipes").stdout
    rows = re.findall(r"^\| (.*?) \| ", printed, re.MULTILINE)
    names = ["teacher forcing only", "+ autoregressive", "+ depth scaling"]
    names += ["+ weighted cls (last block)", "+ second stage", "+ tuned classifier"]
    assert [name for name in rows if name in names] == names
    assert "## Ablation" in (out / "report" / "report.md").read_text()
    ablation = out / "ablation" / "seed_0"
    card = (ablation / "head" / "models" / "second_stage" / "README.md").read_text()
    assert "# second_stage" in card and "ffn swiglu" in card
    # the teacher's own head, untouched, and the same head fine-tuned
    head = load_file(out / "teacher" / "model.safetensors")["classifier.weight"]
    for name, same in (
        ("head/models/second_stage", True),
        ("tuned_head/models/tuned_classifier", False),
    ):
        saved = load_file(ablation / name / "model.safetensors")
        assert torch.equal(saved["classifier.weight"], head) is same
    # stage 1 alone: the chained blocks are the blocks
    blocks = load_file(ablation / "weighted_cls_blocks" / "blocks.safetensors")
    chained = load_file(ablation / "weighted_cls" / "model.safetensors")
    spans = {name.split(".")[0] for name in blocks}
    for number, span in enumerate(sorted(spans, key=lambda span: int(span.split("-")[0]))):
        weight = blocks[f"{span}.attention.qkv.weight"]
        assert torch.equal(weight, chained[f"blocks.{number}.attention.qkv.weight"])


@pytest.mark.slow
def test_new_processes_make_what_forks_made(line, tmp_path):
    """Every program of the line started as a user does, so that no missing import can hide."""
    command = ("bash", "training/reproduce.sh", "digits")
    run(*command, OUT=str(tmp_path), RECIPES="tests/recipes", new_process=True)
    weights = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    assert len(weights) >= 3
    for path in weights:
        assert (tmp_path / path).read_bytes() == (line[0] / path).read_bytes(), path
