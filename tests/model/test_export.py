import onnxruntime
import pytest
import torch
from torch.export import Dim

from raptor_hf.modeling_raptor_heads import AUTO_CLASSES
from tests.helpers import make, tensors

# (batch, height, width) in pixels: two batch sizes, two resolutions, and the teacher's own
SIZES = [(2, 16, 12), (5, 16, 12), (2, 20, 24), (5, 20, 24)]
OWN = (3, 8, 8)


def exported(model):
    """One program for any number of images of any whole number of patches, but the teacher's own.

    At that size DINOv2 takes its positions as they are, elsewhere it interpolates them: another
    program. Only `strict` keeps the size of the interpolation a symbol.
    """
    rows, columns = Dim("rows", min=2, max=512), Dim("columns", min=2, max=512)
    shape = {0: Dim("batch"), 2: 4 * rows, 3: 4 * columns}
    images = torch.randn(2, 3, 16, 12)
    return torch.export.export(
        model, (images,), dynamic_shapes={"pixel_values": shape}, strict=True
    )


def images_of(size):
    batch, height, width = size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def largest_error(ours, theirs):
    """Of any value, as a share of the largest one of its tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("auto_class", [name for name in AUTO_CLASSES if name != "AutoModel"])
def test_programs_and_onnx_equal_the_models_around_a_raptor(auto_class, teacher, tmp_path):
    model = make(AUTO_CLASSES[auto_class], teacher).requires_grad_(False)
    program = exported(model)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in [*SIZES, OWN]:
        images = images_of(size)
        expected = list(tensors(model(images)).values())
        if size != OWN:
            assert largest_error(tensors(program.module()(images)).values(), expected) < 1e-4
        onnx = session.run(None, {"pixel_values": images.numpy()})
        assert largest_error(map(torch.from_numpy, onnx), expected) < 1e-4, size


def test_a_program_for_the_teachers_own_size(teacher, tmp_path):
    model = make(AUTO_CLASSES["AutoModel"], teacher).requires_grad_(False)
    shape = {"pixel_values": {0: Dim("batch")}}
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shape)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    for batch in (2, 5):
        images = images_of((batch, 8, 8))
        ours, theirs = tensors(again.module()(images)), tensors(model(images))
        assert largest_error(ours.values(), theirs.values()) < 1e-4
