"""Extrapolate scores from tables: embeddings and scores that were computed elsewhere."""
