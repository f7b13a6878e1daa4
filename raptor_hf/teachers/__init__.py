"""Teachers: Vision Transformers of transformers, local or from the Hub, and Raptors made of them.

Looking at a model (`load_vision_model`, `trajectory`) works for any that returns the states of its
layers; a Raptor can be made of the families that `load_backbone` takes.
"""

from .loading import load_backbone, load_vision_model, teacher_identity
from .processors import image_size, load_processor
from .states import normed_state, trajectory

__all__ = [
    "image_size", "load_backbone", "load_processor", "load_vision_model", "normed_state",
    "teacher_identity", "trajectory",
]  # fmt: skip
