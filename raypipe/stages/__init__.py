"""The stages of a run: they move data between storage and the mathematics, on Ray."""
