import json
import sys
from unittest import mock

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from evaluation.benchmarks import recipes as recipe_runs
from evaluation.benchmarks.recipe_sources import (
    RecipeSource,
    load_config,
    open_source,
    prepare_images,
)
from evaluation.benchmarks.recipes import (
    recipe_arguments,
    recipe_tables,
    recipes,
    step_units,
    tuned_rate,
    variants,
)
from raptor_hf.activations.arguments import ImageArguments
from raptor_hf.activations.online import image_views
from raptor_hf.activations.writing import write_activations
from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.teachers import trajectory
from tests.families import HOSTS
from tests.helpers import assert_same_outputs
from tests.layouts import write_imagenet
from tests.programs import run


def config_of(**options):
    teacher = Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=4, image_size=16, patch_size=4
    )
    return RaptorConfig(teacher_config=teacher, phases=[5, 4, 3], **options)


def units_of(recipe, config):
    *_, objective, loop = recipe_arguments(recipe | {"output_dir": ""})
    return step_units(objective, loop, config, 21)


def test_units_by_hand():
    assert units_of({"batch_size": 64, "objective": "autoregressive"}, config_of()) == 1
    # SwiGLU of hidden 4·D: 16 D² instead of 12 D², beside attention's 2·N·D; a quarter of the steps
    # goes through both passes
    published = config_of(ffn="swiglu", intermediate_size=256)
    ratio = (16 * 64 + 2 * 21) / (12 * 64 + 2 * 21)
    assert units_of(recipes()["reference"], published) == pytest.approx(1.25 * ratio, rel=1e-2)
    # a quarter of the images, and Muon's products in three blocks
    products = 3 * sum(5 * (4 * 64 * 64 * n + 2 * 64**3) for n in (192, 64, 256, 256))
    step = 3 * 64 * 12 * 2 * 21 * (12 * 64 * 64 + 2 * 21 * 64)
    assert units_of(recipes()["ours"], config_of()) == pytest.approx(0.25 + products / step)


def test_rates_are_doubled_and_halved_as_long_as_that_helps():
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(rate - 6)

    assert tuned_rate(score, 1.0) == 4.0  # as good as 8, and nearer
    tried.clear()
    assert tuned_rate(lambda rate: score(rate) if rate != 4 else 1, 1.0) == 4.0
    assert sorted(tried) == [0.5, 1.0, 2.0, 8.0]
    assert tuned_rate(lambda rate: -rate if rate > 0.1 else -9, 1.0) == 0.125
    assert tuned_rate(score, 1.0, extend=False) == 1.0


def test_variants_have_a_table_of_their_own():
    rows = [{"recipe": name, "k": 3, "budget": 100, "rate": 0.5, "r2": [0.5, 0.7], "r2_cls": [0.25]}
            for name in ("ours", *variants())]  # fmt: skip
    first, second = recipe_tables(rows).split("\n\n")
    assert first.splitlines()[2] == "| 3 | 100 | 0.6000 ± 0.1414 (rate 0.5) |"
    assert second.splitlines()[3] == "| ours, AdamW | 0.6000 ± 0.1414 | 0.2500 | 0.5 |"
    assert len(second.splitlines()) == 2 + len(rows)
    for name, variant in variants().items():  # one thing changed, or two that belong together
        changed = {k for k in variant if variant[k] != recipes()["ours"].get(k)}
        assert 1 <= len(changed) <= 2, name


def test_of_a_teacher_without_a_cls_token_its_column_is_empty():
    """As SigLIP, and I-JEPA."""
    runs = [{"rate": 0.5, "seed": seed, "train_r2": 0.5, "r2": {"all": r2, "patches": r2}}
            for seed, r2 in enumerate((0.5, 0.7))]  # fmt: skip
    rows = [
        recipe_runs.row(mock.Mock(recipe=name, k=3, units=100, runs=lambda: runs))
        for name in ("ours", "ours, AdamW")
    ]
    second = recipe_tables(rows).split("\n\n")[1]
    assert second.splitlines()[3] == "| ours, AdamW | 0.6000 ± 0.1414 | – | 0.5 |"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """What `reproduce.sh digits` leaves, of a small random teacher."""
    out = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4,
        num_register_tokens=1, layerscale_value=0.3,
    )  # fmt: skip
    teacher = Dinov2WithRegistersModel(config).eval()
    teacher.save_pretrained(out / "teacher")
    make_processor(16).save_pretrained(out / "teacher")
    (out / "activations").mkdir()
    images = ImageViews(load_images("digits", "train"), make_processor(16))
    write_activations(teacher, images, out / "activations")
    (out / "phases").mkdir()
    (out / "phases" / "phases.json").write_text(json.dumps({"phases": {"2": [2, 2]}}))
    return out


@pytest.mark.slow
def test_recipes_are_compared_and_runs_on_record_are_not_made_again(digits, tmp_path):
    command = [
        sys.executable, "-m", "evaluation.benchmarks", "recipe", "--line", digits, "--k", "2",
        "--budgets", "0.2", "0.4", "--seeds", "2", "--folder", tmp_path / "work",
        "--output_dir", tmp_path,
    ]  # fmt: skip
    printed = run(*command).stdout
    found = json.loads((tmp_path / "recipe.json").read_text())
    table = found["result"]["table"]
    assert [(row["recipe"], row["budget"]) for row in table] == [
        (name, budget) for budget in (0.2, 0.4) for name in recipes()
    ]
    for row in table:
        assert len(row["r2"]) == 2 and row["r2"][0] != row["r2"][1]
        facts = {"recipe": row["recipe"], "budget": row["budget"], "seed": 0}
        runs = [r for r in found["result"]["runs"] if facts.items() <= r.items()]
        best = max(runs, key=lambda r: r["train_r2"])
        assert len(runs) >= 3 and best["rate"] == row["rate"] and best["r2"]["all"] == row["r2"][0]
    assert recipe_tables(table) in printed
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
    record = tmp_path / "work" / "recipe" / "recipe_runs.jsonl"
    before = record.read_bytes()
    assert recipe_tables(table) in run(*command).stdout
    assert record.read_bytes() == before


@pytest.fixture
def photographs(tmp_path):
    """What `reproduce.sh dinov2_small` leaves of a small teacher, and a folder of images."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14,
        layerscale_value=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path / "teacher")
    make_processor(28).save_pretrained(tmp_path / "teacher")
    (tmp_path / "line" / "phases").mkdir(parents=True)
    phases = tmp_path / "line" / "phases" / "phases.json"
    phases.write_text(json.dumps({"phases": {"2": [2, 2]}}))
    write_imagenet(tmp_path / "images", number=4)
    return tmp_path


def source_of(photographs, **changes):
    source = RecipeSource(
        "dinov2_small", str(photographs / "line"), str(photographs), str(photographs / "teacher"),
        str(photographs / "images"), resolution=28,
    )  # fmt: skip
    return source._replace(**changes)


def test_prepared_views_are_those_of_training(photographs):
    source = source_of(photographs, resolution=42)
    prepare_images(source, num_workers=0)
    before = [path.stat().st_mtime_ns for path in sorted(photographs.glob("*.npy"))]
    prepare_images(source, num_workers=0)
    assert [path.stat().st_mtime_ns for path in sorted(photographs.glob("*.npy"))] == before
    teacher, learned, reported = open_source(source)
    assert (len(learned), len(reported)) == (4 * 40, 40)
    crops = CropArguments()
    images = ImageArguments(dataset=source.images, split="train", views=4)
    reading = ReadingArguments(resolution=[42])
    views = image_views(images, crops, reading, source.teacher)  # as floats
    rows = [0, 41, 159]
    batch = learned.__getitems__(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    expected = views.__getitems__(rows)["pixel_values"]
    assert torch.equal(learned.pixel_values(batch), expected)
    assert_same_outputs(learned.states(batch), trajectory(teacher, expected))
    assert load_config(source).hidden_size == 32


def test_a_teacher_within_another_model_says_how_wide_it_is(photographs):
    HOSTS["CLIPModel"]()[0].save_pretrained(photographs / "teacher")
    assert load_config(source_of(photographs)).hidden_size == 24


def test_runs_of_another_teacher_are_not_taken_for_its_own(photographs):
    source = source_of(photographs, folder=str(photographs / "work"))
    source.claim_folder()
    source.claim_folder()
    for changed in ({"teacher": "other"}, {"images": "other"}, {"resolution": 42}):
        with pytest.raises(ValueError, match=f"holds the runs of another.*{next(iter(changed))}: "):
            source._replace(**changed).claim_folder()


@pytest.mark.slow
def test_recipes_are_compared_on_any_teacher_and_images(photographs):
    source = source_of(photographs)
    run(
        sys.executable, "-m", "evaluation.benchmarks", "recipe", "--recipe", "dinov2_small",
        "--line", source.line, "--model", source.teacher, "--dataset", source.images,
        "--resolution", "28", "--k", "2", "--budgets", "4", "--seeds", "1", "--processes", "1",
        "--folder", photographs / "work", "--output_dir", photographs,
    )  # fmt: skip
    found = json.loads((photographs / "recipe_dinov2_small.json").read_text())
    rows = {row["recipe"]: row for row in found["result"]["table"]}
    assert set(rows) == set(recipes("dinov2_small"))
    assert rows["ours"]["r2"][0] > rows["reference"]["r2"][0]
    assert (photographs / "recipe_dinov2_small.png").read_bytes().startswith(b"\x89PNG")
