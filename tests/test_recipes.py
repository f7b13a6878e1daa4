"""Every recipe is read by its program; a dry run prints the plan and writes nothing."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.data import make_processor
from raptor_hf.distillation.compute import application_flops
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.runs.arguments import parse_arguments
from training import distill_raptor, extract_activations, pretrain_blocks

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def program_of(recipe):
    """The program that the command in a recipe's head runs."""
    head = recipe.read_text().split("\n\n")[0]
    assert f"training/recipes/{recipe.name}" in head, "the head shows the command of this recipe"
    script, module = re.search(r"(\w+/\w+)\.py|-m ([\w.]+)", head).groups()
    name = module or script.replace("/", ".")
    package = ROOT / name.replace(".", "/")
    return importlib.import_module(f"{name}.__main__" if package.is_dir() else name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_by_its_program(recipe):
    program = program_of(recipe)
    parts = getattr(program, "PARTS", None) or (program.Arguments,)
    given = yaml.safe_load(recipe.read_text())
    argv = [str(recipe)]
    for field in [field for part in parts for field in dataclasses.fields(part)]:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            argv += [f"--{field.name}", "x"]
    values = {}
    for part in parse_arguments(*parts, argv=argv):
        values |= vars(part)
    for name, value in given.items():
        assert values[name] == value or str(values[name]) == str(value), name


def test_dry_runs_print_the_plan_and_write_nothing(teacher, tmp_path, monkeypatch, capsys):
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    made = sorted(tmp_path.rglob("*"))
    common = ["--teacher", "teacher", "--output_dir", "out", "--dataset", "digits", "--dry_run"]
    extract_activations.main(common)
    # 7 layers × 7 tokens × 24 channels of two bytes
    assert "1,437 trajectories of 7 × 7 × 24 float16 in 1 shards" in capsys.readouterr().out

    common += ["--activations", "online", "--steps", "10", "--batch_size", "8"]
    distill_raptor.main([*common, "--phases", "4", "2", "--objective", "autoregressive"])
    printed = capsys.readouterr().out
    assert "80 in 10 steps of 8" in printed and "layers 0-4, 4-6" in printed
    pretrain_blocks.main([*common, "--spans", "0-4", "2-6", "--warmup_steps", "1"])
    assert "layers 0-4, 2-6" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == made


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--batch_size", "5000"], "needs at least as many rows"),
        (["--validation_dataset", "/nowhere"], "/nowhere"),
        (["--validate_every", "2"], "needs --validation_dataset"),
        (["--resolution", "9"], "multiples of the patch"),
        (["--phases", "4", "4"], "sum to the teacher's 6 layers"),
        (["--phases_file", "phases.json"], "Give either --phases 7 3 2, or"),
        (["--blocks", "teacher"], r"no Raptor of the phases \[4, 2\]"),
        (["--blocks", "teacher", "--init", "random"], "are finished blocks"),
        (["--num_images", "5000"], "5,?000"),
        (["--report_to", "trackio"], "needs its package"),
        (["--output_dir", "teacher"], "was not made by this program"),
        (["--teacher", "plain", "--token_weights", "0,1,0"], "leave nothing to learn"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    teacher, plain_teacher, tmp_path, monkeypatch, wrong, words
):
    for model, name in ((teacher, "teacher"), (plain_teacher, "plain")):
        model.save_pretrained(tmp_path / name)
        make_processor(8).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    argv = ["--teacher", "teacher", "--output_dir", "out", "--activations", "online"]
    argv += ["--dataset", "digits", "--phases", "4", "2", *wrong]
    for more in (["--dry_run"], []):
        with pytest.raises((ValueError, OSError), match=words):
            distill_raptor.main([*argv, *more])
        assert not (tmp_path / "out").exists()


def test_flops_of_a_block_are_what_torch_counts():
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
