"""Turn a Vision Transformer of transformers into a Raptor: a few blocks, applied recurrently."""

import transformers

from .configuration_raptor import RaptorConfig
from .modeling_raptor import (
    AUTO_CLASSES,
    RaptorBackbone,
    RaptorBlock,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)

transformers.AutoConfig.register(RaptorConfig.model_type, RaptorConfig)
for auto_class, model_class in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(RaptorConfig, model_class)

__all__ = [
    "RaptorBackbone",
    "RaptorBlock",
    "RaptorConfig",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorModel",
]
