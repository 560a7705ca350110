"""Scores that are means of one statistic of the network's output."""

OUTPUTS = {"loss": "loss", "el2n": "distance", "entropy": "entropy"}
"""The statistic (`raypipe.vision.output_statistics`) that each such score is the mean of."""
