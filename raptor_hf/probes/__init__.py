"""Linear probes on frozen backbones, and what is measured beside them."""
