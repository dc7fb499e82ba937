"""Attention of one new token per row over a cache that it joins."""
