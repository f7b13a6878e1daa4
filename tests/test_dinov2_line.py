"""`reproduce.sh dinov2_small`: from a teacher and images to a report, killed on the way."""

import json
import os
import signal
import time

import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from raptor_hf.data import make_processor
from tests.layouts import write_ade20k, write_imagenet
from tests.programs import run, start

SMALL = {"RECIPES": "tests/recipes"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A teacher of 28 pixels, images of ten classes, scenes with masks."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=12, num_attention_heads=3, image_size=28, patch_size=14,
        layerscale_value=0.3,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder / "teacher")
    make_processor(28).save_pretrained(folder / "teacher")
    write_imagenet(folder / "images")
    write_ade20k(folder / "scenes", number=4, size=(56, 70))
    return folder


def command(given):
    return [
        "bash", "training/reproduce.sh", "dinov2_small", "--images", given / "images",
        "--teacher", given / "teacher", "--segmentation", given / "scenes", "--resolution", "42",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_line_of_a_dinov2(given, tmp_path):
    out = tmp_path / "killed"
    process = start(*command(given), OUT=str(out), **SMALL)
    while not list(out.glob("seed_0/raptor_k3/checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # in the midst of the second Raptor
    printed = process.communicate()[0]
    assert "computes " in printed and "free" in printed  # the plan
    assert (out / "seed_0" / "raptor_k2" / "model.safetensors").exists()
    assert not (out / "seed_0" / "raptor_k3" / "model.safetensors").exists()
    resumed = run(*command(given), OUT=str(out), **SMALL).stdout
    assert resumed.count("finished already, nothing to do") == 2  # phases, and k = 2
    whole = tmp_path / "whole"
    run(*command(given), OUT=str(whole), **SMALL)
    for k in (2, 3, 4):
        name = f"seed_0/raptor_k{k}/model.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes()
        model = AutoModel.from_pretrained(
            out / "seed_0" / "classification" / "models" / f"raptor_k{k}"
        )
        assert len(model.config.phases) == k
    for name in ("teacher_segmentation", "constant_segmentation", "raptor_k4_segmentation"):
        path = out / "seed_0" / "segmentation" / "results" / f"{name}.json"
        assert 0 <= json.loads(path.read_text())["metrics"]["miou"] <= 1
    processor = json.loads((out / "seed_0" / "raptor_k2" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 42, "width": 42}
    report = (out / "report" / "report.md").read_text()
    assert "| accuracy (%) |" in report and "| mIoU (%) |" in report and "| raptor_k4 |" in report
    assert (out / "seed_0" / "dynamics" / "what_we_see.md").exists()


def test_wrong_options_are_said(given):
    for wrong in (["--no", "1"], ["--images"]):
        refused = run("bash", "training/reproduce.sh", "dinov2_small", *wrong, check=False)
        assert refused.returncode == 2 and "--segmentation FOLDER" in refused.stderr
