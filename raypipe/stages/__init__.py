"""Stages: the only code that knows Ray. They move data and call the mathematics."""
