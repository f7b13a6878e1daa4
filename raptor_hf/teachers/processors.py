"""Image processors: load one at a resolution, and the size of its images."""

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from ..configuration_raptor import tower_config
from ..modeling_raptor import pair


def load_processor(name_or_path: str, resolution: list[int] | None = None):
    """Load the image processor that belongs to a teacher or a Raptor.

    Args:
        resolution: height and width in pixels of its images; default: its own.

    Raises:
        OSError: there is none beside the model.
        ValueError: a resolution that is no multiple of the patch, or a processor that does not
            resize to a size or crop.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name_or_path} must bring its image processor (preprocessor_config.json); none was "
            "found. Save one beside the model with processor.save_pretrained."
        ) from error
    if not resolution:
        return processor
    # whole patches
    config = AutoConfig.from_pretrained(name_or_path)
    patches = pair(getattr(tower_config(config), "patch_size", None) or 1)
    if any(pixels % side for pixels, side in zip(resolution, patches, strict=True)):
        raise ValueError(
            f"--resolution takes multiples of the patch, {patches[0]}×{patches[1]} pixels in "
            f"{name_or_path}; got {resolution[0]}×{resolution[1]}."
        )
    if tuple(resolution) != image_size(processor):
        _set_resolution(processor, *resolution)
    return processor


def image_size(processor) -> tuple[int, int]:
    """Return the height and width in pixels of the images that a processor makes."""
    made = processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    return tuple(made.shape[-2:])


def _set_resolution(processor, height: int, width: int) -> None:
    """Let a processor make images of a height and width; a crop keeps its share of the image."""
    size, crop = processor.size, None
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size
        processor.crop_size = type(size)(height=height, width=width)
    # to a height and width, or to a shorter side that is cropped
    if processor.do_resize and size.height:
        if crop:
            height = round(height * size.height / crop.height)
            width = round(width * size.width / crop.width)
        processor.size = type(size)(height=height, width=width)
    elif processor.do_resize and size.shortest_edge and crop:
        margin = size.shortest_edge / max(crop.height, crop.width)
        processor.size = type(size)(shortest_edge=round(margin * max(height, width)))
    else:
        raise ValueError(
            f"--resolution needs an image processor that resizes to a height and width, or resizes "
            f"the shorter side and crops the middle; this {type(processor).__name__} has size "
            f"{size} and crop_size {crop}. Change its preprocessor_config.json instead."
        )
