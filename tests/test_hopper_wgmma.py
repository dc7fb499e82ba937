"""The Hopper kernel for m > 16 without a GPU: what its lanes exchange, and its plans.

`_operand` is the arithmetic of `hopper_fragments` in numpy, lane by lane and bit by bit. That the
device runs it so is checked on the device (experiments/prefill_kernels.py check).
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_hopper import (
    H100,
    WEIGHTS,
    _dense,
    _from_floats,
    _halves,
    _operands,
    _order,
    _pack,
    _pairs,
    _permuted,
)

from pallas_kernels.quantized_matmul import hopper_layout, mosaic_wgmma
from pallas_kernels.quantized_matmul.problem import Problem, Weight

LANES = np.arange(32)
R, C = LANES // 4, LANES % 4


def _shuffled(word: np.ndarray, mask: int) -> np.ndarray:
    return word[LANES ^ mask]


def _prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(7)
        byte = np.where(nibble < 4, a >> 8 * nibble, b >> 8 * (nibble & 3)) & np.uint32(255)
        out |= byte << np.uint32(8 * i)
    return out


def _swap4(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    high, odd = C >= 2, C % 2 == 1
    choose = lambda flag, a, b: np.where(flag, np.uint32(a), np.uint32(b))
    keep, send = np.where(high, second, first), np.where(high, first, second)
    got = _shuffled(send, 2)
    even_pair, odd_pair = choose(high, 0x2604, 0x6240), choose(high, 0x3715, 0x7351)
    mine = _prmt(keep, got, np.where(odd, odd_pair, even_pair))
    got = _shuffled(_prmt(keep, got, np.where(odd, even_pair, odd_pair)), 1)
    return [
        _prmt(mine, got, choose(odd, 0x2604, 0x6240)),
        _prmt(mine, got, choose(odd, 0x3715, 0x7351)),
    ]


def _swap8(words: list[np.ndarray]) -> list[np.ndarray]:
    high, odd = C >= 2, C % 2 == 1
    swap = lambda flag, a, b: (np.where(flag, b, a), np.where(flag, a, b))
    (a, x), (b, y) = swap(high, words[0], words[2]), swap(high, words[1], words[3])
    x, y = _shuffled(x, 2), _shuffled(y, 2)
    (a, b), (x, y) = swap(odd, a, b), swap(odd, x, y)
    b, y = _shuffled(b, 1), _shuffled(y, 1)
    a, b = swap(odd, a, b)
    x, y = swap(odd, x, y)
    (a, x), (b, y) = swap(high, a, x), swap(high, b, y)
    return [a, b, x, y]


def _exchanged(weight: Weight, words: list[np.ndarray]) -> list[np.ndarray]:
    """The eight registers of two operands from a lane's words for 32 of k."""
    if weight.values is not None:
        held = [v for word in words for v in _pairs(weight, [word])]
        rows = [_swap8(held[row::2]) for row in range(2)]
        return [rows[i % 2][i // 2] for i in range(8)]
    moved = _swap8(words) if "8" in weight.code else _swap4(*words)
    half = len(moved) // 2
    return [*_pairs(weight, moved[:half]), *_pairs(weight, moved[half:])]


@pytest.mark.parametrize("name", WEIGHTS)
def test_lanes_exchange_what_wgmma_wants_of_them(name: str) -> None:
    weight, logical = WEIGHTS[name], _operands(name)
    codes = np.asarray(_pack(logical, weight)["codes"]).view(np.uint32)
    value = logical["codes"].astype(np.float64)
    if weight.values is not None:  # as the kernel's table has them
        value = np.asarray(weight.values, np.float32).astype(jnp.bfloat16)[value.astype(int)]
    wanted = np.full((codes.shape[1] * 128, codes.shape[0] * 16), np.nan)
    wanted[: weight.k, : weight.n] = value
    plain = weight.values is None and "8" not in weight.code
    start = 128.0 - hopper_layout.lowest(weight) if plain else 0.0
    loads = codes.shape[2] // 256  # of a lane, per half of a tile
    for row, tile, half in itertools.product(*map(range, codes.shape[:2]), range(2)):
        held = [
            codes[row, tile, (half * loads + i) * 128 + LANES * 4 + v]
            for i in range(loads)
            for v in range(4)
        ]
        for block in range(2):
            words = held[block * 2 * loads : (block + 1) * 2 * loads]
            for i, pair in enumerate(_exchanged(weight, words)):
                step, j = divmod(i, 4)
                k = 128 * tile + 64 * half + 32 * block + 16 * step + 8 * (j // 2) + 2 * C
                for e, got in enumerate(_halves(pair)):
                    known = wanted[k + e, 16 * row + R + 8 * (j % 2)]
                    inside = ~np.isnan(known)
                    np.testing.assert_array_equal((got - start)[inside], known[inside])
