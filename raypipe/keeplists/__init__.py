"""Read keep-lists, and restrict datasets to them."""
