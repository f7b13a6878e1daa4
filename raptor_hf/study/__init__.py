"""When a ViT is block-recurrent: the atlas of teachers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "atlas": ["map_teachers", "named_teachers"],
        "atlas_page": ["write_page"],
        "atlas_hub": ["publish_atlas"],
    },
)
