"""Model cards, and publishing to the Hugging Face Hub."""

from .model_card import write_model_card
from .publishing import publish_activations, publish_model

__all__ = ["publish_activations", "publish_model", "write_model_card"]
