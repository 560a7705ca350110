"""Train the proxy on the seed set with Ray Train."""
