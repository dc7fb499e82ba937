"""The definition: dequantize in float32, round to the dtype of x, one dot."""

import jax
import jax.numpy as jnp

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem, Weight


def supports(problem: Problem, device: Device) -> str | None:
    """Everything but a config."""
    return None if problem.config is None else "it takes no config"


def run(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """`x @ dequantize(arrays)`; x that holds int8 codes is multiplied in float32."""
    dtype = jnp.dtype(jnp.float32) if problem.x == "int8" else jnp.dtype(problem.x)
    w = dequantize(arrays, problem.weight, problem.layout).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if problem.x == "int8" else None
    y = jnp.dot(x.astype(dtype), w, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(problem.out)


def dequantize(arrays: dict[str, jax.Array], weight: Weight, layout: str) -> jax.Array:
    """The float32 weight `[k, n]`: `(value(code) - zero) * scale + offset`, in this order."""
    order = LAYOUTS[layout]
    w = value(order.unpack_codes(arrays["codes"], weight), weight)

    def along_k(name: str) -> jax.Array:
        per_group = order.unpack_scale(arrays[name], weight, name).astype(jnp.float32)
        return jnp.repeat(per_group, min(weight.group, weight.k), axis=0)[: weight.k]

    if weight.zero is not None:
        w = w - along_k("zero")
    w = w * along_k("scale")
    return w if weight.offset is None else w + along_k("offset")


def value(codes: jax.Array, weight: Weight) -> jax.Array:
    """What logical codes stand for, in float32."""
    if weight.values is None:
        return codes.astype(jnp.float32)
    cases = [jnp.full(codes.shape, v, jnp.float32) for v in weight.values]
    return jax.lax.select_n(jnp.minimum(codes.astype(jnp.int32), len(cases) - 1), *cases)
