"""The Hopper kernel for m > 16 without a GPU: interpreted, lowered, and its plans. Its inline code
runs in test_wgmma_lanes, and all of it on the device (experiments/prefill_kernels.py check).
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOSAIC, needs_mosaic
from hopper_operands import by_lane, weight_of
from jax import lax
from jax.experimental import pallas as pl
from test_hopper import (
    H100,
    WEIGHTS,
    _operands,
    _order,
    _pack,
)

from pallas_kernels.dispatch import choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma, problems
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight


def _numbers(codes: jax.Array, count: int, order: tuple[int, ...], strips: int) -> jax.Array:
    """Codes of a stage as `[64, 64 strips]`: `count` of a word, whose number is that of bits of
    `order`, the highest first: the places of b, e and h among axes tile, half, r, c, p, ...
    """
    words = by_lane(codes.reshape(4, -1, 128))  # tile, half or b, r, c, p
    bits = 32 // count
    shifts = bits * lax.broadcasted_iota(jnp.int32, (1,) * 5 + (count,), 5)
    cut = (words[..., None] >> shifts) & (2**bits - 1)
    cut = cut.reshape(4, -1, 8, 4, 4, *(2,) * (3 if count == 8 else 2))
    return cut.transpose(order).reshape(64, 64 * strips)


def _twin(weight: Weight, strips: int, unit: float):
    """What `fragments` returns, in plain jax: for int4 in groups of 128 with bfloat16 scales, nf4
    in groups of 64 with float32 scales, and int8.
    """

    def int4(refs):
        codes, scale = refs[0][...], refs[1][...]
        numbers = _numbers(codes, 8, (0, 7, 2, 1, 6, 3, 4, 5), strips) - 8  # e, b, h
        wide = jnp.stack([scale << 16, scale & jnp.int32(-65536)], 1)  # tile, half, r
        wide = lax.bitcast_convert_type(wide, jnp.float32).reshape(64, 1)
        return (numbers.astype(jnp.float32) * wide / unit).astype(jnp.bfloat16)

    def nf4(refs):
        numbers = _numbers(refs[0][...], 8, (0, 6, 2, 1, 5, 3, 4, 7), strips)  # b, h, e
        book = [jnp.float32(jnp.bfloat16(v)) for v in weight.values]
        value = sum(jnp.where(numbers == i, v, 0) for i, v in enumerate(book))
        scale = lax.bitcast_convert_type(refs[1][...], jnp.float32).reshape(4, strips, 16)
        wide = jnp.repeat(scale.transpose(0, 2, 1).reshape(64, strips), 64, 1)
        return (value * wide / unit).astype(jnp.bfloat16)

    def int8(refs):
        numbers = _numbers(refs[0][...], 4, (0, 6, 2, 1, 3, 4, 5), strips) - 128  # e, h
        return (numbers.astype(jnp.float32) / unit).astype(jnp.bfloat16)

    return int8 if weight.code == "int8" else nf4 if weight.values else int4


def _finish(problem: Problem, rows: int):
    """What `finish` returns, in plain jax."""
    from pallas_kernels.quantized_matmul import hopper_fragments

    unit, out = hopper_fragments.unit(problem.weight), problem.out

    def last(sums, refs, first):
        of = [ref[pl.ds(first[0], 64)] for ref in refs]
        y = sums * unit
        y = y * lax.broadcast_in_dim(of[0], y.shape, (0,)) if len(of) > 1 else y
        return (y + lax.broadcast_in_dim(of[-1], y.shape, (0,)) if of else y).astype(out)

    return last


INT4 = Weight(384, 0, 128, "int4", "bfloat16")
NF4 = Weight(384, 0, 64, "uint4", values=problems.NF4)
INT8 = Weight(384, 0, 384, "int8")


def _interpreted(
    config: Config,
    out: str,
    capfd: pytest.CaptureFixture[str],
    sizes: tuple = (128, 256),
    weight: Weight = INT4,
) -> tuple:
    """The result of the kernel in jax's interpreter, of weights of one x `[83, 384]` of so many
    channels, of int8 with a bias; x, the weights side by side, and the bias.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.quantized_matmul import hopper_fragments, hopper_wgmma

    weight, biased = weight._replace(n=sum(sizes)), weight.code == "int8"
    twin = _twin(weight, config.strips, hopper_fragments.unit(weight))
    rng = np.random.default_rng(0)
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128)}[weight.code]
    codes = rng.integers(low, high, (weight.k, weight.n))
    scale = rng.uniform(0.5, 2, (weight.groups, weight.n)).astype(weight.scale)
    bias = 100 * rng.normal(size=weight.n) * biased
    parts = [slice(end - n, end) for end, n in zip(itertools.accumulate(sizes), sizes, strict=True)]
    arrays = [
        _pack(
            {"codes": codes[:, p].astype(weight.code), "scale": scale[:, p]}, weight._replace(n=n)
        )
        | ({"bias": jnp.asarray(bias[p], jnp.float32)} if biased else {})
        for p, n in zip(parts, sizes, strict=True)
    ]
    x = jnp.asarray(rng.normal(size=(83, weight.k)), jnp.bfloat16)
    layout = "hopper8" if biased else "hopper4"
    problem = Problem(83, weight, layout, "bfloat16", out, biased)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(hopper_wgmma.kernel(problem, config, sizes, twin))(x, arrays)
    assert "RACE" not in capfd.readouterr().out
    values = codes.astype(np.float32)
    if weight.values is not None:
        values = np.asarray(weight.values, jnp.bfloat16).astype(np.float32)[codes]
    w = values * np.repeat(scale.astype(np.float32), weight.group, 0)
    w = w if biased else w.astype(jnp.bfloat16)
    return np.asarray(got, np.float64), np.asarray(x, np.float64), w.astype(np.float64), bias


def _bound(out: str, truth: np.ndarray) -> float:
    """Float32 sums of 384 products of bfloat16, then half a unit of bfloat16: 2^-8."""
    return float((2**-8 * (out == "bfloat16") + 384 * 2**-24) * np.abs(truth).max())


@needs_mosaic
@pytest.mark.parametrize(
    ("config", "out", "sizes", "weight"),
    [
        (Config(32, 2, 2), "bfloat16", (128, 256), INT4),
        (Config(64, 1, 3, width=1, channels=64), "bfloat16", (128, 256), INT4),
        (Config(128, 1, 2), "float32", (128, 256), INT4),  # written in two strips
        (Config(64, 1, 2, channels=256), "bfloat16", (256, 512), INT4),
        (Config(64, 1, 3), "float32", (128, 256), NF4),
        (Config(64, 1, 2, channels=256), "float32", (256, 256), INT8),
        (Config(32, 1, 3), "float32", (328,), INT8),  # the last tile is beyond the channels
    ],
)
def test_the_interpreted_kernel_multiplies(
    config: Config,
    out: str,
    sizes: tuple,
    weight: Weight,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from pallas_kernels.quantized_matmul import hopper_wgmma

    monkeypatch.setitem(mosaic_wgmma.AT_ONCE, 1, 2)  # blocks take tiles in turns
    monkeypatch.setattr(hopper_wgmma, "finish", _finish)
    got, x, w, bias = _interpreted(config, out, capfd, sizes, weight)
    truth = x @ w + bias
    assert np.abs(got - truth).max() <= _bound(out, truth)


MARKS = {"Teams": 100, "Blocks": 1000}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list:
    """Calls of `Teams`, `Blocks` and `Exchange`, which send nothing here: the interpreter knows no
    messages between blocks or warpgroups. Who adds gets its own sums of its rows and a mark; of
    what is sent the calls say whether teams have added it up.
    """
    from pallas_kernels.quantized_matmul import hopper_fragments, hopper_wgmma

    calls: list = []
    added: list = []

    class Silent:
        def __init__(self, *how: int) -> None:
            self.how = how

        def __getattr__(self, name: str):
            return lambda *of: calls.append((type(self).__name__, *self.how, name))

        def send(self, sums: jax.Array, *of: object) -> None:
            calls.append(("Blocks", *self.how, "send", any(sums is v for v in added)))

        def add(self, sums: jax.Array, slots: object) -> jax.Array:
            kind = type(self).__name__
            calls.append((kind, *self.how, "add"))
            split = self.how[1] if kind == "Blocks" else 1
            rows = self.how[0] // split
            first = lax.axis_index("cluster") * rows if split > 1 else 0
            mine = lax.dynamic_slice_in_dim(sums, first, rows, 1)
            added.append(mine + MARKS[kind] / hopper_fragments.unit(INT4))
            return added[-1]

    for name in ("Teams", "Blocks", "Exchange"):
        monkeypatch.setattr(hopper_wgmma, name, type(name, (Silent,), {}))
    return calls


@needs_mosaic
@pytest.mark.parametrize(
    ("config", "at_once", "first"),  # from which channel on tiles are of the last round
    [
        (Config(64, 1, 3, 2), 4, 256),  # of six tiles two, for as many clusters
        (Config(64, 1, 3, 2), 8, 0),  # all
        (Config(32, 1, 4, 2), 4, 256),  # of nine tiles one, for two clusters
        (Config(32, 1, 4, 2), 16, 0),
    ],
)
def test_blocks_split_k_in_the_last_round(
    config: Config,
    at_once: int,
    first: int,
    silent: list,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(mosaic_wgmma.AT_ONCE, 2, at_once)
    got, x, w, _ = _interpreted(config, "float32", capfd)
    truth, half = x @ w, config.rows // 2
    last = range(64, 83, half) if config.rows == 32 and first else range(0, 83, half)
    for row in last:  # one block has turn 0 of 128 along k, the other the other two
        k = slice(0, 128) if row % config.rows == 0 else slice(128, 384)
        part = x[row : row + half, k] @ w[k, first:]
        truth[row : row + half, first:] = part + MARKS["Blocks"]
    assert np.abs(got - truth).max() <= _bound("float32", truth)
    joint, shared = (
        ("Blocks", config.rows, 2, 2),
        ("Exchange", 4 * mosaic_wgmma.block_words(config)),
    )
    assert silent == [  # of the warpgroup that loads, then of those that multiply
        (*shared, "open"),
        (*shared, "meet"),
        (*shared, "meet"),
        (*joint, "send", False),
        (*shared, "wait"),
        (*joint, "add"),
    ]


@needs_mosaic
@pytest.mark.parametrize("split", [1, 2])
def test_the_second_team_leaves_its_sums(
    split: int, silent: list, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mosaic_wgmma.AT_ONCE, 1, 2)
    monkeypatch.setitem(mosaic_wgmma.AT_ONCE, 2, 64)
    config = Config(32, 1, 4, split, channels=64, teams=2)
    got, x, w, _ = _interpreted(config, "float32", capfd)
    stage = np.arange(384) // 64
    truth = np.full(got.shape, float(MARKS["Teams"]))
    for rank in range(split):  # blocks have the first 256 of k, and the rest, of rows in turn
        own = (stage % 2 == 0) & ((stage // 4 == rank) | (split == 1))
        rows = np.arange(83) // (32 // split) % split == rank
        truth[rows] += x[rows][:, own] @ w[own] + MARKS["Blocks"] * (split > 1)
    assert np.abs(got - truth).max() <= _bound("float32", truth)
    of_teams = [call[-1] for call in silent if call[0] == "Teams"]
    assert of_teams == ["meet", "leave", "meet", "add"]  # wait for the sums before, and for these
    sent = [call for call in silent if call[-2] == "send"]
    assert sent == [("Blocks", 32, 2, 1, "send", True)] * (split > 1)


def test_each_tile_is_taken_once() -> None:
    weight = Weight(4096, 4096, 128, "int4", "bfloat16")
    kinds = set()
    for m, n in itertools.product((17, 64, 200, 264, 1024, 1536), (64, 6144, 8192, 11520, 28672)):
        problem = Problem(m, weight._replace(n=n), "hopper4", "bfloat16", "bfloat16")
        cuts = [Config(r, 1, 3, s) for r in (32, 64, 256) for s in (2, 4)]
        cuts += [c for _, c in mosaic_wgmma.configs(problem)]
        for c in cuts:
            cut = mosaic_wgmma.rounds(m, n, c)
            if mosaic_wgmma.fits(problem, c) is not None:
                continue
            whole = [  # by the rank in a cluster, its cluster, its round
                i * c.split + rank
                for cluster, rank in itertools.product(range(cut.clusters), range(c.split))
                for i in range(cluster, cut.whole // c.split, cut.clusters)
            ]
            rest = [cut.whole + i for i in range(min(cut.clusters, cut.rest))]
            tiles = -(-m // c.rows) * -(-n // (c.channels * c.shared))
            assert sorted(whole + rest) == list(range(tiles)), (m, n, c)
            kinds.add((c.split, cut.whole > 0, 0 < cut.rest < cut.clusters))
    assert {(2, True, True), (4, True, True), (2, False, False), (1, True, False)} <= kinds


def test_weights_side_by_side_fill_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile has channels of one weight."""
    weight = Weight(4096, 28672, 128, "int4", "bfloat16")
    problem = Problem(64, weight, "hopper4", "bfloat16", "bfloat16")
    wide = Config(64, 2, 4, channels=256)
    row = {"k": 4096, "n": 28672, "words": mosaic_gpu.tile_words(weight), "m": 64}
    held = [row | {"format": "int4", "config": list(wide)}]
    monkeypatch.setitem(mosaic_wgmma.TUNED, "some_card", held)
    chosen = lambda *sizes: mosaic_wgmma.choose_config(problem, "some card", sizes)
    assert chosen() == chosen(28672) == chosen(28672 - 256, 256) == wide
    monkeypatch.setattr(mosaic_wgmma, "configs", lambda _: [(1.0, wide), (2.0, Config(64, 2, 4))])
    assert chosen(28672 - 128, 128) == Config(64, 2, 4)
    cuts: list = []
    monkeypatch.setattr(mosaic_wgmma, "launch", lambda _, c, *rest: cuts.append(c) or jnp.zeros(()))
    monkeypatch.setattr(mosaic_gpu, "columns_of", lambda y, sizes: sizes)
    monkeypatch.setattr(mosaic_wgmma.Device, "default", lambda: Device("gpu", "some card"))
    each = [problem._replace(weight=weight._replace(n=n)) for n in (28672 - 128, 128)]
    assert mosaic_wgmma.run_joined(jnp.zeros(()), [{}, {}], each) == (28672 - 128, 128)
    assert cuts == [Config(64, 2, 4)]
    if MOSAIC:
        from pallas_kernels.quantized_matmul import hopper_wgmma

        with pytest.raises(ValueError, match=r"\(28544, 128\) channels .* multiple of 256"):
            hopper_wgmma.kernel(problem, wide, (28672 - 128, 128))


@needs_mosaic
@pytest.mark.parametrize("n", [40, 768, 6400])
def test_numbers_of_channels_reach_to_the_end_of_tiles(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes read those of all channels of a tile, and of all that share x."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.quantized_matmul import hopper_wgmma

    weight = Weight(256, n, 256, "int8")
    problem = Problem(64, weight, "hopper8", "bfloat16", "bfloat16", True)
    given: list = []

    def kernel(body, out_type, **how):
        return lambda *operands: given.append(operands) or jnp.zeros(out_type.shape)

    monkeypatch.setattr(plgpu, "kernel", kernel)
    shapes = LAYOUTS["hopper8"].shapes(weight) | {"bias": jax.ShapeDtypeStruct((n,), jnp.float32)}
    arrays = {name: jnp.zeros(v.shape, v.dtype) for name, v in shapes.items()}
    taken = 0
    for (channels, teams), shared in itertools.product(mosaic_wgmma.BLOCKS, (1, 2)):
        config = Config(32, 1, 4, 1, shared, 8, channels, teams)
        hopper_wgmma.kernel(problem, config)(jnp.zeros((64, 256), jnp.bfloat16), [arrays])
        *_, scale, bias = given[-1]
        assert len(scale) == len(bias) >= -(-n // (channels * shared)) * channels * shared
        taken += 1
    assert taken == len(given) == 8


def test_tiles_of_256_channels_are_offered_where_warps_have_room() -> None:
    def offered(n: int, m: int, weight: Weight = INT4) -> dict:
        problem = Problem(m, weight._replace(k=8192, n=n), "hopper4", "bfloat16", "bfloat16")
        return {c: us for us, c in mosaic_wgmma.configs(problem)}

    wide = lambda found: {c for c in found if c.channels == 256}
    assert wide(offered(28672, 32))
    assert {c.strips for c in wide(offered(28672, 32))} == {2}
    zeros = Weight(0, 0, 64, "uint4", "float16", zero="uint4")
    assert {c.strips for c in wide(offered(28672, 32, zeros))} == {1}
    assert {c.rows for c in wide(offered(28672, 256))} == {32, 64}
    problem = Problem(128, INT4._replace(k=8192, n=8192), "hopper4", "bfloat16", "bfloat16")
    assert "4 warpgroups have no" in str(
        mosaic_wgmma.fits(problem, Config(128, 1, 3, channels=256))
    )
    for m in (32, 64):  # 32 tiles are no work for 132 multiprocessors, 112 are
        few, many = offered(8192, m), offered(28672, m)
        assert min(few, key=few.__getitem__).channels < 256
        assert min(many, key=many.__getitem__).channels == 256


def test_a_split_that_no_cluster_has_is_refused() -> None:
    weight = Weight(4096, 4096, 128, "int4", "bfloat16")
    problem = Problem(64, weight, "hopper4", "bfloat16", "bfloat16")
    for split in (3, 8):
        assert "none of (1, 2, 4)" in str(mosaic_wgmma.fits(problem, Config(96, 1, 3, split)))


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


@needs_mosaic
@pytest.mark.parametrize("name", ["int4", "nf4", "uint4_zeros"])
def test_shared_memory_is_what_the_kernel_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.quantized_matmul import hopper_wgmma

    how: dict = {}
    monkeypatch.setattr(plgpu, "kernel", lambda body, **given: how.update(given))
    weight = {
        "int4": Weight(8192, 8192, 128, "int4", "bfloat16"),
        "nf4": Weight(8192, 8192, 64, "uint4", values=problems.NF4),
        "uint4_zeros": Weight(8192, 8192, 64, "uint4", "float16", zero="uint4"),
    }[name]
    kinds = {17: "bfloat16", 64: "float32", 256: "bfloat16", 1000: "float32", 150: "float32"}
    for m, out in kinds.items():
        n = 28672 if m == 150 else weight.n  # the last round of tiles is short
        problem = Problem(m, weight._replace(n=n), "hopper4", "bfloat16", out)
        for _, config in mosaic_wgmma.configs(problem):
            hopper_wgmma.kernel(problem, config)
            scratch = jax.tree.leaves(
                how["scratch_types"], is_leaf=lambda v: hasattr(v, "memory_space")
            )
            arrays = [v for v in scratch if not hasattr(v, "num_barriers")]
            took = sum(int(np.prod(v.shape)) * jnp.dtype(v.dtype).itemsize for v in arrays)
            said = mosaic_wgmma.shared_bytes(problem, config)
            assert said <= took <= said + 8, config  # the barrier of sums


def test_results_leave_in_whole_turns_of_strips() -> None:
    problem = Problem(
        300, Weight(4096, 4096, 128, "int4", "bfloat16"), "hopper4", "bfloat16", "bfloat16"
    )
    for config in (Config(96, 1, 3), Config(192, 1, 3), Config(144, 1, 3, 2)):
        assert "no whole turns of strips" in str(mosaic_wgmma.fits(problem, config))


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


def test_rows_between_those_of_a_table_take_the_next_larger_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = Weight(8192, 8192, 128, "int4", "bfloat16")
    row = {"k": 8192, "n": 8192, "words": mosaic_gpu.tile_words(weight)}
    held = {200: Config(128, 1, 3), 100: Config(64, 1, 3), 40: Config(32, 1, 3)}
    rows = [{**row, "format": "int4", "m": m, "config": list(c)} for m, c in held.items()]
    others = [{**r, "format": "nf4", "config": list(Config(256, 1, 3))} for r in rows]
    monkeypatch.setitem(mosaic_wgmma.TUNED, "some_card", [*others, *rows])

    def chosen(m: int, kind: str = "some card") -> Config | None:
        problem = Problem(m, weight, "hopper4", "bfloat16", "bfloat16")
        return mosaic_wgmma.choose_config(problem, kind)

    found = {m: held[to] for m, to in ((21, 40), (40, 40), (51, 100), (100, 100), (101, 200))}
    assert {m: chosen(m) for m in found} == found
    for m in (20, 50, 201):  # half of a row's, or more than any
        assert chosen(m) == chosen(m, "a card without a table")
