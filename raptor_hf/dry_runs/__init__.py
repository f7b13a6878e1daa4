"""Dry runs: what a program would read, train and write."""

from .describe import describe_images, teacher_facts
from .extraction import print_extraction_plan
from .plans import print_probe_plan, print_study_plan, print_teacher_plan, print_training_plan

__all__ = [
    "describe_images",
    "print_extraction_plan",
    "print_probe_plan",
    "print_study_plan",
    "print_teacher_plan",
    "print_training_plan",
    "teacher_facts",
]
