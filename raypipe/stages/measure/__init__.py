"""Measure the scores of the seed set and the audit set."""
