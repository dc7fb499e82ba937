"""Weights as the Hopper kernels take them, and what results are held against."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Weight
from pallas_kernels.quantized_matmul.problems import NF4

BF16 = ml_dtypes.bfloat16
LANES = np.arange(32)
PLACES = 4 * (8 * (LANES % 4) + (LANES // 4 ^ 2 * (LANES % 4)))  # first word of a lane's four


def by_lane(words):
    """Words `[..., 128]` of a warp's lanes as `[..., r, c, 4]`, in plain jax."""
    at = lambda r, c: words[..., PLACES[4 * r + c] : PLACES[4 * r + c] + 4]
    return jnp.stack([jnp.stack([at(r, c) for c in range(4)], -2) for r in range(8)], -3)


def wide(x):
    return np.asarray(x).astype(np.float64)


def weight_of(row):
    """That of a row of a device's table."""
    k, n = row["k"], row["n"]
    return {
        "int4": Weight(k, n, 128, "int4", "bfloat16"),
        "int8": Weight(k, n, k, "int8"),
        "fp8": Weight(k, n, k, "float8_e4m3fn"),
        "nf4": Weight(k, n, 64, "uint4", values=NF4),
    }[row["format"]]


def packed(weight, layout, seed):
    """Arrays in kernel order, and the float64 weight that they stand for."""
    rng = np.random.default_rng(seed)
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128)}.get(weight.code, (0, 120))
    codes = rng.integers(low, high, (weight.k, weight.n))
    if weight.code.startswith("float8"):
        codes = codes.astype(np.uint8).view(weight.code)
    codes, shape = codes.astype(weight.code), (weight.groups, weight.n)
    size = {"int8": 74, "float8_e4m3fn": 40}.get(weight.code, 1 if weight.values else 8)
    scale = rng.uniform(0.5, 2, shape) / (size * weight.k**0.5)  # results of about 1
    held = {"scale": scale.astype(weight.scale)}
    if weight.zero:
        held["zero"] = rng.integers(low, high, shape).astype(weight.zero)
    if weight.offset:
        held["offset"] = (rng.normal(size=shape) / weight.k**0.5).astype(weight.offset)
    w = codes.astype(np.float64)
    if weight.values:  # the kernel's table holds bfloat16
        w = np.asarray(weight.values, np.float32).astype(BF16).astype(np.float64)[w.astype(int)]
    along_k = lambda v: np.repeat(v.astype(np.float64), weight.group, 0)[: weight.k]
    w = w - along_k(held["zero"]) if weight.zero else w
    w = w * along_k(held["scale"])
    w = w + along_k(held["offset"]) if weight.offset else w
    return pack({"codes": codes} | held, weight, layout), w


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack(held, weight, layout):
    order = LAYOUTS[layout]
    by = lambda name: order.pack_codes if name == "codes" else order.pack_scale
    return {name: by(name)(v, weight) for name, v in held.items()}


def close(ours, wanted, tolerance):
    assert ours.shape == wanted.shape
    worst = np.abs(wide(ours) - wanted).max() / np.abs(wanted).max()
    assert worst <= tolerance


ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu_tanh": lambda g: g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))),
}
