"""Benchmarks of speed, memory and training recipes, each beside the reference."""
