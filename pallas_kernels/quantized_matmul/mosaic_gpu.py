"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut. No GPU is needed to
ask; the kernel is in `hopper_kernel` and imported when it runs.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import hopper_layout
from pallas_kernels.quantized_matmul.problem import Problem, Weight

SHARED_MEMORY = 232448 - 4096  # bytes of a block, less what Mosaic keeps and aligns
MULTIPROCESSORS = 132
# blocks that run at once, by those of a cluster: four and eight do not fill every part of the chip
AT_ONCE = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 4: 116, 8: 120}
# depth times eighths of m, of more than eight warps: more do not fit beside the rest
FAST_TILES = 4
FAST_REGISTERS = 152  # for x and what goes with its groups, of eight warps
CROWDED = 80  # of more than eight warps: what holds more spills, up to 0.2 KB a thread
MOST_WAITING = 140_000  # bytes on their way to a multiprocessor; rings that hold more were slower
MAX_ROWS = 16
PAIR_TABLE = (256, 32)  # words in shared memory that a codebook needs, `hopper_pairs`
LAYOUTS = ("hopper4", "hopper8")
TABLES = pathlib.Path(__file__).parent / "tables"
# device kind -> what was measured on it; read once, since every matmul of a model asks
TUNED = {path.stem: json.loads(path.read_text())["rows"] for path in TABLES.glob("*.json")}


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      depth: tiles of 128 along k whose x a warp keeps.
      warpgroups: of a block; all split its share of k.
      cluster: blocks that split k.
      rows: 16-channel tiles of a turn, after which the warps meet.
      steps: 16-channel tiles in the ring of a warp.
      blocks: clusters along n; each takes every so many-th turn. 0: one turn each.
      early: of the steps, those that are fetched before x. x would wait for all that is under way.
    """

    depth: int = 2
    warpgroups: int = 4
    cluster: int = 1
    rows: int = 1
    steps: int = 4
    blocks: int = 0
    early: int = 1


# sizes that a config may have: checked ones
SIZES = {
    "depth": range(1, 9),
    "warpgroups": (1, 2, 3, 4),
    "cluster": (1, 2, 4, 8),
    "rows": (1, 2, 4),
}


class Plan(NamedTuple):
    """Sizes that follow from a config."""

    tiles_n: int  # of 16 channels
    tiles_k: int
    grid: int  # clusters along n
    turns: int  # of a cluster, at most
    box: int  # tiles along k of a warpgroup
    shared: int  # bytes


def tile_words(weight: Weight) -> int:
    """32-bit words of a tile: codes, scales, and zero points or offsets."""
    extra = sum(hopper_layout.group_words(weight, n) for n in ("scale", "zero", "offset"))
    return hopper_layout.code_words(weight) + extra


def channel_words(weight: Weight, bias: bool) -> int:
    """Words of a tile of channels that are the same for all k: scales per channel, and a bias."""
    return hopper_layout.ROWS * (hopper_layout.per_channel(weight) + bias)


def kept_words(weight: Weight) -> int:
    """Of a lane, for each tile of 128 along k and 8 rows of x: of x, and for each group of integers
    two sums of it and about one more.
    """
    summed = weight.values is None and weight.code in ("int4", "uint4", "int8")
    return 16 + 3 * summed * -(-hopper_layout.DEPTH // weight.group)


def columns(m: int) -> int:
    """Tiles of 8 rows of x."""
    return -(-m // 8)


def plan(
    m: int,
    weight: Weight,
    config: Config,
    bias: bool = False,
    norm: bool = False,
    gate: bool = False,
) -> Plan | str:
    """The sizes that follow from a config, or why it cannot run."""
    c = config
    n, k = -(-weight.n // hopper_layout.ROWS), -(-weight.k // hopper_layout.DEPTH)
    parts, box = c.cluster * c.warpgroups, 4 * c.depth
    if n % c.rows:
        return f"{n} tiles of 16 channels do not divide into turns of {c.rows}"
    if c.cluster > 1 and (norm or gate):
        return "blocks of a cluster have sums of a part of k: no norm and no gate there"
    if norm and c.depth * columns(m) > FAST_TILES:
        return f"{c.depth} tiles of x and of what is added to it do not fit a warp's registers"
    if gate and c.rows % 2:
        return f"a gate and what it multiplies are in one turn, not in turns of {c.rows}"
    if -(-k // parts) > box or k < box:
        return f"{parts} warpgroups of {box} tiles do not cover {k} along k"
    grid = min(c.blocks or n // c.rows, n // c.rows)
    turns = -(-(n // c.rows) // grid)
    sums = c.rows * 512 * columns(m)
    shared = c.warpgroups * c.steps * box * 4 * tile_words(weight)
    shared += c.warpgroups * c.steps * 16 * channel_words(weight, bias)
    shared += min(2, turns) * c.warpgroups * 4 * sums
    if c.cluster > 1:
        shared += -(-turns // c.cluster) * c.cluster * sums
    if weight.values is not None:
        shared += 4 * math.prod(PAIR_TABLE)
    if norm:
        shared += c.warpgroups * 4 * 8 * columns(m) * 4
    if shared > SHARED_MEMORY:
        return f"needs {shared} bytes of shared memory, has {SHARED_MEMORY}"
    return Plan(n, k, grid, turns, box, shared)


def configs(
    m: int, weight: Weight, bias: bool = False, norm: bool = False, gate: bool = False
) -> Iterator[tuple[float, Config]]:
    """Configs that can run, each with a guess at its worth (the share of the peak).

    The guess multiplies how evenly the work falls on the multiprocessors, how much of k is padding,
    how many bytes are on their way at a time, and how much x is read beside the weight.
    """
    n, k = -(-weight.n // hopper_layout.ROWS), -(-weight.k // hopper_layout.DEPTH)
    sizes = itertools.product(*SIZES.values(), (1, 2))
    for depth, warpgroups, cluster, rows, resident in sizes:
        if not 2 <= warpgroups * resident <= 4 or n % rows:
            continue
        tiles = depth * columns(m)
        if tiles > FAST_TILES and (
            warpgroups * resident > 2 or tiles * kept_words(weight) > FAST_REGISTERS
        ):
            continue
        if not 4 * depth <= k <= cluster * warpgroups * 4 * depth:  # each matmul asks: be quick
            continue
        at_once = AT_ONCE[cluster] * resident // cluster
        turns = -(-(n // rows) // at_once)
        blocks = -(-(n // rows) // turns)
        for steps in (16, 12, 8, 6, 5, 4, 3, 2, 1):
            config = Config(depth, warpgroups, cluster, rows, steps, blocks)
            sized = plan(m, weight, config, bias, norm, gate)
            if isinstance(sized, str) or steps > turns * rows:
                continue
            if sized.shared > (SHARED_MEMORY + 4096) // resident - 4096:
                continue
            even = (
                n
                / (blocks * turns * rows)
                * min(1.0, blocks * cluster / (MULTIPROCESSORS * resident))
            )
            useful = k / (cluster * warpgroups * 4 * depth)
            waiting = resident * warpgroups * steps * sized.box * 4 * tile_words(weight)
            if waiting > MOST_WAITING and steps > 1:
                continue
            x_bytes = blocks * weight.k * m * 2
            all_bytes = n * k * 4 * tile_words(weight)
            worth = even * (0.5 + 0.5 * useful) * (0.6 + 0.4 * min(1.0, waiting / 90_000))
            worth *= {1: 1.0, 2: 0.97, 4: 0.85, 8: 0.85}[cluster] * (1.05 if rows > 1 else 1.0)
            if warpgroups * resident > 2 and tiles * kept_words(weight) > CROWDED:
                worth *= 0.9
            yield worth / (1 + 0.15 * x_bytes / all_bytes), config
            break


def family(weight: Weight) -> str:
    """What a row of a table calls its codes."""
    if weight.values is not None:
        return "nf4"
    return {"int8": "int8", "int4": "int4", "uint4": "int4"}.get(weight.code, "fp8")


def choose_config(
    m: int,
    weight: Weight,
    kind: str,
    bias: bool = False,
    norm: bool = False,
    gate: bool = False,
) -> Config | None:
    """An exact row of the device's table, else the row of the next larger m, else the best guess;
    None if no config can run.
    """
    mine = family(weight), weight.k, weight.n, tile_words(weight)
    fits = [
        r
        for r in TUNED.get(kind.replace(" ", "_"), [])
        if (r["format"], r["k"], r["n"], r["words"]) == mine and r["m"] >= m
    ]
    for row in sorted(fits, key=lambda r: r["m"]):
        config = Config(*row["config"])
        if not isinstance(plan(m, weight, config, bias, norm, gate), str):
            return config
    return max(configs(m, weight, bias, norm, gate), default=(0.0, None))[1]


def unfit(problem: Problem, device: Device) -> str | None:
    """None, or why neither kernel for Hopper can run it: device, layout, dtypes."""
    reason = hopper.missing(device)
    if reason is not None:
        return reason
    if problem.layout not in LAYOUTS:
        return f"the weight lies in layout {problem.layout}, not {' or '.join(LAYOUTS)}"
    if problem.x != "bfloat16" or problem.out not in ("bfloat16", "float32"):
        return (
            f"x is {problem.x} and the result {problem.out}: it takes bfloat16, gives it or float32"
        )
    return None


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, m <= 16, weights in a layout for Hopper, on an H100 or H200 with jax 0.11."""
    reason = unfit(problem, device)
    if reason is not None:
        return reason
    if problem.m > MAX_ROWS:
        return f"x has {problem.m} rows, it takes at most {MAX_ROWS}"
    if problem.weight.k % 8:
        return f"k = {problem.weight.k} is no multiple of 8, so rows of x are not aligned"
    if problem.config is not None:
        return refused(problem)
    if next(configs(problem.m, problem.weight, problem.bias), None) is None:
        return f"no way to cut k = {problem.weight.k}, n = {problem.weight.n} fits the chip"
    return None


def refused(problem: Problem) -> str | None:
    """None, or why a config that was asked for cannot run."""
    config = problem.config
    if not isinstance(config, Config):
        return f"config {config} is no mosaic_gpu.Config"
    for name, taken in SIZES.items():
        if getattr(config, name) not in taken:
            return f"{config}: {name} is none of {tuple(taken)}"
    sizes = plan(problem.m, problem.weight, config, problem.bias)
    if isinstance(sizes, str):
        return f"{config}: {sizes}"
    most = sizes.turns * config.rows  # what comes in beyond them nobody would wait for
    if not 1 <= config.steps <= most or min(config.blocks, config.early) < 0:
        return f"{config}: rings of {most} tiles have 1 to {most} steps, blocks and early are >= 0"
    return None


def joins(problems: Sequence[Problem]) -> str | None:
    """None, or why weights of one x are not one launch."""
    reason = unlike(problems, hopper_layout.ROWS)
    if reason is not None:
        return reason
    whole = whole_problem(problems)
    if next(configs(whole.m, whole.weight), None) is None:
        return f"no way to cut k = {whole.weight.k}, n = {whole.weight.n} fits the chip"
    return None


def unlike(problems: Sequence[Problem], unit: int) -> str | None:
    """None, or how problems differ in more than their channels; these fill tiles of `unit`."""
    first, *rest = problems
    if any(p._replace(weight=first.weight) != first for p in rest):
        return "they differ in more than their weights"
    if any(p.weight._replace(n=0) != first.weight._replace(n=0) for p in rest):
        return "their weights differ in more than their channels"
    odd = next((p.weight.n for p in problems if p.weight.n % unit), None)
    return None if odd is None else f"{odd} channels do not fill tiles of {unit}"


def whole_problem(problems: Sequence[Problem]) -> Problem:
    """That of the weights side by side."""
    first = problems[0]
    return first._replace(weight=first.weight._replace(n=sum(p.weight.n for p in problems)))


def run(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """`x @ w` of one device, with its bias and activation."""
    (y,) = run_joined(x, [arrays], [problem])
    return y


def run_joined(
    x: jax.Array, arrays: Sequence[dict[str, jax.Array]], problems: Sequence[Problem]
) -> list[jax.Array]:
    """`[x @ w for w in weights]`, one launch."""
    whole = whole_problem(problems)
    config = whole.config or choose_config(whole.m, whole.weight, Device.default().kind, whole.bias)
    assert config is not None, "supports() found one"
    channels = tuple(p.weight.n for p in problems)
    return launch(whole, config, channels, x, list(arrays))


def columns_of(y: jax.Array, channels: Sequence[int]) -> list[jax.Array]:
    """The result of each weight, of all results side by side."""
    ends = itertools.accumulate(channels)
    return [y[:, end - n : end] for end, n in zip(ends, channels, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # traced once for the layers of a model
def launch(
    whole: Problem,
    config: Config,
    channels: tuple[int, ...],
    x: jax.Array | tuple[jax.Array, ...],
    arrays: list[dict[str, jax.Array]],
) -> list[jax.Array]:
    """`[m, n]` of each weight. With a norm in front x is the operands of `add_norm`, whose sum is
    the first result; with a gate there is one.
    """
    from pallas_kernels.quantized_matmul import hopper_kernel  # needs a jax with Mosaic GPU

    return hopper_kernel.kernel(whole, config, channels)(x, arrays)
