"""Turn a Vision Transformer of transformers into a Raptor: a few blocks, applied recurrently."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from .configuration_raptor import RaptorConfig
from .modeling_raptor import (
    RaptorBlock,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)

AutoConfig.register(RaptorConfig.model_type, RaptorConfig)
AutoModel.register(RaptorConfig, RaptorModel)
AutoModelForImageClassification.register(RaptorConfig, RaptorForImageClassification)
AutoModelForSemanticSegmentation.register(RaptorConfig, RaptorForSemanticSegmentation)
AutoModelForDepthEstimation.register(RaptorConfig, RaptorForDepthEstimation)

__all__ = [
    "RaptorBlock",
    "RaptorConfig",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorModel",
]
