"""Phases: where the depth of a model falls into runs of similar layers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "distance": ["layer_distance", "load_distance"],
        "max_cut": ["recursive_max_cut"],
        "partitions": ["METHODS", "find_phases", "partition_quality"],
        "stability": ["cut_stability", "partition_agreement"],
    },
)
