"""Depth as a dynamical system: trajectories measured, pushed, continued."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "measures": ["measure"],
        "systems": ["find_partitions", "is_store", "load_inputs"],
    },
)
