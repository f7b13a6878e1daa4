"""Teachers: Vision Transformers of transformers, local or from the Hub, and their trajectories.

Looking at a model (`load_vision_model`, `trajectory`) works for any that returns the states of its
layers; a Raptor can be made of the families that `load_backbone` takes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["load_backbone", "load_vision_model", "teacher_identity"],
        "processors": ["image_size", "load_processor"],
        "states": ["final_norm", "normed_state", "trajectory"],
    },
)
