"""A score and a strategy for raypipe; `pyproject.toml` declares them as entry points."""
