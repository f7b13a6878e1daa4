"""Measurements of speed, memory and recipes."""
