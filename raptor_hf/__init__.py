"""Turn a Vision Transformer of transformers into a Raptor: a few blocks, applied recurrently."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_raptor import RaptorConfig
from .modeling_raptor import RaptorBlock, RaptorForImageClassification, RaptorModel

AutoConfig.register(RaptorConfig.model_type, RaptorConfig)
AutoModel.register(RaptorConfig, RaptorModel)
AutoModelForImageClassification.register(RaptorConfig, RaptorForImageClassification)

__all__ = ["RaptorBlock", "RaptorConfig", "RaptorForImageClassification", "RaptorModel"]
