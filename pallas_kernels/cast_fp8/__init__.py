"""Casts to FP8 that write both orientations of the codes."""
