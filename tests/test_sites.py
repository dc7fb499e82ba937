"""find_sites: which axes a model contracts, indexes and stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax


def site(fn, shape, *x_shapes):
    """The one site of a function's first argument."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in x_shapes]
    (found,) = qjax.find_sites(fn, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, *args)["w"]
    return found


def axes(found):
    return found.contract_axes, found.batch_axes, found.free_axes, found.stacked_axes


@pytest.mark.parametrize(
    ("fn", "shape", "x_shape", "side", "wanted"),
    [
        (lambda p, x: x @ p["w"], (8, 4), (2, 8), 1, ((0,), (), (1,), ())),
        (lambda p, x: p["w"] @ x, (4, 8), (8, 2), 0, ((1,), (), (0,), ())),
        (lambda p, x: x @ p["w"].T, (4, 8), (2, 8), 1, ((1,), (), (0,), ())),
        (
            lambda p, x: jnp.einsum("bshk,hkd->bsd", x, p["w"]),
            (2, 4, 8),
            (1, 3, 2, 4),
            1,
            ((0, 1), (), (2,), ()),
        ),
        (
            lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
            (3, 8, 4),
            (3, 2, 8),
            1,
            ((1,), (0,), (2,), ()),
        ),
        (lambda p, x: x @ p["w"].reshape(8, 12), (8, 3, 4), (2, 8), 1, ((0,), (), (1, 2), ())),
        (lambda p, x: x @ p["w"].reshape(12, 8), (3, 4, 8), (2, 12), 1, ((0, 1), (), (2,), ())),
        (lambda p, x: x @ p["w"][1], (3, 8, 4), (2, 8), 1, ((1,), (), (2,), ())),
        (
            lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32),
            (8, 4),
            (2, 8),
            1,
            ((0,), (), (1,), ()),
        ),
        (
            lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0],
            (3, 8, 8),
            (2, 8),
            1,
            ((1,), (), (2,), (0,)),
        ),
        (
            lambda p, x: jax.checkpoint(lambda w, x: x @ w)(jax.jit(jnp.transpose)(p["w"]), x),
            (4, 8),
            (2, 8),
            1,
            ((1,), (), (0,), ()),
        ),
    ],
)
def test_axes(fn, shape, x_shape, side, wanted):
    found = site(fn, shape, x_shape)
    assert found.primitive == "dot_general"
    assert found.side == side
    assert axes(found) == wanted


def test_lookup():
    ids = jnp.arange(3)
    found = site(lambda p: jnp.take(p["w"], ids, axis=0), (8, 4))
    assert found.primitive == "gather"
    assert axes(found) == ((), (0,), (1,), ())


def test_every_use_is_a_site_and_unused_params_have_none():
    def fn(p, x):
        return jnp.take(p["table"], x, axis=0) @ p["table"].T + p["b"].sum()

    params = {"table": jnp.ones((8, 4)), "b": jnp.ones(4), "unused": jnp.ones((4, 4))}
    sites = qjax.find_sites(fn, params, jnp.arange(3))
    assert list(sites) == ["table"]
    assert [s.primitive for s in sites["table"]] == ["gather", "dot_general"]


def test_inputs_are_the_same_up_to_casts_and_structure():
    def fn(p, x):
        h = jnp.tanh(x)
        low = lambda v: v.astype(jnp.bfloat16)
        flat = lambda: h.reshape(-1, 8)
        return (
            low(h) @ low(p["q"]),
            low(h) @ low(p["k"]),
            flat() @ p["v"],
            flat() @ p["w"],
            jnp.tanh(x) @ p["other"],
        )

    params = {n: jnp.ones((8, 4)) for n in ("q", "k", "v", "w", "other")}
    sites = qjax.find_sites(fn, params, jnp.ones((2, 3, 8)))
    key = {n: s[0].input_key for n, s in sites.items()}
    assert key["q"] == key["k"]
    assert key["v"] == key["w"]
    assert len(set(key.values())) == 3


def test_paths_are_those_of_the_first_argument():
    params = {"params": {"layers": [{"kernel": jnp.ones((8, 4))}]}}
    fn = lambda p, x, *, q: x @ p["params"]["layers"][0]["kernel"] @ q["w"]
    sites = qjax.find_sites(fn, params, jnp.ones((2, 8)), q={"w": jnp.ones((4, 4))})
    assert list(sites) == ["params/layers/0/kernel"]


def test_nothing_is_computed():
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)  # four terabytes
    sites = qjax.find_sites(
        lambda p, x: x @ p["w"], {"w": huge}, jax.ShapeDtypeStruct((2, 1 << 20), np.float32)
    )
    assert sites["w"][0].contract_axes == (0,)
