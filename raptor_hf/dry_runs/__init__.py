"""Dry runs: what a program would read, train and write."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "extraction": ["print_extraction_plan"],
        "describe": ["describe_images", "teacher_facts"],
        "plans": [
            "print_probe_plan",
            "print_study_plan",
            "print_teacher_plan",
            "print_training_plan",
        ],
    },
)
