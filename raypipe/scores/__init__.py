"""Measured scores, one file each with the paper's formula at the top. Higher always means: keep."""
