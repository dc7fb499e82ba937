"""The largest magnitudes of rows and of columns, from one read."""
