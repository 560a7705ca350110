"""Gaussian process regression on embeddings, proxy statistics and classes."""
