"""Algorithms that choose codes: each one file, a factory of pure functions."""
