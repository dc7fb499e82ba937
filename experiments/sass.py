"""What does the Hopper kernel cost in instructions? Compiled to SASS without a GPU, and counted.

Exits with 1 where a kernel spills (with a norm and a gate: for m up to 8; attention: more than
ATTENTION_SPILLS), waits for all of its
memory operations (a `MEMBAR` of the GPU, as a release to a cluster is), or takes more integer
instructions per code than LIMITS says; for m > 16, where the compiler makes `wgmma` wait for what
follows it, or a product of 16 along k costs a warp more instructions than WIDE_LIMITS: its
scheduler has 128 cycles for each while the tensor cores multiply a tile of 256 rows, fewer in
proportion for smaller ones. As to m <= 16: at 3.3 TB/s a scheduler of an H100 has time for about
4.2 of them (two cycles each) per byte of weight of a lane: 2.1 per 4-bit code, 4.2 per 8-bit code.

    make sass                  # an environment with the compiler's wheels, then this
    python experiments/sass.py

"""

import collections
import itertools
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.experimental.mosaic.gpu  # sets MOSAIC_GPU_CUDA_ROOT: overwritten below
import jax.numpy as jnp
import nvidia
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from pallas_kernels.decode_attention import mosaic_gpu as attention
from pallas_kernels.decode_attention.problem import Problem as attention_problem
from pallas_kernels.int8_matmul import mosaic_gpu as int8_plan
from pallas_kernels.int8_matmul.problem import Problem as int8_problem
from pallas_kernels.quantized_matmul import (
    hopper_layout,
    mosaic_gpu,
    mosaic_wgmma,
    problems,
)
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem, Weight

HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85520809984
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "Hopper"
"""
WEIGHTS = {
    "int4": Weight(4096, 4096, 128, "int4", "bfloat16"),
    "nf4": Weight(4096, 4096, 64, "uint4", values=problems.NF4),
    "int8": Weight(4096, 4096, 4096, "int8"),
    "fp8": Weight(4096, 4096, 4096, "float8_e4m3fn"),
}
CONFIGS = {1: (4, 4, 1, 2, 1, 0), 8: (8, 2, 1, 2, 1, 128), 16: (4, 2, 1, 2, 2, 128)}  # m -> config
FUSED = {1: (4, 2, 1, 2, 3, 128), 8: (2, 4, 1, 2, 2, 128), 16: (2, 4, 1, 2, 2, 128)}
# integer instructions per code
LIMITS = {"int4": 0.75, "nf4": 0.7, "int8": 0.6, "fp8": 1.1}
WIDE = [  # m, config; and what is offered for 64 rows where registers are fewest
    (1024, (256, 1, 3)),
    (1536, (256, 1, 3, 2)),  # the last round of tiles split
    (64, (64, 1, 4, 1, 1, 8, 64, 2)),
]
# instructions of a warp, 16 along k
WIDE_LIMITS = {"int4": 23, "nf4": 32, "int8": 20, "fp8": 28, "zeros": 35}
ZEROS = Weight(4096, 4096, 64, "uint4", "float16", zero="uint4")
INT8_LIMIT = 24  # instructions of a warp, 32 along k
ATTENTION_SPILLS = 76  # bytes of a thread
INTEGER = ("LOP3", "SHF", "PRMT", "IDP")
OTHERS = ("HMMA", "HADD2", "HMUL2", "HFMA2", "FFMA", "FADD", "FMUL", "LDS", "IMAD", "SYNCS")


def sass(
    m: int, weight: Weight, cut: tuple[int, ...], folder: str, norm: Any = None
) -> tuple[str, str]:
    """The disassembly and the compiler's report of one kernel; with a norm, whose scale has that
    dtype, and a gate for two such weights.
    """
    layout = next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)
    x: Any = jax.ShapeDtypeStruct((m, weight.k), jnp.bfloat16)
    problem, count = Problem(m, weight, layout, "bfloat16", "bfloat16"), 1
    if norm is not None:
        whole, count = weight._replace(n=2 * weight.n), 2
        problem = problem._replace(weight=whole, norm=1e-5, gate="silu")
        x = x, x, jax.ShapeDtypeStruct((weight.k,), norm)
    if m > mosaic_gpu.MAX_ROWS:
        config, launch = mosaic_wgmma.Config(*cut), mosaic_wgmma.launch
    else:
        config, launch = mosaic_gpu.Config(*cut), mosaic_gpu.launch
    call = lambda x, a: launch(problem, config, (weight.n,) * count, x, [a] * count)
    return compiled(folder, call, x, LAYOUTS[layout].shapes(weight))


def compiled(folder: str, call: Any, *args: Any) -> tuple[str, str]:
    """The disassembly and the compiler's report of the kernel in `call`."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    program(call, *args)
    newest = lambda end: max(pathlib.Path(folder).glob(end), key=os.path.getmtime).read_text()
    return newest("*.sass*"), newest("*.ptxas")


def program(call: Any, *args: Any) -> Any:
    """`call`, compiled for one GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=HOPPER, topology="1x1x1"
    )
    device = topology.devices[0]
    on = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=on), args)
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        return jax.jit(call).lower(*placed).compile()


def counts(text: str) -> collections.Counter:
    """Instructions by name, without what follows the first dot."""
    code = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    return collections.Counter(re.findall(code, text))


def used(report: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    found = [re.search(v, report) for v in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    if None in found:
        raise ValueError(f"the compiler does not say what the kernel takes: {report[:500]}")
    registers, spilled = (int(v[1]) for v in found if v)
    return registers, spilled


def fenced(text: str) -> bool:
    """Whether something waits until all memory operations are seen by the whole GPU."""
    return re.search(r"MEMBAR\.\w+\.GPU", text) is not None


def loop(text: str, products: int) -> list[str]:
    """The lines of the shortest loop that has so many matrix products of warpgroups."""
    code = [v for v in text.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s|^\s*\.L_", v)]
    labels = {m[1]: i for i, v in enumerate(code) if (m := re.match(r"\s*(\.L_\w+):", v))}
    found: list[list[str]] = []
    for i, line in enumerate(code):
        back = re.search(r"BRA[^`]*`\((\.L_\w+)\)", line)
        if back and labels.get(back[1], i) < i:
            lines = code[labels[back[1]] : i]
            if sum("GMMA" in v for v in lines) == products:
                found.append(lines)
    return min(found, key=len)


def wide(name: str, weight: Weight, m: int, cut: tuple[int, ...]) -> list[str]:
    """Prints the row of the kernel for m > 16; what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        text, report = sass(m, weight, cut, folder)
    products = 8 * cut[1]  # a turn is two stages of one or two strips
    each = sum(counts("\n".join(loop(text, products))).values()) / products
    (_, spilled), waits = used(report), "serialized" in report
    print(
        f"{name:6} {m}, {cut}: {products} products in the loop, {each:.1f} instructions "
        f"each, spilled {spilled}, {'serial' if waits else 'overlapping'}",
        flush=True,
    )
    bad = waits or spilled or each > WIDE_LIMITS[name] or fenced(text)
    return [f"{name}, m = {m}"] if bad else []


def scanned(name: str, weight: Weight, m: int) -> list[str]:
    """Prints what a scan over six stacked layers holds beside them; if a copy of one, its name."""
    layout = next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)
    problem = Problem(m, weight, layout, "bfloat16", "bfloat16")
    run = (mosaic_gpu if m <= mosaic_gpu.MAX_ROWS else mosaic_wgmma).launch
    cut = mosaic_gpu.Config(*CONFIGS[m]) if m in CONFIGS else mosaic_wgmma.Config(64, 1, 4)
    x = jax.ShapeDtypeStruct((m, weight.k), jnp.bfloat16)
    shapes = LAYOUTS[layout].shapes(weight)
    stack = jax.tree.map(lambda v: jax.ShapeDtypeStruct((6, *v.shape), v.dtype), shapes)

    def layer(x: Any, arrays: Any) -> Any:
        y = run(problem, cut, (weight.n,), x, [arrays])
        return (y if m > mosaic_gpu.MAX_ROWS else y[0]), None

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        held = program(lambda x, s: jax.lax.scan(layer, x, s)[0], x, stack).memory_analysis()
    print(f"{name:6} {m}, a scan over six layers: {held.temp_size_in_bytes} bytes of temporaries")
    copied = held.temp_size_in_bytes >= 4 * shapes["codes"].size
    return [f"{name}, m = {m}, copies a layer"] if copied else []


def integers(outliers: int) -> list[str]:
    """Prints the row of the kernel of int8 by int8; what is wrong with it."""
    weight = WEIGHTS["int8"]
    problem = int8_problem(1024, weight, "hopper8", outliers, "bfloat16")
    args: list[Any] = [jax.ShapeDtypeStruct((1024, weight.k), jnp.int8)]
    args += [jax.ShapeDtypeStruct((1024,), jnp.float32), LAYOUTS["hopper8"].shapes(weight)]
    if outliers:
        args += [jax.ShapeDtypeStruct((1024, outliers), jnp.bfloat16)]
        args += [jax.ShapeDtypeStruct((outliers,), jnp.int32)]
    config = int8_plan.choose_config(problem)
    with tempfile.TemporaryDirectory() as folder:
        text, report = compiled(folder, lambda *v: int8_plan.launch(problem, config, *v), *args)
    each = sum(counts("\n".join(loop(text, 8))).values()) / 8
    (_, spilled), waits = used(report), "serialized" in report
    print(
        f"int8 by int8, {outliers} outlier columns, {tuple(config)}: {each:.1f} instructions a "
        f"product of 32 along k, spilled {spilled}, {'serial' if waits else 'overlapping'}",
        flush=True,
    )
    bad = waits or spilled or each > INT8_LIMIT or fenced(text)
    return [f"int8 by int8, {outliers} outliers"] if bad else []


def fused(name: str, weight: Weight, m: int, norm: Any) -> list[str]:
    """Prints the row of the kernel with a norm and a gate; what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        text, report = sass(m, weight, FUSED[m], folder, norm)
    registers, spilled = used(report)
    print(
        f"{name:6} {m:2d}, norm by {jnp.dtype(norm).name} and gate: "
        f"{registers} registers, spilled {spilled}, {sum(counts(text).values())} instructions",
        flush=True,
    )
    bad = (m <= 8 and spilled) or fenced(text)
    return [f"{name}, m = {m}, fused"] if bad else []


def attends(batch: int, groups: int, head_dim: int) -> list[str]:
    """Prints the row of attention over 2048 positions; what is wrong with it."""
    p = attention_problem(batch, 8, groups, head_dim, 2048, head_dim**-0.5)
    array = jax.ShapeDtypeStruct
    heads = lambda n: array((batch, n, head_dim), jnp.bfloat16)
    angles, seen = array((head_dim // 2,), jnp.float32), array((2,), jnp.int32)
    cache = array((batch, p.length, 8, head_dim), jnp.bfloat16)
    args = [heads(8 * groups), heads(8), heads(8), angles, angles, seen]
    with tempfile.TemporaryDirectory() as folder:
        text, report = compiled(
            folder, lambda *v: attention.run(*v, problem=p), *args, cache, cache
        )
    registers, spilled = used(report)
    print(
        f"attention, {batch} rows, {groups} heads of {head_dim} a key, clusters of "
        f"{attention.cluster_of(p)}: {registers} registers, spilled {spilled}, "
        f"{sum(counts(text).values())} instructions",
        flush=True,
    )
    bad = spilled > ATTENTION_SPILLS or fenced(text)
    return [f"attention, {batch} rows, heads of {head_dim}"] if bad else []


def main() -> None:
    """Prints a row per kernel; exits with 1 if one is over its limit."""
    root = pathlib.Path(next(iter(nvidia.__path__))) / "cu13"  # bin/nvdisasm and bin/ptxas
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)
    for name in ("PTX", "PTXAS", "SASS"):
        os.environ[f"MOSAIC_GPU_DUMP_{name}"] = "1"
    bad: list[str] = []
    print("format  m  registers  spilled  integer per code  all  others")
    for name, weight in WEIGHTS.items():
        for m, config in CONFIGS.items():
            with tempfile.TemporaryDirectory() as folder:
                text, report = sass(m, weight, config, folder)
            found: Any = counts(text)
            registers, spilled = used(report)
            lanes = hopper_layout.ROWS * hopper_layout.DEPTH // 32  # codes of a lane in a tile
            codes = lanes * config[0] * config[3]
            per_code = sum(found[i] for i in INTEGER) / codes
            others = " ".join(f"{i} {found[i]}" for i in OTHERS if found[i])
            print(
                f"{name:6} {m:2d}  {registers:9d}  {spilled:7d}  "
                f"{per_code:16.2f}  {sum(found.values())}  {others}",
                flush=True,
            )
            if spilled or per_code > LIMITS[name] or fenced(text):
                bad.append(f"{name}, m = {m}")
    for name, weight in WEIGHTS.items():
        for m, norm in itertools.product(FUSED, (jnp.bfloat16, jnp.float32)):
            bad += fused(name, weight, m, norm)
    for name, weight in (WEIGHTS | {"zeros": ZEROS}).items():
        layout = next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)
        offered = mosaic_wgmma.configs(Problem(64, weight, layout, "bfloat16", "bfloat16"))
        crowded = [c for _, c in offered if c.rows == 64 and c.channels * c.teams == 256]
        cuts = {(c.channels, c.teams): (64, tuple(c)) for c in reversed(crowded)}.values()
        for m, cut in dict.fromkeys([*WIDE, *cuts]):
            bad += wide(name, weight, m, cut)
    for (name, weight), m in itertools.product(WEIGHTS.items(), (1, 64)):
        bad += scanned(name, weight, m)
    bad += [*integers(0), *integers(64)]
    for batch, groups, head_dim in ((1, 4, 128), (8, 4, 128), (1, 7, 64)):
        bad += attends(batch, groups, head_dim)
    if bad:
        sys.exit("over the limit: " + "; ".join(bad))


if __name__ == "__main__":
    main()
