"""Draw the seed set and the audit set."""
