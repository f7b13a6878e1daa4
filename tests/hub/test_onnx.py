"""ONNX files beside a model: equal to PyTorch in onnxruntime, and in transformers.js in node."""

import functools
import json
import shutil
import subprocess
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import onnx
import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, CLIPConfig, CLIPModel
from transformers import Dinov2WithRegistersForImageClassification as TeacherClassifier

from model_cards.export import SUFFIXES, main, run_onnx
from raptor_hf import load_raptorized, raptorize, save_raptorized
from raptor_hf.data import make_processor
from raptor_hf.dynamics.measures import angles
from raptor_hf.runs.files import read_json
from tests.helpers import SIZES, noise, save_models
from tests.programs import ROOT

NODE_MODULES = ROOT / "evaluation" / "demo" / "node_modules"
CLASSES = {"bare_raptor": AutoModel, "raptor": AutoModelForImageClassification}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bare Raptor of 6 layers and one with a classifier, exported in all precisions."""
    folder = save_models(tmp_path_factory.mktemp("onnx"))
    for name, model_class in CLASSES.items():
        # weights of 0.3 double every error of a product
        model = model_class.from_pretrained(folder / name)
        for parameter in model.base_model.blocks.parameters():
            parameter.data.mul_(0.4)
        model.save_pretrained(folder / name)
        main(["--model", str(folder / name)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_files_follow_pytorch_and_store_shared_weights_once(folder, name):
    account = read_json(folder / name / "export.json")
    assert [*account["files"]] == [f"onnx/model{suffix}.onnx" for suffix in SUFFIXES.values()]
    for file, facts in account["files"].items():
        assert facts["bytes"] == (folder / name / file).stat().st_size
    losses = [1 - facts["r2"] for facts in account["files"].values()]
    assert losses[0] < 1e-5 and losses[1] < 1e-3 and losses[2] < 0.02 and losses[3] < 0.3

    # any number of images, the teacher's size and others
    model = CLASSES[name].from_pretrained(folder / name)
    for size in ((3, 3, 8, 8), (1, 3, 16, 12), (9, 3, 20, 24)):
        images = torch.randn(*size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = model(images)
        for key, found in run_onnx(folder / name / "onnx" / "model.onnx", images).items():
            torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-4)

    # four products in each application, all of them rounded; two blocks, each stored once
    rounded = 4 * 6 + (name == "raptor")
    for dtype, operator in {"int8": "MatMulInteger", "q4f16": "MatMulNBits"}.items():
        graph = onnx.load(folder / name / "onnx" / f"model{SUFFIXES[dtype]}.onnx").graph
        assert Counter(node.op_type for node in graph.node)[operator] == rounded
        assert not any(node.metadata_props for node in graph.node)
    constants = [tensor.name for tensor in graph.initializer if tensor.name.endswith("_Q4")]
    assert len(constants) == len(set(constants)) == 4 * 2 + (name == "raptor")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_transformers_js_gives_what_pytorch_gives(folder, name):
    if not shutil.which("node") or not NODE_MODULES.is_dir():
        pytest.skip("needs node, and npm install --ignore-scripts in evaluation/demo")
    noise(3).save(folder / "image.png")
    program = ROOT / "tests" / "hub" / "transformers.mjs"
    command = ["node", program, NODE_MODULES, folder / name, folder / "image.png", *SUFFIXES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)

    # the image processor
    images = make_processor(8)(noise(3), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values(answers["pixel_values"]), images, rtol=0, atol=1e-5)

    # every precision equals the same file in onnxruntime, and float32 PyTorch
    model = CLASSES[name].from_pretrained(folder / name)
    with torch.no_grad():
        expected = model(images)
    for dtype, suffix in SUFFIXES.items():
        answer, file = answers[dtype], folder / name / "onnx" / f"model{suffix}.onnx"
        pipeline = answer.pop("pipeline")
        found = run_onnx(file, images)
        tolerance = 1e-4 if dtype == "fp32" else 0.05
        for key, tensor in found.items():
            torch.testing.assert_close(values(answer[key]), tensor, rtol=tolerance, atol=tolerance)
        if name == "bare_raptor":
            assert values(pipeline).equal(values(answer["last_hidden_state"]))
        else:
            best = int(values(answer["logits"]).argmax())
            assert pipeline[0]["label"] == model.config.id2label[best]
        if dtype == "fp32":
            for key in found:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


def values(answer):
    return torch.tensor(answer["data"]).reshape(answer["dims"])


@pytest.fixture(scope="module")
def states(folder):
    main(["--model", str(folder / "raptor"), "--states", "--dtypes", "fp32"])


@pytest.mark.slow
@torch.no_grad()
def test_the_states_of_all_layers_and_their_classes(folder, states):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = run_onnx(folder / "raptor" / "onnx" / "states.onnx", images)
    outputs = CLASSES["raptor"].from_pretrained(folder / "raptor")(
        images, output_hidden_states=True
    )
    expected = torch.stack(outputs.hidden_states, dim=1)
    torch.testing.assert_close(found["hidden_states"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["logits"][:, -1], outputs.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_page_shows_in_chromium_what_pytorch_computes(folder, states, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if not chromium or not NODE_MODULES.is_dir():
        pytest.skip("needs chromium, and npm install --ignore-scripts in evaluation/demo")
    for file in NODE_MODULES.parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model").unlink(missing_ok=True)
    (tmp_path / "model").symlink_to(folder / "raptor")
    (tmp_path / "sample.jpg").unlink()
    noise(3).save(tmp_path / "sample.jpg", format="PNG")  # of the model's own size, without loss

    # a page that asks for nothing but files of its own folder
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        playwright.sync_playwright() as driver,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url.removeprefix("blob:")))
        address = f"http://127.0.0.1:{server.server_port}/"
        page.goto(f"{address}?dtype=fp32")
        page.wait_for_selector("body[data-done]", timeout=100_000)
        texts = "cells => cells.map(cell => Number(cell.textContent))"
        turns = page.eval_on_selector_all("#table td:last-child", texts)
        likeliest = page.inner_text("#likeliest li")
        browser.close()
        server.shutdown()
    assert all(url.startswith(address) for url in asked)

    # degrees by which each layer turns cls, and the class
    model = CLASSES["raptor"].from_pretrained(folder / "raptor")
    images = make_processor(8)(noise(3), return_tensors="pt")["pixel_values"]
    outputs = model(images, output_hidden_states=True)
    cls = torch.stack(outputs.hidden_states)[:, 0, 0].double()
    shown = torch.tensor(turns).double()
    torch.testing.assert_close(shown, angles(cls[:-1], cls[1:]), rtol=0, atol=0.02)
    best = int(outputs.logits.argmax())
    share = 100 * float(outputs.logits.softmax(-1).max())
    assert likeliest.strip() == f"{model.config.id2label[best]}, {share:.0f} %"


@pytest.mark.slow
@torch.no_grad()
def test_a_raptorized_classifier(teacher, tmp_path):
    config = teacher.config
    config.num_labels = 3
    save_raptorized(raptorize(TeacherClassifier(config).eval(), phases=[4, 2]), tmp_path)
    make_processor(8).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--dtypes", "fp32"])
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = run_onnx(tmp_path / "onnx" / "model.onnx", images)["logits"]
    torch.testing.assert_close(found, load_raptorized(tmp_path)(images).logits)


def test_what_cannot_be_exported_says_so(tmp_path):
    folder = save_models(tmp_path)
    with pytest.raises(ValueError, match="holds a Dinov2WithRegistersModel; give a Raptor"):
        main(["--model", str(folder / "teacher")])
    vision = {key: SIZES[key] for key in SIZES if key != "layerscale_value"}
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 9}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    save_raptorized(raptorize(model, phases=[4, 2]), tmp_path / "clip")
    make_processor(8).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="A CLIPModel needs more than images"):
        main(["--model", str(tmp_path / "clip")])
