"""Image datasets: which images a run reads, how they are read, and the views that models get."""

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
