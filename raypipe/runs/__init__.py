"""A run folder: where everything is, what is finished, who writes it."""
