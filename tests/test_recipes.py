"""Every recipe, as far as a dry run goes."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.data import load_images, make_processor
from raptor_hf.distillation.compute import application_flops
from raptor_hf.dry_runs import describe_images, teacher_facts
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.tasks.task import Segmentation
from tests.families import HOSTS, tiny_model
from tests.layouts import write_ade20k, write_imagenet

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
BASE = "facebook/dinov2-with-registers-base"


@pytest.fixture(scope="module")
def dinov2_base():
    """The configuration of the published teacher, in the cache as if it had been downloaded."""
    repo = Path(constants.HF_HUB_CACHE) / f"models--{BASE.replace('/', '--')}"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    config = Dinov2WithRegistersConfig(image_size=518, patch_size=14)
    config.architectures = ["Dinov2WithRegistersModel"]
    config.save_pretrained(snapshot)
    make_processor(224).save_pretrained(snapshot)
    return BASE


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    config = Dinov2WithRegistersConfig(
        image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=12, num_attention_heads=4
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    make_processor(16).save_pretrained(folder)
    return folder


def program_of(recipe):
    """The program that the command in a recipe's head runs."""
    head = recipe.read_text().split("\n\n")[0]
    assert f"training/recipes/{recipe.name}" in head, "the head shows the command of this recipe"
    script, module = re.search(r"(\w+/\w+)\.py|-m ([\w.]+)", head).groups()
    name = module or script.replace("/", ".")
    package = ROOT / name.replace(".", "/")
    return importlib.import_module(f"{name}.__main__" if package.is_dir() else name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_says_what_it_would_do_and_touches_nothing(
    recipe, dinov2_base, digits_teacher, tmp_path, monkeypatch, capsys
):
    program = program_of(recipe)
    given = yaml.safe_load(recipe.read_text())
    missing = {"teacher": digits_teacher, "activations": "activations", "output_dir": "out"}
    missing |= {"spans": "0-7", "phases": "12"}
    if recipe.stem.startswith("dinov2"):
        dataset = "digit_scenes" if "segmentation" in recipe.stem else "digits"
        missing |= {"dataset": dataset, "data": "digits"}
    missing |= {"model": digits_teacher, "models": f"teacher_too={digits_teacher}"}
    known = {field.name for part in program.PARTS for field in dataclasses.fields(part)}
    flags = []
    for name, value in missing.items():
        if name in known and name not in given:
            flags += [f"--{name}", str(value)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program.__file__, str(recipe), *flags, "--dry_run"])
    program.main()
    printed = capsys.readouterr().out
    assert "nothing is trained, nothing is written" in printed
    assert list(tmp_path.iterdir()) == []
    if "imagenet" in recipe.stem:
        assert "12 layers × 768 channels, 261 tokens at 224×224" in printed
    expected = {  # counted by hand in shared sizes: 13 × 261 × 768 values of two bytes
        "imagenet_activations": [
            "5.21 MB (13 states",
            "5.21 TB for 1M images",
            "online: the store needs",
        ],
        "imagenet_blocks": [
            "6 blocks, swiglu of 3072, 56.9 M",
            "20,000,000 images",
            "9.24e+18 FLOP",
        ],
        "dinov2_small_raptor": ["digits (train): 1,437 images", "24,000 steps of 64", "measured"],
        "imagenet_raptor_k3": ["3 blocks", "layers 0-7, 7-10, 10-12", "104 TB over the run"],
        "digits_activations": [
            "11,496 trajectories",
            "out: 402 MB",
            "16 epochs of the layers 0 to 12",
        ],
    }.get(recipe.stem, [])
    for text in expected:
        assert text in printed, printed


def test_a_dry_run_of_online_training_counts_the_teacher(dinov2_base, monkeypatch, capsys):
    recipe = ROOT / "training" / "recipes" / "imagenet_blocks.yaml"
    program = program_of(recipe)
    flags = [
        "--activations",
        "online",
        "--spans",
        "0-7",
        "7-10",
        "--dry_run",
        "--output_dir",
        "out",
    ]
    monkeypatch.setattr(sys, "argv", [program.__file__, str(recipe), *flags])
    with pytest.raises(ValueError, match="needs images: give --dataset"):
        program.main()
    monkeypatch.setattr(sys, "argv", [program.__file__, str(recipe), *flags, "--dataset", "digits"])
    program.main()
    printed = capsys.readouterr().out
    assert "reads        digits (train): 1,437 images" in printed
    # 20 M images × 10 layers × 3.9 GFLOP
    assert "the teacher's layers 1 to 10, online: 7.81e+17 FLOP" in printed


def test_a_dry_run_before_there_are_phases_looks_at_the_tower(tmp_path, monkeypatch, capsys):
    """Of a model around a teacher the configuration itself has no number of layers."""
    HOSTS["CLIPModel"]()[0].save_pretrained(tmp_path / "clip")
    make_processor(16).save_pretrained(tmp_path / "clip")
    program = importlib.import_module("training.distill_raptor")
    flags = {"teacher": tmp_path / "clip", "activations": "online", "dataset": "digits", "k": 2,
             "phases_file": tmp_path / "phases.json", "output_dir": tmp_path}  # fmt: skip
    flags = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [program.__file__, *flags, "--dry_run"])
    program.main()
    printed = capsys.readouterr().out
    assert "is not there yet: planned with 2 phases of one length" in printed
    assert "clip_vision_model, 3 layers × 24 channels, 17 tokens at 16×16" in printed


def test_a_dry_run_counts_the_tokens_that_a_teacher_has(tmp_path):
    """SigLIP's own size is no multiple of its patch; images of other sizes dense tasks pad."""
    tiny_model("siglip_vision_model", image_size=18).save_pretrained(tmp_path)
    make_processor(18).save_pretrained(tmp_path)
    assert teacher_facts(str(tmp_path)).num_tokens == 4 * 4
    assert teacher_facts(str(tmp_path), resolution=[19, 24]).num_tokens == 5 * 6


def test_flops_of_a_block_are_what_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    teacher_config = Dinov2WithRegistersConfig(
        image_size=16, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for ffn in ("gelu", "swiglu"):
        config = RaptorConfig(
            teacher_config=teacher_config, phases=[2], ffn=ffn, depth_scaling=False
        )
        model = RaptorModel(config)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model.advance(torch.zeros(3, 21, 48), 1)
        assert counter.get_total_flops() == 3 * application_flops(config, 21)


def test_a_dry_run_counts_what_is_read(tmp_path):
    ade20k = write_ade20k(tmp_path / "ade", number=3)
    (ade20k / "images" / "training" / ".DS_Store").touch()
    photos = write_imagenet(tmp_path / "imagenet")
    number = len(load_images(str(photos), "train"))
    (photos / "train" / "n00000000" / "._x.jpg").touch()
    (photos / "train" / "notes.txt").touch()
    (photos / "train" / "zebra").symlink_to(photos / "val" / "n00000001")
    more = len(list((photos / "val" / "n00000001").iterdir()))
    assert describe_images(str(photos), "train").endswith(f"(train): {number + more} images")
    some = describe_images(str(photos), "train", at_most=3)
    assert some.endswith(f"{number + more} images, 3 of them")
    assert describe_images(str(ade20k), "training", task=Segmentation).endswith(": 3 images")
    assert "taken for a Hub dataset" in describe_images("no/folder", "train")
