"""The demo: a teacher and its Raptor side by side at every layer."""
