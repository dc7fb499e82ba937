"""One set of properties over every row of FORMATS."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import all_codes

from qjax.formats import FORMATS, PLANE_BITS, join_planes, split_planes

FLOAT = jnp.dtype(jnp.float32)


def as_bits(codes):
    return np.asarray(codes).astype(codes.dtype).view(np.uint8)


@pytest.fixture(params=FORMATS)
def fmt(request):
    return FORMATS[request.param]


def test_the_key_is_the_name(fmt):
    assert FORMATS[fmt.name] is fmt


def test_encoding_a_value_gives_its_code(fmt):
    codes = all_codes(fmt)
    held = codes if isinstance(fmt.storage, tuple) else jnp.asarray(codes).astype(fmt.storage)
    values = fmt.decode(jnp.asarray(held), FLOAT)
    assert values.dtype == FLOAT
    np.testing.assert_array_equal(as_bits(fmt.encode(values)), as_bits(jnp.asarray(codes)))


def test_joining_undoes_splitting(fmt):
    """Also where the last axis is no multiple of eight, is empty, or the array has one element."""
    codes = all_codes(fmt)
    for shape in ((3, 13), (2, 8), (4, 0), (1,)):
        chosen = np.resize(codes, shape) if np.prod(shape) else np.zeros(shape, codes.dtype)
        held = split_planes(fmt, jnp.asarray(chosen))
        joined = join_planes(fmt, held)
        assert joined.shape == shape
        np.testing.assert_array_equal(np.asarray(joined).astype(np.float32), chosen.astype("f4"))


def test_planes_hold_the_bits_that_are_claimed(fmt):
    planes = fmt.storage if isinstance(fmt.storage, tuple) else (fmt.storage,)
    widths = [
        PLANE_BITS.get(p) or (jnp.iinfo if "int" in p else ml_dtypes.finfo)(p).bits for p in planes
    ]
    assert sum(widths) == fmt.bits


def test_range_is_that_of_the_codes(fmt):
    held = split_planes(fmt, jnp.asarray(all_codes(fmt)))
    values = fmt.decode(join_planes(fmt, held), FLOAT)
    assert (values.min(), values.max()) == (np.float32(fmt.min), np.float32(fmt.max))


def test_what_lies_outside_saturates(fmt):
    outside = jnp.array([-np.inf, -1e30, fmt.min * 1.5 - 1, fmt.max * 1.5 + 1, 1e30, np.inf])
    held = split_planes(fmt, fmt.encode(outside))
    values = fmt.decode(join_planes(fmt, held), FLOAT)
    wanted = np.float32([fmt.min] * 3 + [fmt.max] * 3)
    np.testing.assert_array_equal(values, wanted)


def test_the_nearest_value_is_chosen(fmt):
    """Against a search over all values in float64; jit and eager agree."""
    held = split_planes(fmt, jnp.asarray(all_codes(fmt)))
    values = np.asarray(fmt.decode(join_planes(fmt, held), FLOAT), np.float64)
    rng = np.random.default_rng(0)
    x = rng.uniform(fmt.min, fmt.max, 2000).astype(np.float32)
    x[::2] *= np.exp2(-rng.integers(0, 18, 1000)).astype(np.float32)
    nearest = np.min(np.abs(x[:, None].astype(np.float64) - values), axis=1)
    for encode in (fmt.encode, jax.jit(fmt.encode)):
        chosen = fmt.decode(join_planes(fmt, split_planes(fmt, encode(jnp.asarray(x)))), FLOAT)
        np.testing.assert_array_equal(np.abs(x.astype("f8") - np.asarray(chosen, "f8")), nearest)


def test_decoding_to_bfloat16_rounds_the_value(fmt):
    held = split_planes(fmt, jnp.asarray(all_codes(fmt)))
    joined = join_planes(fmt, held)
    wide = np.asarray(fmt.decode(joined, FLOAT))
    narrow = fmt.decode(joined, jnp.dtype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(narrow), wide.astype(ml_dtypes.bfloat16))


def test_integers_decode_to_integer_dtypes(fmt):
    """What matmuls on int8 codes rely on, where they fit."""
    values = np.asarray(fmt.decode(jnp.asarray(all_codes(fmt)), FLOAT))
    if fmt.integer:
        np.testing.assert_array_equal(values, np.round(values))
        dtype = jnp.dtype(jnp.int8 if fmt.max < 128 else jnp.int16)
        np.testing.assert_array_equal(fmt.decode(jnp.asarray(all_codes(fmt)), dtype), values)


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "fp8_e5m2"])
def test_floats_round_once_inside_a_loop_too(name):
    """XLA:CPU's own cast to float4 rounds twice there."""
    fmt = FORMATS[name]
    dtype = np.dtype(getattr(ml_dtypes, fmt.storage))
    values = np.arange(2**fmt.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([middle, np.nextafter(middle, 9e4), np.nextafter(middle, -9e4)])
    x = np.resize(x.astype(np.float32), (24, 40))

    def step(row, out):
        code = fmt.encode(jax.lax.dynamic_index_in_dim(jnp.asarray(x), row, 0))
        return jax.lax.dynamic_update_index_in_dim(out, code.astype(jnp.float32), row, 0)

    got = jax.jit(lambda out: jax.lax.fori_loop(0, 24, step, out))(jnp.zeros(x.shape))
    np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))
