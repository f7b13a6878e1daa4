"""Depth as a dynamical system."""
