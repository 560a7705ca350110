"""Extrapolate scores from tables: embeddings and scores that somebody else computed."""
