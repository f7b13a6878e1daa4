import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.demo.analysis import (
    Head,
    Pair,
    analyse,
    check_pair,
    load_pair,
    model_folder,
    read_upload,
    state_cosines,
    top_classes,
)
from evaluation.demo.html import curves, layer_strip, layer_view
from raptor_hf.data import make_processor
from tests.helpers import (
    NAMES,
    noise,
    save_models,
    tiny_head,
    tiny_raptor,
    tiny_teacher,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("demo"))


def test_state_cosines_are_means_over_a_token_group():
    teacher = torch.tensor([[[1.0, 0], [2, 0], [0, 1]]])
    raptor = torch.tensor([[[3.0, 0], [0, 5], [0, 2]]])
    np.testing.assert_allclose(state_cosines(teacher, raptor, slice(0, 1)), [1])
    np.testing.assert_allclose(state_cosines(teacher, raptor, slice(1, 3)), [0.5])


def test_top_classes_are_the_softmax_of_the_head():
    linear = nn.Linear(2, 3, bias=False)
    linear.weight.data = torch.tensor([[0.0, 0], [math.log(6), 0], [0, math.log(3)]])
    with torch.no_grad():
        top = top_classes(Head(linear, ["a", "b", "c"]), torch.ones(1, 2), number=2)
    assert list(top) == ["b", "c"]
    assert list(top.values()) == pytest.approx([0.6, 0.3])
    assert top_classes(None, torch.ones(1, 2)) == {}


def test_analysis_holds_the_states_of_both_models(teacher):
    raptor, head = tiny_raptor(teacher), Head(tiny_head(), NAMES)
    analysis = analyse(Pair(teacher, raptor, make_processor(8), None, head), noise(3))
    np.testing.assert_array_equal(analysis.image, np.asarray(noise(3)))  # 8×8 already
    pixels = make_processor(8)(noise(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ours, theirs = (m(pixels, output_hidden_states=True) for m in (raptor, teacher))
    directions = [
        nn.functional.normalize(torch.stack(out.hidden_states)[:, 0, 0], dim=-1)
        for out in (ours, theirs)
    ]
    for angles, units in zip(analysis[2:4][::-1], directions, strict=True):
        cosines = (units[1:] * units[:-1]).sum(-1)
        np.testing.assert_allclose(angles, cosines.acos().rad2deg(), atol=1e-2)
    cosines = (directions[0] * directions[1]).sum(-1)
    np.testing.assert_allclose(analysis.cosines["cls"], cosines, atol=1e-6)
    assert analysis.cosines["patches"][0] == pytest.approx(1)  # the embeddings are the teacher's
    assert analysis.maps.models.shape == (2, 7, 2, 2, 3)
    ours_first, theirs_first = analysis.maps.models[:, 0]
    np.testing.assert_allclose(ours_first, theirs_first, atol=1e-6)
    tokens = ours.last_hidden_state[0]
    logits = head.linear(torch.cat([tokens[0], tokens[3:].mean(0)]))
    best = logits.argsort(descending=True)[:5].tolist()
    assert list(analysis.raptor_top) == [f"kind {label}" for label in best]
    assert list(analysis.raptor_top.values()) == pytest.approx(logits.softmax(-1)[best].tolist())
    assert analysis.teacher_top == {}


def test_pictures_say_what_they_show(teacher):
    raptor = tiny_raptor(teacher)
    analysis = analyse(Pair(teacher, raptor, make_processor(8), None, None), noise(3))
    spans = raptor.config.spans()
    assert "Raptor, layer 5 (block 1)" in layer_view(analysis, 5, spans)
    assert "teacher, layer 0" in layer_view(analysis, 0, spans)
    strip = layer_strip(analysis, spans)
    assert strip.count("<img") == strip.count('alt="teacher,') + strip.count('alt="Raptor,') == 14
    assert 'colspan="4">block 0<' in strip and 'colspan="2">block 1<' in strip
    angles = f"Raptor {analysis.raptor_angles.min():.0f} to {analysis.raptor_angles.max():.0f}"
    assert angles in curves(analysis, spans)
    for draw in (layer_strip, curves):
        assert draw(None, spans) == ""


def test_images_are_decoded_within_bounds(tmp_path):
    path = tmp_path / "image.png"
    noise(0, (10, 20)).save(path)
    image = read_upload(path, max_pixels=200)
    assert image.mode == "RGB" and np.array_equal(image, noise(0, (10, 20)))
    with pytest.raises(ValueError, match=r"or has more than 0.000199 million pixels"):
        read_upload(path, max_pixels=199)
    Image.new("RGB", (12, 9)).save(path, "EPS")  # decoding it would start Ghostscript
    with pytest.raises(ValueError, match="broken, no image, or .* Upload a PNG, JPEG"):
        read_upload(path, max_pixels=1000)
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    noise(0, (10, 20)).save(path, exif=turned)
    assert read_upload(path, max_pixels=1000).size == (10, 20)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_damaged_images_are_refused_in_words(tmp_path, kind):
    file = io.BytesIO()
    noise(0, (40, 40)).save(file, kind)
    generator, path = np.random.default_rng(0), tmp_path / "file"
    refused = 0
    for _ in range(50):
        damaged = bytearray(file.getvalue()[: generator.integers(1, len(file.getvalue()))])
        for position in generator.integers(0, min(100, len(damaged)), size=3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_upload(path, max_pixels=10_000)
        except ValueError as error:
            assert str(error).startswith("This file can't be shown")
            refused += 1
    assert refused > 25


def test_pairs_that_do_not_fit_are_named(teacher, plain_teacher, folders, tmp_path):
    raptor = tiny_raptor(teacher)
    with pytest.raises(ValueError, match="register tokens: 0 in the teacher, 2 in the Raptor"):
        check_pair(plain_teacher, raptor)
    teacher.config.num_hidden_layers = 7
    teacher.config.hidden_size = 30
    message = "layers: 7 in the teacher, 6 in the Raptor; channels: 30 in the teacher, 24 in the"
    with pytest.raises(ValueError, match=message):
        check_pair(teacher, tiny_raptor(tiny_teacher()))
    with pytest.raises(ValueError, match="not a Raptor"):
        check_pair(raptor, raptor)
    with pytest.raises(ValueError, match="must be a Raptor; .* of type 'dinov2_with_registers'"):
        load_pair(str(folders / "teacher"), str(folders / "teacher"))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no model.*safetensors"):
        model_folder(str(tmp_path))


def test_a_raptor_without_a_head_and_a_teacher_with_one(folders):
    pair = load_pair(
        str(folders / "bare_raptor"), str(folders / "teacher"),
        teacher_head=str(folders / "head.safetensors"),
    )  # fmt: skip
    analysis = analyse(pair, noise(0))
    assert analysis.raptor_top == {}
    assert list(analysis.teacher_top)[0].startswith("LABEL_") and len(analysis.teacher_top) == 5
