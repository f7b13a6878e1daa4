"""The tasks that backbones are judged by: classification, segmentation, depth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "heads": ["arrange_head", "attach_head", "load_linear_head"],
        "task": ["TASKS", "Task"],
    },
)
