"""The states of a teacher: stored in files, or computed online."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "format": ["verify_activations"],
        "online": [
            "OnlineActivations",
            "check_all_layers",
            "image_views",
            "open_source",
            "stream_states",
        ],
        "store": ["load_activations"],
        "writing": ["write_activations"],
    },
)
