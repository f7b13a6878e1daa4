"""Model cards, and publishing to the Hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model_card": ["planned_card", "write_model_card"],
        "publishing": [
            "activation_files",
            "publish_activations",
            "publish_dataset",
            "publish_model",
            "stage_model",
            "write_files",
        ],
    },
)
