"""Parquet files: the source, its reader of row groups, and its preview."""
