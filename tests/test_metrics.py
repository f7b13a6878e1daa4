import numpy as np
import pytest
import torch

from raptor_hf.metrics import Accuracy, RSquared, r2_reference, state_statistics

GROUPS = {"cls": slice(0, 1), "patches": slice(1, None)}


def r_squared(batches):
    metric = RSquared(keep_in_memory=True)
    for prediction, target in batches:
        metric.add_batch(**state_statistics(prediction=prediction, target=target, groups=GROUPS))
    return metric.compute()


def test_accuracy_by_hand():
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 2, 3], references=[1, 2, 0])
    metric.add_batch(predictions=[5], references=[5])
    assert metric.compute() == {"accuracy": 0.75}


def test_r_squared_by_hand():
    # one channel, one layer after the embeddings; cls 0 and 2 (mean 1), patches 1, 3, 1, 3 (mean 2)
    target = torch.tensor([[[0.0], [1.0], [3.0]], [[2.0], [1.0], [3.0]]])[:, None]
    prediction = target.clone()
    prediction[0, 0, 0] += 1.0  # cls: error 1 of a spread of 2
    prediction[1, 0, 2] += 1.0  # patches: error 1 of a spread of 4
    layer_0 = torch.randn(2, 1, 3, 1)
    result = r_squared([(torch.cat([layer_0, prediction], 1), torch.cat([layer_0, target], 1))])
    assert result["layers"]["cls"] == [pytest.approx(1 - 1 / 2)]
    assert result["layers"]["patches"] == [pytest.approx(1 - 1 / 4)]
    assert result["layers"]["all"] == [pytest.approx(1 - 2 / 6)]


def test_r_squared_equals_numpy_and_does_not_depend_on_batches():
    torch.manual_seed(0)
    target = torch.randn(7, 4, 5, 6) * torch.rand(6) + 3 * torch.randn(6)
    prediction = target + 0.3 * torch.randn_like(target)
    whole = r_squared([(prediction, target)])
    parts = r_squared([(prediction[:3], target[:3]), (prediction[3:], target[3:])])
    for group, tokens in GROUPS.items():
        expected = []
        for layer in range(1, 4):
            a = target[:, layer, tokens].double().numpy()
            error = ((prediction[:, layer, tokens].double().numpy() - a) ** 2).sum()
            expected.append(1 - error / ((a - a.mean(axis=(0, 1))) ** 2).sum())
        np.testing.assert_allclose(whole["layers"][group], expected, rtol=1e-9)
        np.testing.assert_allclose(parts["layers"][group], expected, rtol=1e-9)
        assert whole["mean"][group] == pytest.approx(np.mean(expected))


def test_the_references_r2_by_hand():
    # layer 0 (equal), layer 1; predictions 0, 4 and 2, 2: mean 2, spread 4 + 4; errors 1 and 0
    target = torch.tensor([[[[0.0], [4.0]], [[3.0], [2.0]]]])
    prediction = torch.tensor([[[[0.0], [4.0]], [[2.0], [2.0]]]])
    assert r2_reference(prediction=prediction, target=target) == pytest.approx(1 - 1 / 8)
    # it is not symmetric: the spread is the prediction's
    spread = (target - target.mean()).square().sum().item()
    assert r2_reference(prediction=target, target=prediction) == pytest.approx(1 - 1 / spread)
    with pytest.raises(ValueError, match="same trajectory shape"):
        r2_reference(prediction=prediction, target=target[:, :1])


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same trajectory shape"):
        state_statistics(
            prediction=torch.zeros(1, 4, 5, 6), target=torch.zeros(1, 5, 5, 6), groups=GROUPS
        )
