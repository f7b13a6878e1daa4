"""Image datasets: which images a run reads, how they are read, and their views for models."""

from .arguments import ReadingArguments
from .batching import batches, keep_batch
from .loading import list_images, load_images
from .views import ImageViews, choose_images, make_processor

__all__ = [
    "ImageViews", "ReadingArguments", "batches", "choose_images", "keep_batch", "list_images",
    "load_images", "make_processor",
]  # fmt: skip
