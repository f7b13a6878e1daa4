"""When a ViT is block-recurrent: many short distillations of one teacher and its relatives."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "experiments": ["Plan", "add_gaps", "print_plan", "run_study"],
        "report": ["write_report"],
        "workbench": ["Settings", "default_settings"],
    },
)
