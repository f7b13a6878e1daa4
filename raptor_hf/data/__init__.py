"""Image datasets: which images a run reads, how they are read, and their views for models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["ReadingArguments"],
        "batching": ["batches", "keep_batch"],
        "loading": ["list_images", "load_images"],
        "views": ["ImageViews", "choose_images", "make_processor"],
    },
)
