"""A GPU against the CPU: `bash tests/run.sh -m gpu` on a machine that has one; skipped elsewhere.

All other tests run on the CPU, whatever the machine has (`tests/conftest.py`).
"""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from raptor_hf import make_raptor
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.activations.store import load_activations
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.distillation.training import train_chains
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.loop.fit import fit
from raptor_hf.loop.graphs import StepGraphs
from raptor_hf.loop.log import read_log
from raptor_hf.loop.scalars import StepResult
from raptor_hf.modeling_raptor import rotary_angles
from raptor_hf.runs.files import read_json
from raptor_hf.teachers import trajectory
from tests.families import PIXELS, tiny_model
from tests.helpers import (
    Killed,
    arguments,
    assert_same_outputs,
    compute_loss,
    noisy_network,
    tiny_raptor,
    tiny_teacher,
)
from tests.programs import run

DEVICE = os.environ.get("TESTS_GPU_DEVICE", "cuda")  # cpu: to try these tests themselves
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU, and `bash tests/run.sh -m gpu`",
    ),
]
FAMILIES = ["dinov2_with_registers", "dinov3_vit", "siglip_vision_model"]


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32, which convolutions take of themselves: products have 24 bits, as on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def moved(outputs):
    return [tensor.detach().cpu() for tensor in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients(family):
    teacher = tiny_model(family)
    raptor = make_raptor(teacher, [2, 1], init="teacher")
    states, losses, gradients = [], [], []
    for device in ("cpu", DEVICE):
        teacher.to(device)
        raptor.to(device).zero_grad()
        images = PIXELS.to(device)
        target = trajectory(teacher, images)
        module = TrajectoryMatching(
            [chain_of(raptor, None)],
            ObjectiveArguments(objective="autoregressive"),
            token_layout(teacher.config).groups(),
            angles=rotary_angles(teacher, (16, 16)),
        )
        loss = sum(chain.loss for chain in module(target, 0.9).values())
        loss.backward()
        with torch.no_grad():
            states.append(moved([target, raptor.trajectory(images)]))
        losses.append(loss.item())
        gradients.append(moved(w.grad for w in raptor.blocks.parameters()))
    for name, found, expected in zip(("teacher", "raptor"), *reversed(states), strict=True):
        for layer, pair in enumerate(zip(found.unbind(1), expected.unbind(1), strict=True)):
            error = (pair[0] - pair[1]).abs().max() / pair[1].abs().max()
            assert error < 1e-4, f"{name}, layer {layer}: {error:.1e}"
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_same_outputs(gradients[1], gradients[0], 1e-3)


@pytest.mark.parametrize("family", ["dinov2", "vit", "dinov3_vit", "clip_vision_model"])
def test_a_teacher_on_a_gpu_that_leaves_bits_out_can_teach(family):
    """The check of what is taken over must not take TF32 for another model."""
    teacher = tiny_model(
        family, hidden_size=384, num_attention_heads=6, image_size=112, patch_size=14
    )
    for weight in teacher.parameters():
        weight *= 0.1  # as large as of a real one
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            raptor = make_raptor(teacher.to(DEVICE), [2, 1], init="teacher")
    finally:
        torch.set_float32_matmul_precision(precision)
    assert raptor.device.type == "cpu"


@torch.no_grad()
def test_bfloat16_is_near():
    raptor = tiny_raptor(tiny_teacher())
    images = torch.randn(4, 3, 8, 8)
    expected = raptor.trajectory(images)
    raptor.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = raptor.trajectory(images.to(DEVICE)).float().cpu()
    error, size = ((t.square().mean(dim=(0, 2, 3))) for t in (found - expected, expected))
    error = (error / size).sqrt()  # of every layer
    assert error.max() < 0.05, error


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}])
def test_compiled_blocks_are_the_plain_ones(options):
    raptor = tiny_raptor(tiny_teacher()).to(DEVICE)
    images = torch.randn(4, 3, 8, 8, device=DEVICE)
    expected = raptor(images).last_hidden_state.clone()
    torch._dynamo.reset()
    raptor.compile_blocks(**options)
    for _ in range(3):  # CUDA graphs are recorded in the second run
        found = raptor(images).last_hidden_state.clone()
        assert_same_outputs(found, expected, 1e-4)


def test_nothing_is_waited_for_within_a_step(data, tmp_path):
    def watched(module, batch, progress):
        step = round(progress * 12)
        if DEVICE == "cuda":  # not the first steps, which allocate, nor the last, which is read
            torch.cuda.set_sync_debug_mode("error" if 3 <= step < 11 else "default")
        return StepResult(compute_loss(module, batch, progress).loss)

    settings = {"log_every": 0, "checkpoint_every": 0}
    try:
        fit(noisy_network(), data, watched, arguments(tmp_path, **settings))
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", ["no", "inductor"])
def test_recorded_steps_are_the_plain_ones(tmp_path, monkeypatch, compile):
    """As CUDA graphs, over the change from single phases to whole rollouts; and the same again."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", compile)
    torch._dynamo.reset()
    teacher = tiny_teacher().to(DEVICE)
    processor = make_processor(teacher.config.image_size)
    views = {"views": 4, "plain_first": False}
    activations = OnlineActivations(
        teacher, ImageViews(load_images("digits", "train"), processor, **views)
    )
    recorded, record = [], StepGraphs._record
    monkeypatch.setattr(
        StepGraphs, "_record", lambda self, *a: (recorded.append(a[1]), record(self, *a))[1]
    )

    def trained(name, **changes):
        torch.manual_seed(0)
        raptor = make_raptor(teacher, [4, 2], init="teacher")
        settings = {"steps": 20, "batch_size": 8, "optimizer": "muon", "num_workers": 1, **changes}
        run = LoopArguments(
            output_dir=str(tmp_path / name), report_to="none", log_every=1, checkpoint_every=8,
            warmup_steps=1, **settings,
        )  # fmt: skip
        objective = ObjectiveArguments(
            objective="autoregressive", normalize="group", phase_fraction=0.5
        )
        train_chains([chain_of(raptor, None)], teacher, activations, objective, run)
        return raptor.blocks.state_dict(), read_log(run.output_dir)

    plain, plain_log = trained("plain")
    fast, log = trained("fast", cuda_graphs=True)
    assert [round(20 * progress) for progress in recorded] == ([3, 13] if DEVICE == "cuda" else [])
    again, _ = trained("again", cuda_graphs=True)
    for name, weight in fast.items():
        assert torch.equal(weight, again[name]), name
    for ours, theirs in zip(log, plain_log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["train/r2"] == pytest.approx(theirs["train/r2"], rel=1e-3, abs=1e-3)
    assert_same_outputs(fast, plain, 1e-3)


def test_a_killed_run_goes_on_bit_by_bit(data, tmp_path):
    def killed(module, batch, progress):
        if round(progress * 12) == 8:
            raise Killed
        return compute_loss(module, batch, progress)

    whole = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(noisy_network(), data, killed, arguments(tmp_path / "parts"))
    parts = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "parts"))
    for name, weight in whole.state_dict().items():
        assert weight.device.type == DEVICE
        assert torch.equal(weight, parts.state_dict()[name]), name


def test_the_programs_find_what_they_find_on_the_cpu(tmp_path):
    teacher = tiny_model("dinov2")
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(16).save_pretrained(tmp_path / "teacher")

    def line(device):
        out = tmp_path / device
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}

        def program(name, *options):
            base = ("--teacher", tmp_path / "teacher")
            run(sys.executable, name, *base, *options, new_process=True, **hidden)

        digits = ("--dataset", "digits", "--split", "train")
        program("training/extract_activations.py", *digits, "--views", 1,
                "--output_dir", out / "store")  # fmt: skip
        learn = ("--phases", 2, 1, "--batch_size", 16, "--steps", 20, "--warmup_steps", 2,
                 "--report_to", "none")  # fmt: skip
        for source, options in (("online", digits), (out / "store", ())):
            program("training/distill_raptor.py", "--activations", source, *options, *learn,
                    "--output_dir", out / f"raptor_{len(options)}")  # fmt: skip
        program("evaluation/probe.py", "--task", "classification", "--dataset", "digits",
                "--models", f"raptor={out / 'raptor_0'}", "--steps", 40, "--warmup_steps", 2,
                "--batch_size", 64, "--output_dir", out / "probe")  # fmt: skip
        return out

    expected, found = line("cpu"), line(DEVICE)
    rows = list(range(16))
    ours, theirs = (
        load_activations(out / "store").__getitems__(rows)["states"] for out in (found, expected)
    )
    assert_same_outputs(ours.float(), theirs.float(), 2e-3)  # float16
    for name in ("raptor_0", "raptor_4"):
        ours, theirs = (load_file(out / name / "model.safetensors") for out in (found, expected))
        assert_same_outputs(ours, theirs, 2e-2)
    ours, theirs = (
        read_json(out / "probe" / "results" / "raptor_classification.json")["metrics"]["accuracy"]
        for out in (found, expected)
    )
    assert abs(ours - theirs) < 0.05
