"""ONNX files beside a model: equal to PyTorch in onnxruntime, and in transformers.js in node."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)
from transformers import Dinov2WithRegistersForImageClassification as TeacherClassifier

from model_cards import measure
from model_cards.export import SUFFIXES, compare, export, main, run_onnx, run_torch, takes_sizes
from model_cards.measure import can_browse, chromium, show_sample
from model_cards.publish import make_site
from raptor_hf import load_raptorized, make_raptor, raptorize, save_raptorized
from raptor_hf.configuration_raptor import TEACHER_FAMILIES
from raptor_hf.data import make_processor
from raptor_hf.dynamics.measures import angles
from raptor_hf.runs.files import read_json
from tests.families import tiny_model
from tests.helpers import SIZES, assert_same_outputs, noise, save_models
from tests.hub_server import hub_server
from tests.pages import block, replaced
from tests.programs import ROOT

NODE_MODULES = ROOT / "evaluation" / "demo" / "node_modules"
TRANSFORMERS_JS = NODE_MODULES / "@huggingface" / "transformers" / "dist"
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

    # the lines of docs/deploy.md
    if name == "raptor":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            place = "outputs/digits/seed_0/classification/models/raptor_k3"
            exec(replaced(block("docs/deploy.md", "session"), {place: folder / name}), {})
        assert printed.getvalue() == "(2, 10)\n"

    # four products in each application, all of them rounded; two blocks, each stored once
    rounded = 4 * 6 + (name == "raptor")
    for dtype, operator in {"int8": "MatMulInteger", "q4f16": "MatMulNBits"}.items():
        graph = onnx.load(folder / name / "onnx" / f"model{SUFFIXES[dtype]}.onnx").graph
        assert Counter(node.op_type for node in graph.node)[operator] == rounded
        assert not any(node.metadata_props for node in graph.node)
    constants = [tensor.name for tensor in graph.initializer if tensor.name.endswith("_Q4")]
    assert len(constants) == len(set(constants)) == 4 * 2 + (name == "raptor")


def in_node(place, folder, *dtypes):
    """What transformers.js gives for a model and an image of noise; no test where it is not."""
    if not shutil.which("node") or not TRANSFORMERS_JS.is_dir():
        pytest.skip("needs node, and npm install --ignore-scripts in evaluation/demo")
    noise(3).save(folder / "image.png")
    program = ROOT / "tests" / "hub" / "transformers.mjs"
    command = ["node", program, NODE_MODULES, place, folder / "image.png", *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_transformers_js_gives_what_pytorch_gives(folder, name):
    answers = in_node(folder / name, folder, *SUFFIXES)

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


@pytest.mark.slow
def test_transformers_js_pulls_a_repository_that_was_pushed(folder, tmp_path):
    # pushed and pulled by the lines of docs/hub.md
    names = {"outputs/digits/seed_0/classification/models": folder, "raptor_k3": "raptor"}
    names |= {"NAME": "user", "hf ": f"{Path(sys.executable).with_name('hf')} "}
    command = replaced(block("docs/hub.md", "hf"), names)
    with hub_server() as hub:
        environment = hub.environment(tmp_path)
        subprocess.run(["bash", "-ec", command], env=environment, check=True, cwd=tmp_path)
        [file] = tmp_path.glob("raptor/onnx/*")
        assert file.read_bytes() == (folder / "raptor" / "onnx" / "model_q4f16.onnx").read_bytes()
        pulled = in_node(f"{hub.url}/user/raptor", tmp_path, "fp32", "q4f16")
        assert pulled == in_node(folder / "raptor", tmp_path, "fp32", "q4f16")

        # the lines of docs/deploy.md
        library = str(TRANSFORMERS_JS / "transformers.node.mjs")
        names = {"@huggingface/transformers": library, "NAME/raptor_k3": "user/raptor"}
        names["photo.jpg"] = tmp_path / "image.png"
        settings = f"import {{ env }} from '{library}';\nenv.cacheDir = '{tmp_path}/cache';\n"
        settings += f"env.remoteHost = '{hub.url}/';\n"
        code = settings + replaced(block("docs/deploy.md", "pull"), names)
        command = ["node", "--input-type=module", "-e", code]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("[ 1, 10 ] [") and pulled["q4f16"]["pipeline"][0]["label"] in printed


@pytest.fixture(scope="module")
def states(folder):
    main(["--model", str(folder / "raptor"), "--states", "--dtypes", "fp32", "q4f16"])


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
    if not can_browse():
        pytest.skip("needs playwright, Chromium, and npm install in evaluation/demo")
    make_site(tmp_path, {"model": folder / "raptor"})
    (tmp_path / "sample.jpg").unlink()
    noise(3).save(tmp_path / "sample.jpg", format="PNG")  # of the model's own size, without loss

    # the states and what is shown of them; nothing is asked for but files of the page's own folder
    found, shown = {}, {}
    with chromium(tmp_path) as (page, address, asked):
        for dtype in ("q4f16", "fp32"):
            show_sample(page, f"{address}?dtype={dtype}")
            data = "import('./page.js').then(page => [...page.shown.states.data])"
            found[dtype] = torch.tensor(page.evaluate(data)).reshape(7, -1, 24)
            texts = "cells => cells.map(cell => Number(cell.textContent))"
            shown[dtype] = page.eval_on_selector_all("#table td:last-child", texts)
        likeliest = page.inner_text("#likeliest li").strip()
    assert all(url.startswith(address) for url in asked)

    # float32 is PyTorch's; the states of 4 bits lose what export.json says
    model = CLASSES["raptor"].from_pretrained(folder / "raptor")
    images = make_processor(8)(noise(3), return_tensors="pt")["pixel_values"]
    outputs = model(images, output_hidden_states=True)
    expected = torch.stack(outputs.hidden_states).squeeze(1)
    torch.testing.assert_close(found["fp32"], expected, rtol=1e-4, atol=1e-4)
    stated = read_json(folder / "raptor" / "export.json")["files"]["onnx/states_q4f16.onnx"]["r2"]
    lost = compare({"states": found["q4f16"]}, {"states": expected})["r2"]
    assert lost == pytest.approx(stated, abs=0.01)

    # degrees by which each layer turns cls, and the class
    turns = angles(expected[:-1, 0].double(), expected[1:, 0].double())
    torch.testing.assert_close(torch.tensor(shown["fp32"]).double(), turns, rtol=0, atol=0.02)
    best = int(outputs.logits.argmax())
    share = 100 * float(outputs.logits.softmax(-1).max())
    assert likeliest == f"{model.config.id2label[best]}, {share:.0f} %"


@pytest.mark.slow
def test_files_are_measured_beside_the_teachers(tmp_path, monkeypatch):
    folder = save_models(tmp_path)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    dtypes = {"fp32": "", "q4f16": "_q4f16"}
    monkeypatch.setattr(measure.export, "SUFFIXES", dtypes)
    models = f"raptor_k2={folder / 'bare_raptor'}"
    words = ["--teacher", folder / "teacher", "--models", models, "--output_dir", tmp_path]
    measure.main([str(word) for word in words])
    found = read_json(tmp_path / "onnx.json")
    assert found["files"].keys() == {"teacher", "raptor_k2"}
    for files in found["files"].values():
        assert files.keys() == dtypes.keys()
        for facts in files.values():
            assert facts["milliseconds"] > 0 and facts["r2"] > 0.7
            assert ("milliseconds_in_chromium" in facts) == can_browse()
    small, large = (found["files"][name]["q4f16"]["bytes"] for name in ("raptor_k2", "teacher"))
    assert small < large


@pytest.mark.slow
@pytest.mark.parametrize("family", TEACHER_FAMILIES)
@torch.no_grad()
def test_every_family_is_exported(family, tmp_path):
    model = make_raptor(tiny_model(family), [2, 1]).eval().requires_grad_(False)
    sizes = [(16, 16), (24, 20), (12, 28)] if takes_sizes(model, model.config) else [(16, 16)]
    images = [torch.randn(3, 3, *size) for size in sizes]
    expected = [run_torch(model, one) for one in images]
    graph = export(model, model.config, list(expected[0]))
    onnx.save(graph, tmp_path / "model.onnx")
    for one, outputs in zip(images, expected, strict=True):
        for name, found in run_onnx(tmp_path / "model.onnx", one).items():
            assert_same_outputs(found, outputs[name], 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_matrices_of_four_bits_are_stored_as_they_are(tmp_path):
    """Weights of `--quantize 4`: −8 … 7 times a float16 scale for every 32 inputs."""
    torch.manual_seed(0)
    config = Dinov2Config(**SIZES | {"hidden_size": 32, "num_attention_heads": 2})
    model, learnt = make_raptor(Dinov2Model(config), [4, 2]), set()
    for layer in model.blocks.modules():
        if type(layer) is torch.nn.Linear:
            integers = torch.randint(-8, 8, (layer.out_features, layer.in_features // 32, 32))
            integers[:, :, 5] = -8
            scales = (0.01 + 0.02 * torch.rand(integers.shape[:2])).half()
            layer.weight.copy_((integers * scales[..., None].float()).flatten(1))
            learnt.add(tuple(layer.weight.flatten().tolist()))
    model.save_pretrained(tmp_path)
    make_processor(8).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--dtypes", "q4f16"])

    graph = onnx.load(tmp_path / "onnx" / "model_q4f16.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stored = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            packed, scales = (torch.tensor(constants[name]) for name in node.input[1:3])
            integers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2) - 8.0
            matrix = integers * scales.reshape(*integers.shape[:2], 1).float()
            stored.add(tuple(matrix.flatten().tolist()))
    assert stored == learnt and len(learnt) == 8


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
