"""The tasks that backbones are judged by: classification, segmentation, depth."""
