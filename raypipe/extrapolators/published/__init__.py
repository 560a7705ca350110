"""The extrapolators as published in arXiv 2506.09010, for comparison."""
