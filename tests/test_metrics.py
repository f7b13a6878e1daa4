import evaluate
import numpy as np
import pytest
import torch

from raptor_hf.metrics import (
    Accuracy,
    DepthError,
    MeanIoU,
    RSquared,
    depth_statistics,
    label_ranks,
    r2_reference,
    segmentation_statistics,
    state_statistics,
)
from tests.programs import ROOT

GROUPS = {"cls": slice(0, 1), "patches": slice(1, None)}


def r_squared(batches):
    metric = RSquared(keep_in_memory=True)
    for prediction, target in batches:
        metric.add_batch(**state_statistics(prediction=prediction, target=target, groups=GROUPS))
    return metric.compute()


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 3, 1, 2, 5, 4, 6], [1, 0, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0]])
    rows = label_ranks(logits=logits, labels=torch.tensor([0, 0, 1]))
    assert rows == {"rank": [6, 0, 1]}  # of the two equal ones the first wins, as in argmax
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(**rows)
    metric.add_batch(rank=[4])
    assert metric.compute() == {"accuracy": 0.25, "top5": 0.75}
    with pytest.raises(ValueError, match="classes from 0 to 6; got 0 … 7"):
        label_ranks(logits=logits, labels=torch.tensor([0, 7, 1]))


def test_mean_iou_by_hand_and_in_two_parts():
    target = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 2, 0]]])
    prediction = torch.tensor([[[0, 1, 1, 0]], [[1, 2, 2, 0]]])
    parts = [
        segmentation_statistics(prediction=p[None], target=t[None], num_classes=4)
        for p, t in zip(prediction, target, strict=True)
    ]
    metric = MeanIoU(keep_in_memory=True)
    for part in parts:
        metric.add_batch(**part)
    result = metric.compute()
    # class 0: 2 of 3 (the ignored pixel does not count), 1: 2 of 4, 2: 1 of 2, 3: nowhere
    assert result["iou"][:3] == [2 / 3, 2 / 4, 1 / 2] and result["iou"][3] is None
    assert result["miou"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert result["pixel_accuracy"] == 5 / 7
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        segmentation_statistics(prediction=prediction, target=target, num_classes=2)


def test_depth_errors_equal_ten_lines_of_numpy():
    rng = np.random.default_rng(0)
    target = rng.uniform(0.5, 10, size=(3, 4, 6))
    prediction = target * rng.uniform(0.5, 1.9, size=target.shape)
    valid = rng.random(target.shape) < 0.7
    target[~valid] = 0
    valid[2] = False  # an image without any valid pixel
    metric = DepthError(keep_in_memory=True)
    for part in (slice(0, 2), slice(2, 3)):
        arrays = {"prediction": prediction, "target": target, "valid": valid}
        rows = {name: torch.from_numpy(array[part]) for name, array in arrays.items()}
        metric.add_batch(**depth_statistics(**rows))
    p, t = prediction[valid], target[valid]
    expected = {
        "rmse_m": np.mean((p - t) ** 2) ** 0.5,
        "abs_rel": np.mean(abs(p - t) / t),
        "log10": np.mean(abs(np.log10(p) - np.log10(t))),
        **{f"delta{n}": np.mean(np.maximum(p / t, t / p) < 1.25**n) for n in (1, 2, 3)},
    }
    assert metric.compute() == pytest.approx(expected)
    with pytest.raises(ValueError, match="No pixel has a valid depth"):
        metric.compute(**depth_statistics(**rows))  # of the last image


def test_metrics_load_by_folder():
    loaded = evaluate.load(str(ROOT / "evaluation" / "metrics" / "accuracy"))
    assert loaded.compute(rank=[0, 3, 9, 0]) == {"accuracy": 0.5, "top5": 0.75}
    for folder, name in (("mean_iou", "MeanIoU"), ("depth", "DepthError"), ("r2", "RSquared")):
        loaded = evaluate.load(str(ROOT / "evaluation" / "metrics" / folder))
        assert type(loaded).__name__ == name


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


@pytest.mark.parametrize("images", [1, 4])
def test_a_group_without_variance_has_no_r2(images):
    """The cls token of one image, or of equal ones: rounding must not decide."""
    torch.manual_seed(0)
    target = torch.randn(1, 3, 5, 384).repeat(images, 1, 1, 1)
    result = r_squared([(target + 0.1, target)])
    assert result["layers"]["cls"] == [None, None] and result["mean"]["cls"] is None
    assert result["layers"]["all"] == result["layers"]["patches"]
    assert 0.9 < result["mean"]["all"] < 1


def test_metrics_make_no_folder_in_the_users_cache(monkeypatch):
    monkeypatch.setattr("os.makedirs", None)
    assert Accuracy(keep_in_memory=True).compute(rank=[0]) == {"accuracy": 1.0, "top5": 1.0}


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
    with pytest.raises(ValueError, match="must have the same shape"):
        r2_reference(prediction=prediction, target=target[:, :1])
