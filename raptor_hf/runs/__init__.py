"""A run: its processes, its arguments, its output folder, the files in it."""
