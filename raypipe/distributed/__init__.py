"""Everything that uses Ray; only the worker that trains the proxy imports it elsewhere."""
