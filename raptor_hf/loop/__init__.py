"""The training loop: `fit`, and what it needs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["newest_checkpoint", "remove_checkpoints"],
        "engine": ["configure_compute"],
        "fit": ["fit"],
        "numbers": ["StepResult"],
    },
)
