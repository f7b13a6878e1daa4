"""How blocks learn to follow a teacher, and how well they do."""
