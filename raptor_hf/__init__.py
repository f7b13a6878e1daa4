"""Turn a Vision Transformer of transformers into a Raptor: a few blocks, applied recurrently.

`import raptor_hf` registers the Raptors with transformers' Auto classes.
"""

import transformers

from .configuration_raptor import RaptorConfig
from .modeling_raptor import RaptorBlock, RaptorModel
from .modeling_raptor_heads import (
    AUTO_CLASSES,
    RaptorBackbone,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
)
from .teachers.making import make_raptor
from .teachers.trunks import load_raptorized, raptorize, save_raptorized

transformers.AutoConfig.register(RaptorConfig.model_type, RaptorConfig)
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(RaptorConfig, _model_class)

__all__ = [
    "RaptorBackbone",
    "RaptorBlock",
    "RaptorConfig",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorModel",
    "load_raptorized",
    "make_raptor",
    "raptorize",
    "save_raptorized",
]
