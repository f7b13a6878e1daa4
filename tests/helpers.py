"""What is compared exactly, and what is not: weights and files are, outputs of kernels are not."""

import torch


def assert_same_outputs(actual, expected, tolerance=3e-6):
    """Compare what kernels computed: tensors, or tuples, lists and dicts of them (ModelOutputs).

    A processor's library chooses a kernel by address and shape, and each kernel rounds in its own
    way. Weights that are mapped from a file lie at other addresses than weights that torch
    allocated, so equal weights may give outputs that differ in the last bits. The tolerance is a
    share of the largest absolute value of each expected tensor: errors of 1e-7 in every product
    grow to 1e-6 in the logits of a small model. Whole numbers must be equal.
    """
    if isinstance(expected, torch.Tensor):
        largest = expected.detach().abs().max().item() if expected.is_floating_point() else 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_outputs(actual[name], value, tolerance)
    else:
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_outputs(one, other, tolerance)
