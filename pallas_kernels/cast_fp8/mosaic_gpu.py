"""Hopper through Pallas Mosaic GPU."""

from typing import NamedTuple


class Config(NamedTuple):
    tiles: int = 8
    steps: int = 2
    outs: int = 1
    order: int = 1
