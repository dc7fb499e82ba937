"""Hopper's warpgroup products through Pallas Mosaic GPU, m > 16: what they support, how the work is
cut. No GPU is needed to ask; the kernel is in `hopper_wgmma` and imported when it runs.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import hopper_layout, mosaic_gpu
from pallas_kernels.quantized_matmul.problem import Problem, Weight

CHANNELS = 128  # of which weights side by side have a multiple; tiles may need more
STRIP = 64  # of k, what the tensor cores take at once
CLUSTERS = ((1, 1), (2, 1), (4, 1), (1, 2))  # blocks that split k, that share x: checked ones
AT_ONCE = {split: mosaic_gpu.AT_ONCE[split] for split, _ in CLUSTERS}  # blocks, by their split
ROWS = (32, 64, 128, 256)  # of a tile: checked ones
BLOCKS = ((128, 1), (64, 2), (128, 2), (256, 1))  # channels, teams: checked ones
LEAST_ROWS = mosaic_gpu.MAX_ROWS + 1
TABLES = pathlib.Path(__file__).parent / "tables_wgmma"
# device kind -> what was measured on it; read once, since every matmul of a model asks
TUNED = {path.stem: json.loads(path.read_text())["rows"] for path in TABLES.glob("*.json")}


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: of x in a tile.
      strips: of 64 along k in a stage, 1 or 2.
      steps: stages in shared memory.
      split: blocks of a cluster that share k of a tile in the last round of tiles; before it each
        has its own.
      shared: blocks of a cluster that share x by multicast; 1 where k is split.
      width: tiles along m, after which the next channels come.
      channels: of a tile; each warpgroup has 64.
      teams: of warpgroups in a block; they take stages in turns.
    """

    rows: int = 256
    strips: int = 1
    steps: int = 4
    split: int = 1
    shared: int = 1
    width: int = 8
    channels: int = 128
    teams: int = 1


def part_names(weight: Weight) -> list[str]:
    """What a stage holds beside codes."""
    if hopper_layout.per_channel(weight):
        return []
    return ["scale", *(n for n in ("zero", "offset") if getattr(weight, n) is not None)]


def part_words(weight: Weight, name: str, deep: int) -> int:
    """Words of a tile's scales, zero points or offsets in a stage of `deep` halves."""
    whole = hopper_layout.group_words(weight, name)
    return whole if weight.group == hopper_layout.DEPTH else whole // 2 * deep


def stage_bytes(weight: Weight, config: Config) -> int:
    """Of x and of the weight, in one stage."""
    words = hopper_layout.code_words(weight) // 2 * config.strips
    words += sum(part_words(weight, name, config.strips) for name in part_names(weight))
    words *= config.channels // hopper_layout.ROWS
    return config.strips * STRIP * config.rows * 2 + 4 * words


class Rounds(NamedTuple):
    """Who takes the tiles; where blocks of a cluster share x, as many side by side count as one.

    Attributes:
      clusters: of blocks, along the tiles.
      whole: tiles before the last round, or all: a block has all of their k.
      rest: tiles of the last round, whose k the blocks of a cluster split, a tile a cluster.
    """

    clusters: int
    whole: int
    rest: int


def rounds(m: int, n: int, config: Config) -> Rounds:
    """Of a result `[m, n]`."""
    c = config
    tiles = -(-m // c.rows) * -(-n // (c.channels * c.shared))
    at_once = AT_ONCE[c.split]
    if c.split == 1:
        return Rounds(min(tiles, at_once // c.shared), tiles, 0)
    whole = tiles // at_once * at_once
    return Rounds(at_once // c.split if whole else tiles, whole, tiles - whole)


def team_words(config: Config) -> int:
    """Float32 numbers that the other teams of a block leave for its first one."""
    return config.channels * config.rows * (config.teams - 1)


def block_words(config: Config) -> int:
    """Float32 numbers that the other blocks of a cluster which splits k send to one of them."""
    return config.channels * config.rows // config.split * (config.split - 1)


def strips_out(config: Config) -> tuple[int, int]:
    """Strips of a result on their way out at once, and their rows; they divide those of a tile."""
    rows = config.rows // config.split
    at_once = 2 if config.split == 1 and rows > STRIP else 1  # sums that meet leave little room
    return at_once, min(STRIP, rows)


def turns(k: int, config: Config) -> int:
    """Of two stages of each team, along k."""
    return -(-k // (2 * config.teams * config.strips * STRIP))


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a block."""
    c, size = config, 2 if problem.out == "bfloat16" else 4
    total = c.steps * stage_bytes(problem.weight, c) + c.channels * math.prod(strips_out(c)) * size
    table = math.prod(mosaic_gpu.PAIR_TABLE) if problem.weight.values is not None else 0
    cut = rounds(problem.m, problem.weight.n, c)
    sums = team_words(c) + bool(cut.rest) * block_words(c)
    return total + 4 * (sums + table)


def fits(problem: Problem, config: Config) -> str | None:
    """None, or why the config cannot run the problem."""
    c = config
    if c.split not in AT_ONCE:
        return f"clusters of {c.split} blocks are none of {tuple(AT_ONCE)} that split k"
    if c.strips * hopper_layout.code_words(problem.weight) > 512:
        return "a copy takes at most 256 words of a tile"
    long = turns(problem.weight.k, c)
    if c.split > 1 and (c.rows % (8 * c.split) or c.shared > 1 or long < c.split):
        return f"{c.split} blocks cannot split {long} turns along k and {c.rows} rows"
    cut = rounds(problem.m, problem.weight.n, c)
    if c.split > 1 and cut.whole and not 0 < cut.rest <= cut.clusters:
        return f"the last round has {cut.rest} tiles, for {cut.clusters} clusters that split k"
    if (c.rows // c.split) % math.prod(strips_out(c)):
        return f"{c.rows // c.split} rows are no whole turns of strips of a result"
    if (
        c.steps % c.teams or c.steps < 2 * c.teams
    ):  # a team decodes its next while it multiplies one
        return f"{c.teams} teams cannot take {c.steps} stages in turns, two each"
    if c.channels * c.teams > 128 and c.rows > 64:
        return f"{c.channels // STRIP * c.teams} warpgroups have no registers for {c.rows} rows"
    if shared_bytes(problem, c) > mosaic_gpu.SHARED_MEMORY:
        return f"needs {shared_bytes(problem, c)} bytes of shared memory"
    return None


def configs(problem: Problem) -> Iterator[tuple[float, Config]]:
    """Configs that can run, each with a guess at its microseconds."""
    weight, m = problem.weight, problem.m
    for rows, cut, (split, shared) in itertools.product(ROWS, BLOCKS, CLUSTERS):
        if (rows > 32 and rows >= 2 * m) or (math.prod(cut) > 128 and rows > 64):
            continue
        if shared > 1 and weight.n <= cut[0]:
            continue
        if split > 2 and rounds(m, weight.n, Config(rows, split=split, channels=cut[0])).whole:
            continue  # no device has run it
        strips = 1 if rows > 64 or not _two_strips(weight, cut) else 2
        for steps in (12, 10, 8, 7, 6, 5, 4, 3):
            config = Config(rows, strips, steps, split, shared, 8, *cut)
            if fits(problem, config) is None:
                yield _guess(problem, config), config
                break


def _two_strips(weight: Weight, cut: tuple[int, int]) -> bool:
    """Whether two strips a stage are fewer instructions, and registers are there for two operands
    of them: else products wait for each other.
    """
    if hopper_layout.code_words(weight) > 256 or weight.values is not None:
        return False
    more = weight.zero or weight.offset or weight.group == 32
    return not (more and weight.scale != "bfloat16" and math.prod(cut) > 128)


def _guess(problem: Problem, c: Config) -> float:
    """Microseconds: rounds of tiles of so many strips along k, as they were measured on an H100;
    tiles of 256 channels on an H200.
    """
    cut = rounds(problem.m, problem.weight.n, c)
    alone = -(-cut.whole * c.shared // AT_ONCE[c.split])
    joint = -(-cut.rest * c.split // AT_ONCE[c.split])
    strip = max(0.18 + 0.0015 * c.rows, 0.0027 * c.rows)
    strip *= 0.98 if c.shared > 1 and c.rows > 128 else 1.0
    if c.teams > 1:
        strip *= 0.9 if c.channels == 128 else 0.55
    elif c.channels == 256:
        strip *= 1.75
    along, after = -(-problem.weight.k // STRIP) * strip, 1 + c.rows / 128
    return alone * (along + after) + joint * (along / c.split + after + 1.5) + 2


def unfilled(sizes: Sequence[int], config: Config) -> bool:
    """Whether one of several weights side by side fills no tiles."""
    return len(sizes) > 1 and any(n % config.channels for n in sizes)


def choose_config(problem: Problem, kind: str, sizes: Sequence[int] = ()) -> Config | None:
    """An exact row of the device's table, else that of the next larger m, below twice as many rows;
    else the best guess. None if no config can run. Channels of several weights are `sizes`.
    """
    weight, m = problem.weight, problem.m
    mine = mosaic_gpu.family(weight), weight.k, weight.n, mosaic_gpu.tile_words(weight)
    near = [
        row
        for row in TUNED.get(kind.replace(" ", "_"), [])
        if (row["format"], row["k"], row["n"], row["words"]) == mine and m <= row["m"] < 2 * m
    ]
    for row in sorted(near, key=lambda row: row["m"]):
        config = Config(*row["config"])
        if fits(problem, config) is None and not unfilled(sizes, config):
            return config
    guesses = (guess for guess in configs(problem) if not unfilled(sizes, guess[1]))
    return min(guesses, default=(0.0, None))[1]


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, m > 16, weights in a layout for Hopper, on an H100 or H200 with jax 0.11."""
    reason = mosaic_gpu.unfit(problem, device)
    if reason is not None:
        return reason
    if problem.m < LEAST_ROWS:
        return f"x has {problem.m} rows, it takes {LEAST_ROWS} or more"
    if problem.weight.k % 8 or problem.weight.n % 8:
        return (
            f"k = {problem.weight.k} and n = {problem.weight.n} are not both multiples of 8, so "
            "rows are not aligned"
        )
    if problem.config is not None:
        return refused(problem)
    if next(configs(problem), None) is None:
        return "no way to cut it fits the chip"
    return None


def refused(problem: Problem) -> str | None:
    """None, or why a config that was asked for cannot run."""
    c = problem.config
    if not isinstance(c, Config):
        return f"config {c} is no mosaic_wgmma.Config"
    for name, value, taken in (
        ("rows", c.rows, ROWS),
        ("strips", c.strips, (1, 2)),
        ("(channels, teams)", (c.channels, c.teams), BLOCKS),
        ("(split, shared)", (c.split, c.shared), CLUSTERS),
    ):
        if value not in taken:
            return f"{c}: {name} is none of {taken}"
    if c.width < 1 or (c.shared > 1 and problem.weight.n <= c.channels):
        return f"{c}: width is at least 1, and tiles of {problem.weight.n} channels to share x two"
    reason = fits(problem, c)
    return reason and f"{c}: {reason}"


def joins(problems: Sequence[Problem]) -> str | None:
    """None, or why weights of one x are not one launch."""
    return mosaic_gpu.unlike(problems, CHANNELS)


def run(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """`x @ w` of one device, with its bias and activation."""
    (y,) = run_joined(x, [arrays], [problem])
    return y


def run_joined(
    x: jax.Array, arrays: Sequence[dict[str, jax.Array]], problems: Sequence[Problem]
) -> list[jax.Array]:
    """`[x @ w for w in weights]`, one launch."""
    whole = mosaic_gpu.whole_problem(problems)
    channels = tuple(p.weight.n for p in problems)
    config = whole.config or choose_config(whole, Device.default().kind, channels)
    assert config is not None, "supports() found one"
    return mosaic_gpu.columns_of(launch(whole, config, channels, x, list(arrays)), channels)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # traced once for the layers of a model
def launch(
    whole: Problem,
    config: Config,
    channels: tuple[int, ...],
    x: jax.Array,
    arrays: list[dict[str, jax.Array]],
) -> jax.Array:
    """`[m, n]` of all weights side by side."""
    from pallas_kernels.quantized_matmul import hopper_wgmma  # needs a jax with Mosaic GPU

    return hopper_wgmma.kernel(whole, config, channels)(x, arrays)
