"""Phases: where the depth of a model falls into runs of similar layers."""
