"""Measurements of speed, memory and recipes. Left out of the wheel."""
