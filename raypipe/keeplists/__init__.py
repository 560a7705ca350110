"""Read keep-lists: files of a run, and datasets restricted to them."""
