"""The Hopper kernel without a GPU: where its layout puts things, its arithmetic, and its plans.

`_emulate` is the kernel's arithmetic lane by lane, in numpy: which word a lane reads, which bits
become which register, which x goes with it. The kernel itself runs in test_decode_lanes, and on the
device (experiments/tune_kernels.py check).
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from helpers import needs_mosaic
from hopper_operands import PLACES, weight_of
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import (
    hopper_codebook,
    hopper_layout,
    hopper_pairs,
    hopper_shape,
    mosaic_gpu,
    mosaic_wgmma,
)
from pallas_kernels.quantized_matmul.layout import Layout
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.op import quantized_matmul
from pallas_kernels.quantized_matmul.problem import Problem, Weight
from pallas_kernels.quantized_matmul.problems import NF4

H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
WEIGHTS = {
    "symmetric": Weight(256, 32, 128, "int4", "bfloat16"),
    "zeros": Weight(200, 24, 32, "uint4", "bfloat16", zero="uint4"),
    "signed zeros": Weight(128, 16, 64, "int4", "float16", zero="int4"),
    "offsets": Weight(136, 40, 64, "uint4", "float16", offset="float16"),
    "wide scales": Weight(128, 24, 32, "uint4", "float32", zero="uint4"),
    "int4 channel": Weight(200, 24, 200, "int4", "bfloat16"),
    "nf4": Weight(256, 24, 64, "uint4", "float32", values=NF4),
    "short codebook": Weight(128, 16, 32, "uint4", "float16", values=(-1.0, 0.5, 2.0)),
    "int8": Weight(200, 24, 200, "int8", "float32"),
    "int8 groups": Weight(256, 16, 128, "int8", "bfloat16"),
    "fp8": Weight(128, 24, 32, "float8_e4m3fn", "float32"),
    "fp8_e5m2": Weight(256, 16, 256, "float8_e5m2", "float16"),
    "short offsets": Weight(136, 40, 64, "uint4", "bfloat16", offset="bfloat16"),
    "int4 offsets": Weight(136, 40, 64, "int4", "bfloat16", offset="float16"),
    "fp8 groups": Weight(128, 16, 64, "float8_e4m3fn", "bfloat16"),
}


def _order(weight: Weight) -> Layout:
    (name,) = (n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)
    return LAYOUTS[name]


@functools.cache
def _operands(name: str) -> dict[str, np.ndarray]:
    """Random numbers of a weight, in logical order."""
    weight, rng = WEIGHTS[name], np.random.default_rng(3)
    low = hopper_layout.lowest(weight)
    per_group = (weight.groups, weight.n)
    count = len(weight.values) if weight.values else 256 if "8" in weight.code else 16
    codes = rng.integers(low, low + count, (weight.k, weight.n))
    if weight.code.startswith("float8"):
        codes = codes.astype(np.uint8).view(weight.code)
        codes[~np.isfinite(codes.astype(np.float32))] = 0
    out = {"codes": codes.astype(weight.code)}
    out["scale"] = rng.uniform(0.5, 2.0, per_group).astype(weight.scale)
    if weight.zero is not None:
        out["zero"] = rng.integers(low, low + 16, per_group).astype(weight.zero)
    if weight.offset is not None:
        out["offset"] = rng.normal(size=per_group).astype(weight.offset)
    return out


@functools.partial(jax.jit, static_argnums=1)
def _pack(logical: dict[str, jax.Array], weight: Weight) -> dict[str, jax.Array]:
    order = _order(weight)
    return {
        name: (order.pack_codes if name == "codes" else order.pack_scale)(v, weight)
        for name, v in logical.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _unpack(packed: dict[str, jax.Array], weight: Weight) -> dict[str, jax.Array]:
    order = _order(weight)
    scales = {n: order.unpack_scale(v, weight, n) for n, v in packed.items() if n != "codes"}
    return {"codes": order.unpack_codes(packed["codes"], weight)} | scales


def _dense(weight: Weight, logical: dict[str, np.ndarray]) -> np.ndarray:
    along_k = lambda v: np.repeat(v.astype(np.float64), weight.group, 0)[: weight.k]
    w = logical["codes"].astype(np.float64)
    if weight.values is not None:  # the kernel's table holds bfloat16
        table = np.asarray(weight.values, np.float32).astype(jnp.bfloat16).astype(np.float64)
        w = table[w.astype(int)]
    if "zero" in logical:
        w = w - along_k(logical["zero"])
    w = w * along_k(logical["scale"])
    return w + along_k(logical["offset"]) if "offset" in logical else w


@pytest.mark.parametrize("name", WEIGHTS)
def test_unpacking_gives_the_bits_back(name: str) -> None:
    logical, weight = _operands(name), WEIGHTS[name]
    packed = _pack(logical, weight)
    shapes = {n: (v.shape, v.dtype) for n, v in _order(weight).shapes(weight).items()}
    assert {n: (v.shape, v.dtype) for n, v in packed.items()} == shapes
    got = _unpack(packed, weight)
    for part, wanted in logical.items():
        assert got[part].shape == wanted.shape
        np.testing.assert_array_equal(
            np.asarray(got[part]).astype(np.float32), wanted.astype(np.float32)
        )


def test_codes_lie_where_the_docstring_says() -> None:
    weight = Weight(256, 32, 128, "uint4", "bfloat16")
    codes = np.random.default_rng(0).integers(0, 16, (weight.k, weight.n))
    words = np.asarray(_pack({"codes": codes.astype("uint4")}, weight)["codes"]).view(np.uint32)
    assert words.shape == (2, 2, hopper_layout.code_words(weight))
    for b, lane, p, h, e in itertools.product(range(4), range(32), range(4), *[range(2)] * 2):
        r, c = divmod(lane, 4)
        word, nibble = b // 2 * 128 + PLACES[lane] + p, 2 * (b % 2) + h + 4 * e
        nibbles = words[:, :, word] >> np.uint32(4 * nibble) & np.uint32(15)
        k = 32 * b + 8 * c + 2 * p + e
        wanted = codes.reshape(2, 128, 2, 16)[:, k, :, r + 8 * h].T
        np.testing.assert_array_equal(nibbles, wanted)


def _float(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits.astype(np.uint16).view(jnp.dtype(dtype)).astype(np.float64)


def _byte(word: np.ndarray, index: int) -> np.ndarray:
    return word >> np.uint32(8 * index) & np.uint32(255)


def _permuted(table: list[int], selectors: np.ndarray) -> np.ndarray:
    """`prmt`: for each of the four low nibbles of the selectors a byte of two words."""
    eight = [int(w) >> 8 * i & 255 for w in table for i in range(4)]
    out = np.zeros_like(selectors)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(15)
        assert (nibble < 8).all()
        out |= np.asarray(eight, np.uint32)[nibble] << np.uint32(8 * i)
    return out


def _pairs(weight: Weight, word: np.ndarray) -> list[np.ndarray]:
    """The values of the registers that `hopper_decode` makes of a word, by its bits: of channels r
    and r + 8, of 4 bits for each 32 along k; of int8 less 128, which the kernel takes off by the
    sums of x.
    """
    if weight.values is not None:
        table, out = hopper_codebook.codebook_bytes(weight.values), []
        for half in range(2):
            codes = word >> np.uint32(16 * half)
            highest = [codes >> np.uint32(4 * i + 3) & np.uint32(1) for i in range(4)]
            mask = sum(bit * np.uint32(255 << 8 * i) for i, bit in enumerate(highest))
            selectors = codes & np.uint32(0x7777)
            planes = []
            for at in (0, 4):
                lower = _permuted(table[at : at + 2], selectors)
                upper = _permuted(table[at + 2 : at + 4], selectors)
                planes.append(mask & upper | ~mask & lower)
            for a in (0, 2):
                pair = [
                    _byte(planes[0], a + e) | _byte(planes[1], a + e) << np.uint32(8)
                    for e in (0, 1)
                ]
                out.append(pair[0] | pair[1] << np.uint32(16))
        return out
    if weight.code == "int8":
        bits = [word >> np.uint32(s) & np.uint32(0x00FF00FF) for s in (0, 8)]
        return [_from_floats(_halves(v) * 2.0**133 - 128) for v in bits]
    if weight.code.startswith("float8"):
        shift, power = (4, 120) if weight.code == "float8_e4m3fn" else (5, 112)
        out = []
        for low in (0, 8):
            signed = [(word >> np.uint32(at + low)).astype(np.int8) for at in (0, 16)]
            low16, high16 = (v.astype(np.int16).view(np.uint16).astype(np.uint32) for v in signed)
            moved = (low16 | high16 << np.uint32(16)) << np.uint32(shift)
            bits = moved & np.uint32((0x8000 | 0x7F << shift) * 0x10001)
            out.append(_from_floats(_halves(bits) * 2.0**power))
        return out
    cases = itertools.product((0, 8), ((0x000F000F, 133), (0x00F000F0, 129)))
    bits = [(word >> np.uint32(s) & np.uint32(mask), power) for s, (mask, power) in cases]
    return [_from_floats(_halves(v) * 2.0**power) for v, power in bits]


def _halves(pair: np.ndarray) -> np.ndarray:
    """The two bfloat16 of a register, `[2, ...]`."""
    return np.stack(
        [_float(pair >> np.uint32(16 * e) & np.uint32(0xFFFF), "bfloat16") for e in (0, 1)]
    )


def _from_floats(values: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`; the values must be bfloat16 exactly."""
    held = values.astype(np.float32).view(np.uint32)
    assert not (held & np.uint32(0xFFFF)).any()
    return held[0] >> np.uint32(16) | held[1] & np.uint32(0xFFFF0000)


def _emulate(weight: Weight, packed: dict[str, jax.Array], x: np.ndarray) -> np.ndarray:
    """What the warps add up, from the packed words: `[n, m]`."""
    words = {n: np.asarray(v).view(np.uint32) for n, v in packed.items()}
    tiles_n, tiles_k, count = words["codes"].shape
    channel = hopper_layout.per_channel(weight)
    group_size = hopper_layout.DEPTH if channel else weight.group
    groups, low = hopper_layout.DEPTH // group_size, hopper_layout.lowest(weight)
    plain = weight.code in ("int4", "uint4") and weight.values is None
    center = -low if plain and weight.zero is None else 0
    x = np.pad(x, ((0, 0), (0, tiles_k * hopper_layout.DEPTH - weight.k)))
    lanes = np.arange(32)
    r, c = lanes // 4, lanes % 4
    blocks = 512 // count  # of 32 along k in four words of a lane
    out = np.zeros((tiles_n * 16, len(x)))
    for row, tile, group in itertools.product(range(tiles_n), range(tiles_k), range(groups)):
        first = tile * hopper_layout.DEPTH + group * group_size
        sums = x[:, first : first + group_size].sum(1)
        part = np.broadcast_to(-center * sums, (16, len(x))).copy()
        for i in range(group * group_size // 16, (group + 1) * group_size // 16):
            a = np.zeros((16, 16))
            b = np.zeros((16, len(x)))
            line, block = divmod(i // 2, blocks)
            first_word = PLACES + 128 * line + 2 * (i % 2)
            held = [_pairs(weight, words["codes"][row, tile, first_word + v]) for v in range(2)]
            at = tile * hopper_layout.DEPTH + 32 * (i // 2) + 8 * c + 4 * (i % 2)
            registers = [pair for v in held for pair in v[2 * block :][:2]]
            for j, pair in enumerate(registers):
                for e, value in enumerate(_halves(pair)):
                    a[r + 8 * (j % 2), 2 * c + e + 8 * (j // 2)] = value
            for q, e in itertools.product(range(2), range(2)):  # register q of the other operand
                b[2 * c + e + 8 * q] = x[:, at + 2 * q + e].T
            part += a @ b
        channels = np.arange(16)

        def pick(name: str, dtype: str) -> np.ndarray:
            held = words[name][row, 0 if channel else tile]  # noqa: B023
            size = (
                hopper_layout.ROWS if channel else hopper_layout.group_words(weight, name) // groups
            )
            held = held[size * (0 if channel else group) :][:size]  # noqa: B023
            if size == 16:
                return held.view(np.float32).astype(np.float64)
            half = np.uint32(16) * (channels // 8).astype(np.uint32)  # noqa: B023
            return _float(held[channels % 8] >> half & np.uint32(0xFFFF), dtype)  # noqa: B023

        if weight.zero is not None:
            part -= (pick("zero", "bfloat16")[:, None] - 128) * sums
        total = pick("scale", weight.scale)[:, None] * part
        if weight.offset is not None:
            total += pick("offset", weight.offset)[:, None] * sums
        out[row * 16 : row * 16 + 16] += total
    return out[: weight.n]


@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["nf4", "short codebook"])
def test_a_block_writes_the_pair_of_each_byte_for_each_lane(
    name: str, warpgroups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes.on_a_cpu(monkeypatch)
    values, held = WEIGHTS[name].values, []
    assert values is not None
    fill = hopper_pairs.write_pairs(values, warpgroups)

    def table(*, pairs):
        fill(pairs)
        held.append(pairs.array.view(np.uint32))

    scratch = {"pairs": plgpu.SMEM(mosaic_gpu.PAIR_TABLE, jnp.int32)}
    plgpu.kernel(table, out_type=[], scratch_types=scratch, grid=(1,), num_threads=warpgroups)()
    (got,) = held
    full = np.asarray([*values, *values[-1:] * (16 - len(values))], np.float32)
    bits = full.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    wanted = bits[byte & 15] | bits[byte >> 4] << np.uint32(16)
    np.testing.assert_array_equal(got, np.tile(wanted[:, None], 32))


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_lanes_add_up_to_the_product(name: str) -> None:
    weight = WEIGHTS[name]
    logical = _operands(name)
    x = np.random.default_rng(0).normal(size=(8, weight.k))
    got = _emulate(weight, _pack(logical, weight), x)
    np.testing.assert_allclose(got.T, x @ _dense(weight, logical), rtol=1e-10, atol=1e-9)


def test_the_reference_multiplies_the_layout() -> None:
    weight = WEIGHTS["zeros"]
    logical = _operands("zeros")
    x = np.random.default_rng(1).normal(size=(3, weight.k)).astype(np.float32)
    arrays = _pack(logical, weight)
    got = jax.jit(lambda x, a: quantized_matmul(x, a, weight, "hopper4"))(x, arrays)
    wanted = np.asarray(x, np.float64) @ _dense(weight, logical)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-4, atol=1e-4)


def test_dispatch_takes_it_on_hopper_and_says_why_not() -> None:
    weight = Weight(4096, 4096, 128, "int4", "bfloat16")
    problem = Problem(1, weight, "hopper4", "bfloat16", "bfloat16")
    device = H100 if mosaic_gpu.supports(problem, H100) is None else None
    if device is not None:
        assert choose("quantized_matmul", problem, H100) == "mosaic_gpu"
        assert "x has 17 rows" in (mosaic_gpu.supports(problem._replace(m=17), H100) or "")
    else:  # an older jax: it must say so
        with pytest.raises(ValueError, match=r"jax 0\.11 or newer"):
            choose("quantized_matmul", problem, H100, "mosaic_gpu")
    with pytest.raises(ValueError, match="compiled for H100 and H200, not for cpu"):
        choose("quantized_matmul", problem, Device("cpu", "cpu"), "mosaic_gpu")


@needs_mosaic
@pytest.mark.parametrize(
    ("m", "name", "config", "reason"),
    [
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 1, 2, 2, 8), None),
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 1, 3, 2, 8), "rows is none of"),
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 3, 2, 2, 8), "cluster is none of"),
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 1, 0, 2, 8), "rows is none of"),
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 1, 2, 0, 8), "have 1 to 2 steps"),
        (1, "mosaic_gpu", mosaic_gpu.Config(4, 2, 1, 2, 3, 8), "have 1 to 2 steps"),
        (1, "mosaic_gpu", mosaic_wgmma.Config(), "is no mosaic_gpu.Config"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(64, 1, 4), None),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(96, 1, 4), "rows is none of"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(64, 1, 2, teams=2), "two each"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(64, 1, 4, 2, 2), r"shared\) is none of"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(64, 1, 4, channels=192), r"teams\) is none of"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(64, 1, 4, width=0), "width is at least 1"),
        (64, "mosaic_wgmma", mosaic_wgmma.Config(256, 2, 8), "bytes of shared memory"),
        (64, "mosaic_wgmma", mosaic_gpu.Config(), "is no mosaic_wgmma.Config"),
    ],
)
def test_a_config_is_taken_or_refused(
    m: int, name: str, config: tuple, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Weight(4096, 256, 128, "int4", "bfloat16")
    arrays = {n: jnp.zeros(v.shape, v.dtype) for n, v in LAYOUTS["hopper4"].shapes(weight).items()}
    module, taken = {"mosaic_gpu": mosaic_gpu, "mosaic_wgmma": mosaic_wgmma}[name], []

    def launch(whole, cut, *_):
        taken.append(cut)
        y = jnp.zeros((m, weight.n), jnp.bfloat16)
        return [y] if name == "mosaic_gpu" else y

    monkeypatch.setattr(module, "launch", launch)
    call = lambda: quantized_matmul(
        jnp.zeros((m, weight.k), jnp.bfloat16),
        *(arrays, weight, "hopper4"),
        implementation=name,
        config=config,
        device=H100,
    )
    if reason is None:
        call()
        assert taken == [config]
        return
    with pytest.raises(ValueError, match=reason):
        call()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight(512, 32, 256, "int4", "float32"), "groups are of 256"),
        (Weight(256, 32, 128, "int8", "bfloat16"), "not of 4 bits"),
        (Weight(256, 32, 256, "uint4", "float32", zero="uint4"), "zero points or offsets per chan"),
        (Weight(256, 32, 64, "uint4", "float16", zero="float16"), "zero points are float16"),
        (Weight(256, 32, 64, "uint4", "float16", "uint4", values=NF4), "a codebook, and zero"),
    ],
)
def test_the_layout_says_what_it_does_not_take(weight: Weight, reason: str) -> None:
    why = LAYOUTS["hopper4"].supports(weight)
    assert why is not None
    assert reason in why


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (576, 1536), (14336, 4096), (4096, 128256)])
@pytest.mark.parametrize("values", [None, NF4])
def test_configs_fit_the_chip_and_cover_the_product(
    m: int, k: int, n: int, values: tuple[float, ...] | None
) -> None:
    weight = Weight(k, n, 64, "uint4", "bfloat16", values=values)
    found = list(mosaic_gpu.configs(m, weight))
    assert found
    for worth, config in found:
        plan = mosaic_gpu.plan(m, weight, config)
        assert isinstance(plan, mosaic_gpu.Plan)
        assert 0 < worth < 1.1
        assert plan.shared <= mosaic_gpu.SHARED_MEMORY
        assert plan.grid * plan.turns * config.rows >= plan.tiles_n
        assert config.cluster * config.warpgroups * plan.box >= plan.tiles_k
        assert plan.box <= plan.tiles_k


@pytest.mark.parametrize(
    ("group", "depth", "of_one_row"), [(128, 4, 8), (64, 3, 6), (32, 2, 5), (4096, 4, 8)]
)
def test_eight_warps_keep_what_x_their_registers_hold(
    group: int, depth: int, of_one_row: int
) -> None:
    weight = Weight(4096, 28672, group, "int4", "bfloat16" if group < 4096 else "float32")
    found = [config for _, config in mosaic_gpu.configs(16, weight)]
    assert max(c.depth for c in found) == depth
    assert max(c.depth for c in found if c.warpgroups > 2) == 2
    assert max(c.depth for _, c in mosaic_gpu.configs(16, weight, norm=True)) == 2
    found = [config for _, config in mosaic_gpu.configs(1, weight)]
    assert max(c.depth for c in found) == of_one_row
    assert max(c.depth for c in found if c.warpgroups > 2) == 4
    assert max(c.depth for _, c in mosaic_gpu.configs(1, weight, norm=True)) == 4


def test_a_codebook_takes_its_table_of_shared_memory() -> None:
    config, weight = mosaic_gpu.Config(4, 2, 1, 1, 2, 128), Weight(4096, 4096, 64, "uint4")
    plain, nf4 = (mosaic_gpu.plan(1, w, config) for w in (weight, weight._replace(values=NF4)))
    assert isinstance(plain, mosaic_gpu.Plan)
    assert isinstance(nf4, mosaic_gpu.Plan)
    assert nf4.shared - plain.shared == 32 * 1024


def test_the_table_holds_what_can_run() -> None:
    tables = sorted(mosaic_gpu.TABLES.glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        assert table["command"]
        for row in table["rows"]:
            weight = weight_of(row)
            config = mosaic_gpu.Config(*row["config"])
            assert isinstance(mosaic_gpu.plan(row["m"], weight, config), mosaic_gpu.Plan)
            assert mosaic_gpu.choose_config(row["m"], weight, table["device"]) == config


def test_a_smaller_m_takes_the_row_of_the_next_larger() -> None:
    weight = Weight(4096, 28672, 128, "int4", "bfloat16")
    choice = [mosaic_gpu.choose_config(m, weight, H100.kind) for m in (3, 8)]
    assert choice[0] == choice[1]


def test_weights_of_one_x_are_one_launch_where_they_are_alike() -> None:
    weights = [Weight(4096, n, 128, "int4", "bfloat16") for n in (4096, 1024, 1024)]
    each = [Problem(1, w, "hopper4", "bfloat16", "bfloat16") for w in weights]
    assert mosaic_gpu.joins(each) is None
    assert mosaic_gpu.whole_problem(each).weight.n == 6144
    odd = each[0]._replace(weight=weights[0]._replace(n=40))
    assert "40 channels do not fill tiles" in (mosaic_gpu.joins([*each, odd]) or "")
    other = each[0]._replace(weight=weights[0]._replace(group=64))
    assert "more than their channels" in (mosaic_gpu.joins([*each, other]) or "")
    wider = each[0]._replace(out="float32")
    assert "more than their weights" in (mosaic_gpu.joins([*each, wider]) or "")


@pytest.mark.parametrize("bias", [False, True])
def test_a_stage_holds_its_pieces_on_sixteen_bytes(bias: bool) -> None:
    for weight in WEIGHTS.values():
        problem = Problem(1, weight, "", "bfloat16", "bfloat16", bias, None)
        sizes = mosaic_gpu.Plan(2, 2, 1, 1, 1, 1)
        shape = hopper_shape.shape_of(problem, sizes)
        for depth in (1, 2, 4):
            words = depth * mosaic_gpu.tile_words(weight) + mosaic_gpu.channel_words(weight, bias)
            assert shape.words(depth) == words
            assert all(p.length(depth) % 4 == 0 for p in shape.pieces)
