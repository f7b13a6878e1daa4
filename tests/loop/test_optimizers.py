"""Muon: which matrices it takes, an update by hand, `torch.optim.Muon` beside it, resume."""

import pytest
import torch

from raptor_hf import make_raptor
from raptor_hf.activations.store import load_activations
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import Chain, Span
from raptor_hf.distillation.compute import optimizer_flops
from raptor_hf.distillation.matching import TrajectoryMatching, matching_loss
from raptor_hf.loop import fit, newest_checkpoint
from raptor_hf.loop.optimizers import Muon, layer_matrices, make_optimizers, trained_parameters
from tests.helpers import Killed, arguments, randomised


def chain_of(teacher):
    raptor = randomised(make_raptor(teacher, [4, 2]))
    spans = [Span(b, *s) for b, s in zip(raptor.blocks, raptor.config.spans(), strict=True)]
    objective = ObjectiveArguments(objective="autoregressive")
    groups = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}
    return TrajectoryMatching([Chain(spans, None)], objective, groups)


def test_muon_takes_the_matrices_of_attention_and_ffn_alone(teacher):
    module = chain_of(teacher)
    taken = {id(matrix) for matrix in layer_matrices(module)}
    names = {name.split(".", 2)[2] for name, p in module.named_parameters() if id(p) in taken}
    linear = ("attention.qkv", "attention.proj", "ffn.fc1", "ffn.fc2")
    assert names == {f"{name}.weight" for name in linear} and len(taken) == 8


def test_other_parameters_learn_by_adamw_at_an_eighth_of_the_rate(teacher, tmp_path):
    module = chain_of(teacher)
    settings = arguments(tmp_path, optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    groups = [{"params": trained_parameters(module)}]
    muon, adamw = make_optimizers(module, groups, settings, torch.float32)
    before = [p.detach().clone() for p in adamw.param_groups[0]["params"]]
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    adamw.step()
    for old, new in zip(before, adamw.param_groups[0]["params"], strict=True):
        # AdamW's first update is the sign of the gradient
        expected = 0.01 / 8 * new.grad.sign()
        torch.testing.assert_close(old - new.detach(), expected, rtol=1e-3, atol=1e-6)
    assert len(muon.param_groups[0]["params"]) == 8 and muon.param_groups[0]["lr"] == 0.01


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch's own Muon came with 2.9")
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_muon_is_torchs_own(products):
    """Three matrices of each of four shapes, one of them without a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 72), (24, 24), (96, 24), (24, 96)] * 3
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon(ours, products=products, **options)
    torchs = torch.optim.Muon(theirs, momentum=0.9, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        muon.step()
        torchs.step()
        for mine, other in zip(ours, theirs, strict=True):  # torch's computes in bfloat16
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)


def test_resume_with_muon_equals_uninterrupted_bit_for_bit(teacher, store, tmp_path):
    activations = load_activations(store)
    compute_loss = matching_loss(activations)

    def killed(module, batch, progress):
        if round(progress * 12) == 8:
            raise Killed
        return compute_loss(module, batch, progress)

    def train(folder, loss):
        settings = arguments(tmp_path / folder, optimizer="muon", batch_size=4)
        return fit(chain_of(teacher), activations, loss, settings)

    whole = train("whole", compute_loss)
    with pytest.raises(Killed):
        train("parts", killed)
    assert newest_checkpoint(tmp_path / "parts").name == "step_00000005"
    parts = train("parts", compute_loss)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name


def test_flops_of_an_update_by_hand(teacher):
    config = make_raptor(teacher, [4, 2]).config
    # 24 × 72, 24 × 24 and twice 24 × 96; two products with n columns and one square, five times
    products = [5 * (2 * 2 * 24 * 24 * n + 2 * 24**3) for n in (72, 24, 96, 96)]
    assert optimizer_flops("muon", config, 2) == 2 * sum(products)
    assert optimizer_flops("adamw", config, 2) == 0
