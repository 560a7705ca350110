"""Fit the extrapolator, assess its fidelity and predict the remaining scores."""
