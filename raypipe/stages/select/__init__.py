"""Write keep-lists from the scores of a run."""
