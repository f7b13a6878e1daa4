"""Dry runs: what a program would read, train and write."""
