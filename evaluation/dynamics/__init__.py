"""Depth as a dynamical system: a study of a teacher and its Raptors, with figures and a page."""
