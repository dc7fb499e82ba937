"""The Hopper kernel for m > 16 without a GPU: what its lanes exchange, and its plans.

`_operand` is the arithmetic of `hopper_fragments` in numpy, lane by lane and bit by bit. That the
device runs it so is checked on the device (experiments/prefill_kernels.py check).
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOSAIC, needs_mosaic
from hopper_operands import LANES, PLACES, by_lane, weight_of
from jax import lax
from test_hopper import (
    H100,
    WEIGHTS,
    _halves,
    _operands,
    _order,
    _pack,
    _pairs,
)

from pallas_kernels.dispatch import choose
from pallas_kernels.quantized_matmul import hopper_layout, mosaic_gpu, mosaic_wgmma, problems
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight

# what an even lane takes of two words, and an odd one: of numbers, and of a codebook
SELECTORS = (0x6240, 0x7351), (0x5410, 0x7632)
R, C = LANES // 4, LANES % 4


def _prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(7)
        byte = np.where(nibble < 4, a >> 8 * nibble, b >> 8 * (nibble & 3)) & np.uint32(255)
        out |= byte << np.uint32(8 * i)
    return out


def _exchanged(weight: Weight, line: np.ndarray) -> list[np.ndarray]:
    """The registers of a lane's operands, from 128 words of a warp."""
    blocks = 1 if "8" in weight.code else 2
    inner = C if blocks == 1 else 2 * (C // 2)
    taken = [
        [line[PLACES[4 * R + other] + inner + block] for other in range(4)]
        for block in range(blocks)
    ]
    out = []
    for parts in taken:
        if blocks == 2:
            even, odd = SELECTORS[weight.values is not None]
            pair_of = np.where(C % 2 == 1, np.uint32(odd), np.uint32(even))
            parts = [_prmt(*parts[i : i + 2], pair_of) for i in (0, 2)]
        half = len(parts) // 2
        out += [*_pairs(weight, parts[:half]), *_pairs(weight, parts[half:])]
    return out


@pytest.mark.parametrize("name", WEIGHTS)
def test_lanes_exchange_what_wgmma_wants_of_them(name: str) -> None:
    weight, logical = WEIGHTS[name], _operands(name)
    codes = np.asarray(_pack(logical, weight)["codes"]).view(np.uint32)
    value = logical["codes"].astype(np.float64)
    if weight.values is not None:  # as the kernel's table has them
        value = np.asarray(weight.values, np.float32).astype(jnp.bfloat16)[value.astype(int)]
    lines = codes.shape[2] // 128
    wanted = np.full((codes.shape[1] * 128, codes.shape[0] * 16), np.nan)
    wanted[: weight.k, : weight.n] = value
    plain = weight.values is None and "8" not in weight.code
    start = 128.0 - hopper_layout.lowest(weight) if plain else 0.0
    for row, tile, line in itertools.product(*map(range, codes.shape[:2]), range(lines)):
        held = codes[row, tile, 128 * line : 128 * line + 128]
        for i, pair in enumerate(_exchanged(weight, held)):
            step, j = divmod(i, 4)
            k = 128 * tile + 128 // lines * line + 16 * step + 8 * (j // 2) + 2 * C
            for e, got in enumerate(_halves(pair)):
                known = wanted[k + e, 16 * row + R + 8 * (j % 2)]
                inside = ~np.isnan(known)
                np.testing.assert_array_equal((got - start)[inside], known[inside])


def _twin(strips: int):
    """What `fragments` returns for int4 in groups of 128 with bfloat16 scales, in plain jax."""

    def decode(refs):
        codes, scale = refs[0][...], refs[1][...]
        # tile, half, r, c, block, step of decoding
        words = by_lane(codes.reshape(4, strips, 128)).reshape(4, strips, 8, 4, 2, 2)
        words = words.swapaxes(-1, -2)
        shifts = 4 * lax.broadcasted_iota(jnp.int32, (1,) * 6 + (8,), 6)
        nibbles = (words[..., None] >> shifts) & 15  # j + 4 e
        cut = nibbles.reshape(4, strips, 8, 4, 2, 2, 2, 2, 2)  # ..., block, i, e, j // 2, j % 2
        cut = cut.transpose(0, 8, 2, 1, 4, 3, 5, 7, 6).reshape(64, 64 * strips)
        wide = jnp.stack([scale << 16, scale & jnp.int32(-65536)], 1)  # tile, half, r
        wide = lax.bitcast_convert_type(wide, jnp.float32).reshape(64, 1)
        return ((cut - 8).astype(jnp.float32) * wide).astype(jnp.bfloat16)

    return decode


@needs_mosaic
@pytest.mark.parametrize(
    ("config", "out"),
    [
        (Config(32, 2, 2), "bfloat16"),
        (Config(64, 1, 3, width=1, channels=64), "bfloat16"),
        (Config(128, 1, 2), "float32"),  # written in two strips
    ],
)
def test_the_interpreted_kernel_multiplies(
    config: Config, out: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.quantized_matmul import hopper_wgmma

    monkeypatch.setattr(hopper_wgmma, "MULTIPROCESSORS", 2)  # blocks take tiles in turns
    weight = Weight(384, 384, 128, "int4", "bfloat16")
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (weight.k, weight.n))
    scale = rng.uniform(0.5, 2, (3, weight.n)).astype(jnp.bfloat16)
    parts = [slice(0, 128), slice(128, 384)]  # two weights of one x
    arrays = [
        _pack({"codes": codes[:, p].astype("int4"), "scale": scale[:, p]}, weight._replace(n=n))
        for p, n in zip(parts, (128, 256), strict=True)
    ]
    x = jnp.asarray(rng.normal(size=(83, weight.k)), jnp.bfloat16)
    problem = Problem(83, weight, "hopper4", "bfloat16", out)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(hopper_wgmma.kernel(problem, config, (128, 256), _twin(config.strips)))(
            x, arrays
        )
    assert "RACE" not in capfd.readouterr().out
    w = (codes * np.repeat(scale.astype(np.float32), 128, 0)).astype(jnp.bfloat16)
    truth = np.asarray(x, np.float64) @ w.astype(np.float64)
    # float32 sums of 384 products of bfloat16, then half a unit of bfloat16: 2^-9
    bound = (2**-9 * (out == "bfloat16") + 384 * 2**-24) * np.abs(truth).max()
    assert np.abs(np.asarray(got, np.float64) - truth).max() <= bound


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "config", "ends"),
    [
        ("zeros", Config(64, 1, 4, 2), ()),
        ("offsets", Config(64, 1, 4, 1, 2), ()),
        ("int8", Config(128, 1, 3), (True, "silu")),
        ("nf4", Config(32, 2, 4, 1, 2, channels=64, teams=2), ()),
        ("int8", Config(32, 1, 4, teams=2), (True, "relu")),
    ],
)
def test_it_lowers_for_a_gpu(name: str, config: Config, ends: tuple) -> None:
    weight, arrays = WEIGHTS[name], _pack(_operands(name), WEIGHTS[name])
    layout = next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n] is _order(weight))
    problem = Problem(70, weight, layout, "bfloat16", "bfloat16", *ends)
    if problem.bias:
        arrays["bias"] = jnp.zeros(weight.n)
    x = jnp.zeros((70, weight.k), jnp.bfloat16)
    call = jax.jit(lambda x, a: mosaic_wgmma.launch(problem, config, (weight.n,), x, [a]))
    lowered = call.trace(x, arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_mosaic
@pytest.mark.parametrize("warpgroups", [1, 2, 4])
def test_a_block_asks_for_no_more_registers_than_it_was_launched_with(warpgroups: int) -> None:
    """Else the last warpgroup waits for them forever: seen on a device."""
    from pallas_kernels.quantized_matmul import hopper_wgmma

    each = min(65536 // (128 * (warpgroups + 1)), 255) // 8 * 8  # how many ptxas gives a thread
    asked = hopper_wgmma.LOADER + warpgroups * hopper_wgmma.registers(warpgroups)
    assert asked <= each * (warpgroups + 1)


@pytest.mark.parametrize("m", [17, 32, 128, 1000, 16384])
def test_configs_fit_the_chip(m: int) -> None:
    for weight in problems.LARGE.values():
        layout = next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)
        problem = Problem(m, weight, layout, "bfloat16", "bfloat16")
        found = list(mosaic_wgmma.configs(problem))
        assert found
        for us, config in found:
            assert us > 0
            assert mosaic_wgmma.fits(problem, config) is None
            assert mosaic_wgmma.shared_bytes(problem, config) <= mosaic_gpu.SHARED_MEMORY
            assert config.rows % (8 * config.split) == 0


def test_dispatch_takes_it_from_seventeen_rows_on() -> None:
    weight = Weight(4096, 4096, 128, "int4", "bfloat16")
    problem = Problem(17, weight, "hopper4", "bfloat16", "bfloat16")
    ask = lambda p: mosaic_wgmma.supports(p, H100) or ""
    if not MOSAIC:
        assert "jax 0.11 or newer" in ask(problem)
        return
    assert choose("quantized_matmul", problem, H100) == "mosaic_wgmma"
    assert choose("quantized_matmul", problem._replace(m=16), H100) == "mosaic_gpu"
    assert "x has 16 rows" in ask(problem._replace(m=16))
    assert "not both multiples of 8" in ask(problem._replace(weight=weight._replace(n=4100)))
    assert "x is float32" in ask(problem._replace(x="float32"))
    assert choose("quantized_matmul", problem._replace(weight=weight._replace(n=64)), H100) == (
        "mosaic_wgmma"
    )


@needs_mosaic
def test_results_of_one_strip_are_padded_to_two() -> None:
    """An index along an axis of one is dropped, and the second warpgroup would overwrite the first:
    seen on a device.
    """
    weight = Weight(128, 40, 128, "int4", "bfloat16")
    arrays = {n: jnp.zeros(v.shape, v.dtype) for n, v in LAYOUTS["hopper4"].shapes(weight).items()}
    problem = Problem(24, weight, "hopper4", "bfloat16", "bfloat16")
    call = lambda x, a: mosaic_wgmma.launch(problem, Config(32, 2, 3), (40,), x, [a])
    x = jnp.zeros((24, 128), jnp.bfloat16)
    text = jax.jit(call).trace(x, arrays).lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert kernel.rstrip().endswith("tensor<24x128xbf16>")


def test_the_table_holds_what_can_run() -> None:
    tables = sorted(mosaic_wgmma.TABLES.glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        assert table["command"]
        for row in table["rows"]:
            weight, config = weight_of(row), Config(*row["config"])
            layout = "hopper8" if row["format"] in ("int8", "fp8") else "hopper4"
            problem = Problem(row["m"], weight, layout, "bfloat16", "bfloat16")
            assert row["words"] == mosaic_gpu.tile_words(weight)
            assert mosaic_wgmma.fits(problem, config) is None
            assert mosaic_wgmma.choose_config(problem, table["device"]) == config


def test_rows_between_those_of_the_table_take_the_next_larger_ones() -> None:
    weight = Weight(8192, 8192, 128, "int4", "bfloat16")
    chosen = lambda m, kind: mosaic_wgmma.choose_config(
        Problem(m, weight, "hopper4", "bfloat16", "bfloat16"), kind
    )
    (path,) = mosaic_wgmma.TABLES.glob("NVIDIA_H200.json")
    rows = json.loads(path.read_text())["rows"]
    known = {
        row["m"]: Config(*row["config"])
        for row in rows
        if (row["format"], row["k"], row["n"]) == ("int4", 8192, 8192)
    }
    assert {128, 256} <= set(known)
    assert known[128] != known[256]
    assert chosen(129, "NVIDIA H200") == known[256]
    assert chosen(128, "NVIDIA H200") == chosen(65, "NVIDIA H200") == known[128]
    assert 512 not in known
    guess = lambda m: chosen(m, "a card without a table")
    assert chosen(512, "NVIDIA H200") == guess(512)  # 1024 rows are twice as many
