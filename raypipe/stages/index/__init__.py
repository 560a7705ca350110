"""List the files of a source and cut them into fragments."""
