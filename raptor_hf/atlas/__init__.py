"""The atlas: phase maps of many teachers on the same images, a page, a dataset of the Hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "hub": ["publish_atlas"],
        "maps": ["map_teachers", "named_teachers", "phase_map"],
        "page": ["write_page"],
    },
)
