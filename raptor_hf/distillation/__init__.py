"""How blocks learn to follow a teacher, and how well they do."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blocks": [
            "chain_of",
            "covered_layers",
            "make_chains",
            "raptor_from_blocks",
            "save_blocks",
        ],
        "provenance": ["model_facts"],
        "training": ["train_chains"],
    },
)
