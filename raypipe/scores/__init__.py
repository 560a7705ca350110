"""Measured scores: one file each, the paper's formula at its top. Higher always means: keep."""
