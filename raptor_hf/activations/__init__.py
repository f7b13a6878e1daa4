"""The states of a teacher: stored in files, or computed online."""

from .format import verify_activations
from .online import OnlineActivations, check_all_layers, image_views, open_source, stream_states
from .store import load_activations
from .writing import write_activations

__all__ = [
    "OnlineActivations", "check_all_layers", "image_views", "load_activations", "open_source",
    "stream_states", "verify_activations", "write_activations",
]  # fmt: skip
