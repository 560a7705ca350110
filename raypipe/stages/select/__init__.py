"""Write keep-lists from the score shards."""
