"""Programs that evaluate models, and research with Raptors: clients of raptor_hf."""
