"""The demo: what it shows of an image, and the page over HTTP."""

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from evaluation.demo.__main__ import build_page, load_pair, show
from raptor_hf.dynamics.measures import angles
from raptor_hf.teachers import trajectory
from tests.helpers import SIZES, noise, save_models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = save_models(tmp_path_factory.mktemp("demo"))
    return load_pair(str(folder / "teacher"), str(folder / "raptor"))


@torch.no_grad()
def test_the_page_shows_the_states_of_both_models(pair):
    seen, teacher, raptor, figure, no_classes, classes = show(pair, noise(3), 0)
    assert np.array_equal(np.asarray(seen)[::30, ::30], np.asarray(noise(3)))  # 8×8 already
    assert np.array_equal(teacher, raptor)  # the embeddings are the teacher's
    _, teacher, raptor, *_ = show(pair, noise(3), 6)
    assert not np.array_equal(teacher, raptor)
    pixels = pair.processor(noise(3), return_tensors="pt")["pixel_values"]
    for line, model in zip(figure.axes[0].lines, (pair.teacher, pair.raptor), strict=True):
        cls = trajectory(model, pixels)[0, :, 0].double()
        np.testing.assert_allclose(line.get_ydata(), angles(cls[:-1], cls[1:]), atol=1e-3)
    assert no_classes is None and len(classes) == 5 and list(classes)[0].startswith("kind ")
    assert show(pair, None, 3) == [None] * 6


def test_a_teacher_of_another_size_is_refused(tmp_path):
    folder = save_models(tmp_path)
    config = Dinov2Config(**{**SIZES, "num_hidden_layers": 5})
    Dinov2Model(config).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"got \(5, 24\) in the teacher .*, \(6, 24\)"):
        load_pair(str(tmp_path / "short"), str(folder / "raptor"))


def test_the_page_answers_over_http(pair, tmp_path):
    noise(5, (200, 300)).save(tmp_path / "upload.png")
    page = build_page(pair, [noise(0)])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False, download_files=str(tmp_path))
        found = client.predict(handle_file(tmp_path / "upload.png"), 6, api_name="/show")
    finally:
        page.close()
    expected = show(pair, noise(5, (200, 300)), 6)
    with Image.open(found[1]) as teacher:
        assert np.abs(np.asarray(teacher.convert("RGB"), int) - np.asarray(expected[1])).max() < 40
    assert found[5]["label"] == list(expected[5])[0]
