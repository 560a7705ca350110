"""Gaussian process regression on embeddings."""
