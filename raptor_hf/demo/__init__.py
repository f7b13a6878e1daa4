"""The demo: a teacher and its Raptor side by side at every layer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "analysis": ["load_pair", "pick_examples"],
        "page": ["build_page", "serve"],
    },
)
