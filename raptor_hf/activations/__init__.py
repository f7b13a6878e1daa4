"""The states of a teacher, stored in files or computed online."""
