"""Do the kernels give on several devices what they give on one?

    python experiments/check_sharded.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/check_sharded.py --small

A gated MLP of prepared weights, and a training step of one in FP8, on all devices of this machine:
weights cut as tensor parallelism cuts them (up along its outputs, down along its inputs, whose
products are summed), rows of x as data parallelism does, and both. A row says how far results are
from one device's, over the largest, how many kernels of `pallas_kernels` the partitioned program
calls (on CPU devices none: there the frame around them is what is compared), and how many operands
it gathers. bfloat16 rounds elsewhere then, which moves FP8 codes: gradients may be as far from one
device's as those are from bfloat16's, and 2^-8. Exits with 1 where that, or 1 % for weight-only
products, is exceeded, an operand is gathered, or a GPU runs no kernel of ours.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import training

SPECS, ROWS = ("int4_g128", "nf4_g64", "int8"), (16, 256)
RECIPES = ("current", "rowwise", "block")
CUTS = {"gate": P(None, "t"), "up": P(None, "t"), "down": P("t", None)}


def draw(seed: int, rows: int, columns: int) -> jax.Array:
    """Random bfloat16, the products of whose rows are near 1."""
    x = jax.random.normal(jax.random.key(seed), (rows, columns)) * columns**-0.5
    return x.astype(jnp.bfloat16)


def mlp(p: Any, x: jax.Array, out: P | None = None) -> jax.Array:
    """Llama's, on `[rows, width]`."""
    h = jax.nn.silu(x @ p["gate"]) * (x @ p["up"])
    return jnp.einsum("mi,io->mo", h, p["down"], out_sharding=out)


def loss(p: Any, x: jax.Array) -> jax.Array:
    """A number of it whose gradients are no constants."""
    return jnp.sum((jax.nn.silu(x @ p["up"]) @ p["down"]).astype(jnp.float32) ** 2)


def meshes(kind: AxisType) -> list[Mesh]:
    """Of all devices: data parallel, tensor parallel, and with four or more both."""
    n = jax.device_count()
    shapes = [(1, n), (n, 1)] + ([(2, n // 2)] if n >= 4 and n % 2 == 0 else [])
    return [jax.make_mesh(shape, ("d", "t"), axis_types=(kind,) * 2) for shape in shapes]


def put(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """On the mesh."""
    place = lambda spec: NamedSharding(mesh, spec)
    return jax.device_put(tree, jax.tree.map(place, specs, is_leaf=lambda v: isinstance(v, P)))


def calls(text: str) -> str:
    """What counts in a partitioned program."""
    kernels = text.count('custom_call_target="mosaic_gpu')
    fp8 = text.count('custom_call_target="__cublas$lt$matmul$f8"')
    return f"{kernels} kernels, {fp8} FP8 calls of cuBLASLt, {text.count(' all-gather')} gathers"


def off(a: Any, b: Any) -> float:
    """The largest difference over the largest value."""
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def report(name: str, mesh: Mesh, distance: float, bound: float, text: str) -> bool:
    """Prints a row; whether it is right, and on a GPU of our kernels."""
    ours = jax.default_backend() != "gpu" or "mosaic_gpu" in text
    good = distance <= bound and ours and " all-gather" not in text
    sizes = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items())
    verdict = "ok   " if good else "WRONG"
    print(
        f"{verdict} {name}, {sizes}: {distance:.2e} (bound {bound:.2e}), {calls(text)}", flush=True
    )
    return good


def weight_only(spec: str, rows: int, width: int) -> bool:
    """Under Auto and Explicit axes."""
    sizes = {"gate": (width, 2 * width), "up": (width, 2 * width), "down": (2 * width, width)}
    q = {n: qjax.quantize(draw(i, *size), spec, 0) for i, (n, size) in enumerate(sizes.items())}
    p, x = qjax.prepare(q), draw(9, rows, width)
    alone, good = jax.jit(qjax.quantized(mlp))(p, x), True
    for kind, out in ((AxisType.Auto, None), (AxisType.Explicit, P("d", None))):
        run = qjax.quantized(functools.partial(mlp, out=out))
        for mesh in meshes(kind):
            with jax.set_mesh(mesh):
                specs = qjax.partition_specs(p, CUTS, mesh)
                placed = put(p, specs, mesh), put(x, P("d", None), mesh)
                program = jax.jit(run).lower(*placed).compile()
                got = program(*placed)
            name = f"{spec}, {rows} rows, {kind.name}"
            good &= report(name, mesh, off(got, alone), 0.01, program.as_text())
    return good


def fp8(name: str, width: int) -> bool:
    """Loss and gradients of one recipe."""
    p = {"up": draw(0, width, 2 * width), "down": draw(1, 2 * width, width)}
    x = draw(2, width, width) * 32
    low = training.fp8(loss, dataclasses.replace(training.RECIPES[name], keep_head=False))
    state = low.init(p, x)
    step: Callable[..., Any] = lambda p, x: low.grads(p, state, x)[:2]
    leaves = lambda tree: [np.asarray(v, np.float64) for v in jax.tree.leaves(tree)]
    alone, exact = leaves(jax.jit(step)(p, x)), leaves(jax.jit(jax.value_and_grad(loss))(p, x))
    norm, good = np.linalg.norm, True
    for mesh in meshes(AxisType.Auto):
        cuts = {n: CUTS[n] for n in p}
        placed = put(p, cuts, mesh), put(x, P("d", None), mesh)
        program = jax.jit(step).lower(*placed).compile()
        got = leaves(program(*placed))
        far = [norm(a - b) / norm(c) for a, b, c in zip(got, alone, exact, strict=True)]
        near = [norm(b - c) / norm(c) + 2**-8 for b, c in zip(alone, exact, strict=True)]
        worst = int(np.argmax(np.divide(far, near)))  # NaN is the largest
        good &= report(name, mesh, far[worst], near[worst], program.as_text())
    return good


def main() -> None:
    """All of it; exits with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="width 512 in place of 4096")
    width = 512 if parser.parse_args().small else 4096
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if jax.device_count() == 1:
        sys.exit("it takes several devices")
    good = [weight_only(*case, width) for case in itertools.product(SPECS, ROWS)]
    good += [fp8(name, width) for name in RECIPES]
    print("all are right" if all(good) else f"WRONG: {good.count(False)}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
