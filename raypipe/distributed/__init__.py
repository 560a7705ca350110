"""The only package that imports Ray, apart from the worker that trains the proxy."""
