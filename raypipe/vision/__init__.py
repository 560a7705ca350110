"""From image bytes to pixels, and from pixels to what a network says. No Ray, no storage."""
