"""Fit the extrapolator, assess it, and predict the score of every sample."""
