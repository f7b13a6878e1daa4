"""Measurements of speed, memory and recipes. Left out of the wheel."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activations": ["benchmark_activations", "benchmark_memory"],
        "pipeline": ["benchmark_images", "benchmark_train"],
        "recipes": ["benchmark_recipes", "recipe_tables"],
        "speed": ["benchmark_model"],
        "training": ["benchmark_train_step"],
    },
)
