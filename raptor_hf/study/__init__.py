"""When a ViT is block-recurrent: many short distillations, and an atlas of teachers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "experiments": ["Plan", "run_study"],
        "report": ["write_report"],
        "workbench": ["Settings"],
    },
)
