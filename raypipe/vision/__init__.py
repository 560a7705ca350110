"""Decode images, and build, train and run the networks that look at them. No Ray, no storage."""
