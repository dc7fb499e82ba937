"""Hopper through Pallas Mosaic GPU."""

from typing import NamedTuple


class Config(NamedTuple):
    bm: int = 128
    bn: int = 256
    part: int = 128
    steps: int = 4
    outs: int = 2
    cluster: int = 2
    width: int = 8
    minor: int = 0
    registers: int = 208
    load_registers: int = 88
    blocks: int = 132
