"""Fidelity over bytes: sizes, intervals by hand, R² beside the library's, the program in small."""

import json

import numpy as np
import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from evaluation.benchmarks.__main__ import main
from evaluation.benchmarks.fidelity import in_bits, interval, nearest
from raptor_hf import make_raptor
from raptor_hf.activations import OnlineActivations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, choose_images, load_images, make_processor
from raptor_hf.distillation.fidelity import trajectory_r2
from raptor_hf.distillation.rounding import round_weight, unpack_weight
from raptor_hf.loop import read_log
from raptor_hf.runs.files import read_json
from raptor_hf.teachers import load_backbone
from training import distill_raptor


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4,
        num_register_tokens=1, layerscale_value=0.3,
    )  # fmt: skip
    model = Dinov2WithRegistersModel(config).eval().requires_grad_(False)
    model.embeddings.register_tokens += 3  # the token groups have other means
    return model


def test_sizes_by_hand(teacher):
    """Four layers of 12·32² weights; everything else in 16 bits."""
    matrices = 4 * 12 * 32**2
    rest = 2 * (teacher.num_parameters() - matrices)
    assert in_bits(teacher, 16, "nearest")[1] == 2 * matrices + rest
    for bits in (2, 3, 4, 8):
        assert in_bits(teacher, bits, "nearest")[1] == matrices * bits // 8 + matrices // 16 + rest
    raptor = make_raptor(teacher, [3, 1])
    rest = 2 * (raptor.num_parameters() - matrices // 2)
    assert in_bits(raptor, 4, "learned")[1] == matrices // 4 + matrices // 32 + rest


def test_groups_are_clipped_where_that_helps(teacher):
    weight = teacher.encoder.layer[0].mlp.fc1.weight
    for bits in (2, 3, 4):
        plain = unpack_weight(*round_weight(weight, bits))
        found = nearest(weight, bits)
        errors = [(w - weight).square().unflatten(1, (-1, 32)).sum(2) for w in (found, plain)]
        assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.98 * errors[1].sum()
        assert torch.equal(unpack_weight(*round_weight(found, bits)), found)


def test_intervals_by_hand():
    errors, totals = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[4.0, 8], [4, 8]])
    # image 0 alone has (3/4 + 1) / 2, image 1 (1/4 + 1/2) / 2; both (1/2 + 3/4) / 2
    assert interval(errors, totals, np.array([[2, 0]])) == [0.625, 0.875, 0.875]
    assert interval(errors, totals, np.array([[0, 2], [0, 2]])) == [0.625, 0.375, 0.375]


@pytest.mark.slow
def test_models_are_compared_by_bytes(teacher, tmp_path):
    line, processor = tmp_path / "digits", make_processor(16)
    (line / "activations").mkdir(parents=True)
    teacher.save_pretrained(line / "teacher")
    processor.save_pretrained(line / "teacher")
    images = ImageViews(load_images("digits", "train"), processor, image_ids=range(40))
    write_activations(teacher, images, line / "activations")
    flags = {"teacher": line / "teacher", "activations": line / "activations", "steps": 3}
    flags |= {"batch_size": 8, "warmup_steps": 1, "report_to": "none"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    learns_on = [f"--blocks={line / 'float'}", "--quantize=4", "--phase_fraction=0", "--steps=2"]
    itself = ["--phase_fraction=0", "--depth_scaling=False", "--quantize=8", "--steps=0"]
    itself += ["--phases", *"1111"]  # a block a layer: the teacher in 8 bits
    for name, more in (("float", []), ("four", learns_on), ("itself", itself)):
        distill_raptor.main([*words, f"--output_dir={line / name}", "--phases", "3", "1", *more])

    options = ["fidelity", "--line", str(line), "--output_dir", str(tmp_path)]
    models = ("k2_learned", "four"), ("k2", "float"), ("itself", "itself")
    options += ["--models", *(f"{name}={line / folder}" for name, folder in models)]
    options += ["--shallow", str(line / "shallow"), "--train_images", "60", "--test_images", "40"]
    main(options)
    rows = {}
    for row in read_json(tmp_path / "fidelity_digits.json")["result"]:
        if row["method"] != "nearest" or row["bits"] > 4:
            rows[row["model"], row["bits"]] = row
    bits = {model: [b for m, b in rows if m == model] for model, _ in rows}
    assert bits == {
        "constant": [0], "teacher": [16, 8, 4, 3, 2], "k2": [16, 8, 4, 3], "k2_learned": [4],
        "itself": [8], "shallow": [16, 8, 4, 3],
    }  # fmt: skip
    for figures in (row["r2"] for key, row in rows.items() if key[0] == "constant"):
        assert figures == [0, 0, 0]
    assert rows["itself", 8]["r2_last"][0] > 0.99
    assert rows["teacher", 16]["r2"][0] > 0.9999 and rows["teacher", 16]["recall"][0] > 0.95
    falling = [rows["teacher", b]["r2_last"][0] for b in (16, 8, 4, 3, 2)]
    assert falling == sorted(falling, reverse=True)

    # R² is the library's, of the model in 16 bits
    ids = choose_images(360, 40, 0)
    held_out = ImageViews(load_images("digits", "test"), processor, image_ids=ids)
    raptor = in_bits(load_backbone(str(line / "float")), 16, "nearest")[0]
    expected = trajectory_r2(
        raptor, OnlineActivations(load_backbone(str(line / "teacher")), held_out)
    )
    for name, group in (("r2", "all"), ("r2_cls", "cls")):
        assert rows["k2", 16][name][0] == pytest.approx(expected["mean"][group], abs=1e-4)
    assert rows["k2", 16]["r2_last"][0] == pytest.approx(expected["layers"]["all"][-1], abs=1e-4)

    # the shallow ViT learns as long as the whole Raptor, not as what learned on; it has the last
    # state alone, half of the work, and is not trained again
    assert read_log(line / "shallow")[-1]["step"] == 3
    shallow = rows["shallow", 16]
    assert "r2" not in shallow and shallow["multiply_adds"] * 2 == rows["k2", 16]["multiply_adds"]
    written = (line / "shallow" / "model.safetensors").stat().st_mtime_ns
    before = json.loads((tmp_path / "fidelity_digits.json").read_text())["result"]
    main(options)
    assert (line / "shallow" / "model.safetensors").stat().st_mtime_ns == written
    assert read_json(tmp_path / "fidelity_digits.json")["result"] == before
    assert (tmp_path / "fidelity_digits.png").is_file()
