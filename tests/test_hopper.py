"""The Hopper kernel without a GPU: where its layout puts things, its arithmetic, and its plans.

`_emulate` is the kernel's arithmetic lane by lane, in numpy: which word a lane reads, which bits
become which register, which x goes with it. That the device runs it so is checked on the device
(experiments/tune_kernels.py check).
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import hopper_layout, mosaic_gpu
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.op import quantized_matmul
from pallas_kernels.quantized_matmul.problem import Problem, Weight

HOPPER = LAYOUTS["hopper4"]
H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
WEIGHTS = {
    "symmetric": Weight(256, 32, 128, "int4", "bfloat16"),
    "zeros": Weight(200, 24, 32, "uint4", "bfloat16", zero="uint4"),
    "signed zeros": Weight(128, 16, 64, "int4", "float16", zero="int4"),
    "offsets": Weight(136, 40, 64, "uint4", "float16", offset="float16"),
}


def _operands(weight: Weight) -> dict[str, jax.Array]:
    """Random numbers of a weight, in logical order."""
    keys = jax.random.split(jax.random.key(3), 4)
    low = hopper_layout.lowest(weight)
    per_group = (weight.groups, weight.n)
    codes = jax.random.randint(keys[0], (weight.k, weight.n), low, low + 16, jnp.int8)
    out = {"codes": codes.astype(weight.code)}
    out["scale"] = jax.random.uniform(keys[1], per_group, jnp.float32, 0.5, 2.0).astype(
        weight.scale
    )
    if weight.zero is not None:
        zero = jax.random.randint(keys[2], per_group, low, low + 16, jnp.int8)
        out["zero"] = zero.astype(weight.zero)
    if weight.offset is not None:
        out["offset"] = jax.random.normal(keys[3], per_group).astype(weight.offset)
    return out


def _pack(weight: Weight, logical: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        name: (HOPPER.pack_codes if name == "codes" else HOPPER.pack_scale)(v, weight)
        for name, v in logical.items()
    }


def _dense(weight: Weight, logical: dict[str, jax.Array]) -> np.ndarray:
    along_k = lambda v: np.repeat(np.asarray(v, np.float64), weight.group, 0)[: weight.k]
    w = np.asarray(logical["codes"].astype(jnp.int8), np.float64)
    if "zero" in logical:
        w = w - along_k(logical["zero"].astype(jnp.int8))
    w = w * along_k(logical["scale"])
    return w + along_k(logical["offset"]) if "offset" in logical else w


@pytest.mark.parametrize("name", WEIGHTS)
def test_unpacking_gives_the_bits_back(name: str) -> None:
    weight = WEIGHTS[name]
    logical = _operands(weight)
    packed = _pack(weight, logical)
    for part, wanted in logical.items():
        got = (
            HOPPER.unpack_codes(packed[part], weight)
            if part == "codes"
            else HOPPER.unpack_scale(packed[part], weight, part)
        )
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(
            np.asarray(got.astype(jnp.float32)), np.asarray(wanted.astype(jnp.float32))
        )


def test_codes_lie_where_the_docstring_says() -> None:
    weight = Weight(256, 32, 128, "uint4", "bfloat16")
    codes = jax.random.randint(jax.random.key(0), (weight.k, weight.n), 0, 16, jnp.uint8)
    words = np.asarray(HOPPER.pack_codes(codes.astype(jnp.uint4), weight)).view(np.uint32)
    assert words.shape == (2, 2, hopper_layout.CODES)
    for i, lane, p in itertools.product(range(8), range(32), range(8)):
        half, v = divmod(i, 4)
        r, c = divmod(lane, 4)
        k = 32 * (i // 2) + 8 * c + 4 * (i % 2) + 2 * (p // 2 % 2) + p // 4
        nibbles = words[:, :, half * 128 + lane * 4 + v] >> np.uint32(4 * p) & np.uint32(15)
        wanted = np.asarray(codes).reshape(2, 128, 2, 16)[:, k, :, r + 8 * (p % 2)].T
        np.testing.assert_array_equal(nibbles, wanted)


def _float(bits: np.ndarray, dtype: str) -> np.ndarray:
    held = jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint16), dtype)
    return np.asarray(held.astype(jnp.float32), np.float64)


def _emulate(weight: Weight, packed: dict[str, jax.Array], x: np.ndarray) -> np.ndarray:
    """What the warps add up, from the packed words: `[n, m]`."""
    words = {n: np.asarray(v).view(np.uint32) for n, v in packed.items()}
    tiles_n, tiles_k, _ = words["codes"].shape
    groups, low = hopper_layout.DEPTH // weight.group, hopper_layout.lowest(weight)
    start = 1.0 if weight.zero is not None else 128.0 - low
    x = np.pad(x, ((0, 0), (0, tiles_k * hopper_layout.DEPTH - weight.k)))
    lanes = np.arange(32)
    r, c = lanes // 4, lanes % 4
    out = np.zeros((tiles_n * 16, len(x)))
    for row, tile, group in itertools.product(range(tiles_n), range(tiles_k), range(groups)):
        first = tile * hopper_layout.DEPTH + group * weight.group
        sums = -start * x[:, first : first + weight.group].sum(1)
        part = np.zeros((16, len(x))) if weight.zero else np.broadcast_to(sums, (16, len(x))).copy()
        for i in range(group * weight.group // 16, (group + 1) * weight.group // 16):
            a = np.zeros((16, 16))
            b = np.zeros((16, len(x)))
            word = words["codes"][row, tile, i // 4 * 128 + lanes * 4 + i % 4]
            at = tile * hopper_layout.DEPTH + 32 * (i // 2) + 8 * c + 4 * (i % 2)
            for j, e in itertools.product(range(4), range(2)):
                pair = (word >> np.uint32(4 * j) & np.uint32(0x000F000F)) | np.uint32(0x43004300)
                value = _float(pair >> np.uint32(16 * e) & np.uint32(0xFFFF), "bfloat16")
                a[r + 8 * (j % 2), 2 * c + e + 8 * (j // 2)] = value
            for q, e in itertools.product(range(2), range(2)):  # register q of the other operand
                b[2 * c + e + 8 * q] = x[:, at + 2 * q + e].T
            part += a @ b
        channels = np.arange(16)
        pick = lambda name, dtype: _float(
            words[name][row, tile, 8 * group + channels % 8]  # noqa: B023
            >> np.uint32(16) * (channels // 8).astype(np.uint32)  # noqa: B023
            & np.uint32(0xFFFF),
            dtype,
        )
        if weight.zero is not None:
            part += pick("zero", "bfloat16")[:, None] * sums
        total = pick("scale", weight.scale)[:, None] * part
        if weight.offset is not None:
            total += pick("offset", weight.offset)[:, None] * (-1 / start) * sums
        out[row * 16 : row * 16 + 16] += total
    return out[: weight.n]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_lanes_add_up_to_the_product(name: str) -> None:
    weight = WEIGHTS[name]
    logical = _operands(weight)
    x = np.random.default_rng(0).normal(size=(8, weight.k))
    got = _emulate(weight, _pack(weight, logical), x)
    np.testing.assert_allclose(got.T, x @ _dense(weight, logical), rtol=1e-10, atol=1e-9)


def test_the_reference_multiplies_the_layout() -> None:
    weight = WEIGHTS["zeros"]
    logical = _operands(weight)
    x = jax.random.normal(jax.random.key(1), (3, weight.k))
    got = quantized_matmul(x, _pack(weight, logical), weight, "hopper4")
    wanted = np.asarray(x, np.float64) @ _dense(weight, logical)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-4, atol=1e-4)


def test_dispatch_takes_it_on_hopper_and_says_why_not() -> None:
    weight = Weight(4096, 4096, 128, "int4", "bfloat16")
    problem = Problem(1, weight, "hopper4", "bfloat16", "bfloat16")
    device = H100 if mosaic_gpu.supports(problem, H100) is None else None
    if device is not None:
        assert choose("quantized_matmul", problem, H100) == "mosaic_gpu"
    else:  # an older jax: it must say so
        with pytest.raises(ValueError, match=r"jax 0\.11 or newer"):
            choose("quantized_matmul", problem, H100, "mosaic_gpu")
    with pytest.raises(ValueError, match="compiled for H100 and H200, not for cpu"):
        choose("quantized_matmul", problem, Device("cpu", "cpu"), "mosaic_gpu")
    assert choose("quantized_matmul", problem._replace(m=17), H100) == "reference"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight(256, 32, 256, "int4", "float32"), "groups are of 256"),
        (Weight(256, 32, 128, "int8", "bfloat16"), "not integers of 4 bits"),
        (Weight(256, 32, 128, "int4", "float32"), "scales are float32"),
        (Weight(256, 32, 64, "uint4", "float16", zero="float16"), "zero points are float16"),
    ],
)
def test_the_layout_says_what_it_does_not_take(weight: Weight, reason: str) -> None:
    why = HOPPER.supports(weight)
    assert why is not None
    assert reason in why


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (576, 1536), (14336, 4096), (4096, 128256)])
def test_configs_fit_the_chip_and_cover_the_product(m: int, k: int, n: int) -> None:
    weight = Weight(k, n, 64, "int4", "bfloat16")
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


def test_the_table_holds_what_can_run() -> None:
    tables = sorted(mosaic_gpu.TABLES.glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        assert table["command"]
        for row in table["rows"]:
            weight = Weight(row["k"], row["n"], 128, "int4", "bfloat16")
            config = mosaic_gpu.Config(*row["config"])
            assert isinstance(mosaic_gpu.plan(row["m"], weight, config), mosaic_gpu.Plan)
            assert mosaic_gpu.choose_config(row["m"], weight, table["device"]) == config


def test_a_smaller_m_takes_the_row_of_the_next_larger() -> None:
    weight = Weight(4096, 28672, 128, "int4", "bfloat16")
    choice = [mosaic_gpu.choose_config(m, weight, H100.kind) for m in (3, 8)]
    assert choice[0] == choice[1]
