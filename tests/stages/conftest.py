"""Fixtures of the stages' tests."""

from serial import no_ray

__all__ = ["no_ray"]
