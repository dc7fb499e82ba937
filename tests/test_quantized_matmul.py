"""pallas_kernels.quantized_matmul: every problem on every implementation against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import problems, xla_cpu
from pallas_kernels.quantized_matmul.epilogue import ACTIVATIONS
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.op import joined_matmul, quantized_matmul
from pallas_kernels.quantized_matmul.problem import Problem, Weight

CPU = Device("cpu", "cpu")
LAID = [(w, name) for w, v in problems.WEIGHTS.items() for name, row in LAYOUTS.items()
        if row.supports(v) is None and row.serves(CPU)]  # fmt: skip


def logical(weight, seed=0):
    """Random codes, scales, zeros and offsets in numpy, and the float64 weight they stand for."""
    rng = np.random.default_rng(seed)
    shape, groups = (weight.k, weight.n), (weight.groups, weight.n)
    if weight.code.startswith("float8"):
        codes = np.asarray(rng.standard_normal(shape), weight.code)
        values = codes.astype(np.float64)
    else:
        info = jnp.iinfo(weight.code)
        codes = rng.integers(int(info.min), int(info.max) + 1, shape)
        values = codes.astype(np.float64)
    if weight.values is not None:
        values = np.asarray(weight.values, np.float64)[codes]
    fields = {"scale": rng.uniform(0.01, 2, groups)}
    fields["scale"][0, : weight.n // 4] = 0  # groups, or channels, of zeros
    if weight.zero is not None:
        fields["zero"] = rng.integers(0, 16, groups)
    if weight.offset is not None:
        fields["offset"] = rng.standard_normal(groups)
    fields = {n: np.asarray(jnp.asarray(v).astype(getattr(weight, n))) for n, v in fields.items()}
    spread = {n: np.repeat(v.astype(np.float64), weight.group, 0)[: weight.k]
              for n, v in fields.items()}  # fmt: skip
    dense = (values - spread.get("zero", 0)) * spread["scale"] + spread.get("offset", 0)
    return codes, fields, dense


@functools.partial(jax.jit, static_argnums=(0, 1))
def pack(weight, layout, codes, fields):
    order = LAYOUTS[layout]
    arrays = {"codes": order.pack_codes(jnp.asarray(codes).astype(weight.code), weight)}
    return arrays | {n: order.pack_scale(jnp.asarray(v), weight) for n, v in fields.items()}


def make(name, layout="nibbles"):
    weight = problems.WEIGHTS[name]
    codes, fields, dense = logical(weight)
    return weight, pack(weight, layout, codes, fields), dense


def error(got, wanted):
    """Largest difference over the largest magnitude."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("name", "layout"), LAID)
def test_a_layout_gives_every_bit_back(name, layout):
    weight, order = problems.WEIGHTS[name], LAYOUTS[layout]
    codes, fields, _ = logical(weight)
    arrays = pack(weight, layout, codes, fields)
    shapes = order.shapes(weight)
    assert {n: (v.shape, v.dtype) for n, v in arrays.items()} == {
        n: (v.shape, v.dtype) for n, v in shapes.items()
    }
    assert not {v.dtype.name for v in arrays.values()} & {"int4", "uint4", "int2", "uint2"}
    back = jax.jit(order.unpack_codes, static_argnums=1)(arrays["codes"], weight)
    assert back.dtype == weight.code
    np.testing.assert_array_equal(np.asarray(back, np.float32), codes.astype(np.float32))
    for n, v in fields.items():
        unpack = jax.jit(order.unpack_scale, static_argnums=(1, 2))
        unpacked = np.asarray(unpack(arrays[n], weight, n), np.float32)
        np.testing.assert_array_equal(unpacked, v.astype(np.float32))


RUNS = [
    (name, layout, implementation)
    for name, layout in LAID
    for implementation, row in IMPLEMENTATIONS["quantized_matmul"].items()
    if row.supports(Problem(1, problems.WEIGHTS[name], layout, "float32", "float32"), CPU) is None
]


def test_every_implementation_for_this_machine_is_tested():
    assert {i for _, _, i in RUNS} == {"xla_cpu", "reference"}


@pytest.mark.parametrize(("name", "layout", "implementation"), RUNS)
def test_products_against_float64(name, layout, implementation):
    weight, arrays, dense = make(name, layout)
    call = jax.jit(
        lambda x, a: quantized_matmul(x, a, weight, layout, implementation=implementation)
    )
    rows = problems.ROWS if implementation == "xla_cpu" else (1, 16)  # the reference looks at no m
    for m in rows:
        x = np.random.default_rng(m).standard_normal((m, weight.k)).astype(np.float32)
        truth = x.astype(np.float64) @ dense
        plain = error(jnp.asarray(x) @ jnp.asarray(dense, jnp.float32), truth)
        assert error(call(x, arrays), truth) <= max(2 * plain, 4e-7)
    half = jnp.asarray(x).astype(jnp.bfloat16)
    y = call(half, arrays)
    assert y.dtype == jnp.bfloat16
    assert error(y, np.asarray(half, np.float64) @ dense) < (
        2**-8 if implementation == "xla_cpu" else 2**-7
    )
    codes = np.random.default_rng(0).integers(-127, 128, (3, weight.k)).astype(np.int8)
    y = call(codes, arrays)
    assert y.dtype == jnp.float32
    assert error(y, codes.astype(np.float64) @ dense) < 2e-6


def test_int8_by_int8_is_exact():
    weight, arrays, _ = make("int8_channel", "bytes")
    arrays["scale"] = jnp.ones_like(arrays["scale"])
    codes = LAYOUTS["bytes"].unpack_codes(arrays["codes"], weight)
    for m in (1, 2, 17):
        x = np.random.default_rng(m).integers(-127, 128, (m, weight.k)).astype(np.int8)
        y = quantized_matmul(jnp.asarray(x), arrays, weight, "bytes")
        np.testing.assert_array_equal(y, x.astype(np.int32) @ np.asarray(codes, np.int32))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_is_widened_to_its_value(dtype):
    bits = np.arange(256, dtype=np.uint8)
    got = jax.jit(xla_cpu.widen, static_argnums=1)(jnp.asarray(bits), dtype)
    np.testing.assert_array_equal(got, bits.view(dtype).astype(np.float32))


def test_a_weight_of_many_blocks_with_a_rest():
    weight = Weight(1024, 2803, 64, "int4")  # 2.05 blocks of rows
    codes, fields, dense = logical(weight)
    arrays = pack(weight, "nibbles", codes, fields)
    x = np.random.default_rng(1).standard_normal((2, weight.k)).astype(np.float32)
    got = quantized_matmul(jnp.asarray(x), arrays, weight, "nibbles", implementation="xla_cpu")
    assert error(got, x.astype(np.float64) @ dense) < 2e-6


@pytest.mark.parametrize("name", ["int4_g128", "uint4_offsets", "nf4"])
def test_derivatives_are_those_of_the_dense_product(name):
    weight, arrays, dense = make(name)
    w = jnp.asarray(dense, jnp.float32)
    x, t = (jax.random.normal(jax.random.key(i), (3, weight.k)) for i in range(2))
    fn = lambda x: quantized_matmul(x, arrays, weight, "nibbles")
    loss = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x) / 30))))(x)
    assert error(loss(fn), loss(lambda x: x @ w)) < 2e-5
    tangent = jax.jit(lambda x, t: jax.jvp(fn, (x,), (t,))[1])(x, t)
    assert error(tangent, t @ w) < 2e-6


def test_vmap_over_rows_layers_and_both():
    weight, arrays, dense = make("int4_g128")
    stack = {n: jnp.stack([v, v[::-1]]) for n, v in arrays.items()}
    w = np.stack([dense, dense[:, ::-1]])
    x = np.random.default_rng(0).standard_normal((2, 3, weight.k)).astype(np.float32)
    call = lambda x, a: quantized_matmul(x, a, weight, "nibbles")
    assert error(jax.jit(jax.vmap(call, (0, None)))(x, arrays), x @ dense) < 2e-6
    assert error(jax.jit(jax.vmap(call, (None, 0)))(x[0], stack), x[0] @ w) < 2e-6
    assert error(jax.jit(jax.vmap(call))(x, stack), x @ w) < 2e-6
    both = jax.jit(jax.vmap(jax.vmap(call, (0, None)), (None, 0)))(x, stack)
    assert error(both, x[None] @ w[:, None]) < 2e-6
    grads = jax.jit(jax.vmap(jax.grad(lambda x, a: jnp.sum(call(x, a)))))(x, stack)
    assert error(grads, np.broadcast_to(w.sum(-1)[:, None], x.shape)) < 2e-6


def test_mapped_layers_are_a_loop_and_mapped_rows_one_product():
    weight, arrays, _ = make("int4_g128")
    stack = {n: jnp.stack([v] * 5) for n, v in arrays.items()}
    x = jnp.ones((5, 3, weight.k))
    call = lambda x, a: quantized_matmul(x, a, weight, "nibbles")
    dots = lambda f, *a: len(re.findall(r" dot\(", jax.jit(f).lower(*a).compile().as_text()))
    one = dots(call, x[0], arrays)
    assert one == dots(jax.vmap(call), x, stack) == dots(jax.vmap(call, (0, None)), x, arrays)


def test_a_chain_of_layers_is_not_decoded_at_once():
    weight = Weight(512, 512, 64, "int4")
    codes, fields, _ = logical(weight)
    layers = [pack(weight, "nibbles", codes, fields) for _ in range(8)]

    def chain(x, layers):
        for arrays in layers:
            x = quantized_matmul(x, arrays, weight, "nibbles")
        return x

    compiled = jax.jit(chain).lower(jnp.ones((1, 512)), layers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 512 * 512


# --- bias and activation, several weights


def finished(y, bias, activation):
    y = y + np.asarray(bias, np.float64)
    if activation == "relu":
        return np.maximum(y, 0)
    if activation == "silu":
        return y / (1 + np.exp(-y))
    return y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_and_activation_and_their_derivatives(activation):
    weight, arrays, dense = make("int4_g32")
    arrays = arrays | {"scale": arrays["scale"] / 50}
    dense = dense / 50
    x, t = (np.random.default_rng(i).standard_normal((3, weight.k)) for i in range(2))
    bias = np.random.default_rng(2).standard_normal(weight.n)
    fn = jax.jit(
        lambda x, b: quantized_matmul(x, arrays, weight, "nibbles", bias=b, activation=activation)
    )
    operands = jnp.asarray(x, jnp.float32), jnp.asarray(bias, jnp.float32)
    assert error(fn(*operands), finished(x @ dense, bias, activation)) < 2e-6
    got = jax.jvp(fn, operands, (jnp.asarray(t, jnp.float32), 2 * operands[1]))[1]
    step = 1e-6
    ends = [finished((x + h * t) @ dense, bias * (1 + 2 * h), activation) for h in (step, -step)]
    # float32 sums on one side; on the other an error of step ** 2 = 1e-12 and 1e-16 / step
    assert error(got, (ends[0] - ends[1]) / (2 * step)) < 1e-5
    rows = jax.vmap(fn, (0, None))(operands[0][:, None], operands[1])
    assert error(rows[:, 0], finished(x @ dense, bias, activation)) < 2e-6


def test_several_weights_of_one_x_stacked_and_differentiated():
    first, arrays, dense = make("int4_g128")
    second = first._replace(n=40)
    others = {n: v[:40] for n, v in arrays.items()}
    call = lambda x, a, b: joined_matmul(x, [a, b], [first, second], "nibbles")
    x = np.random.default_rng(0).standard_normal((2, 3, first.k)).astype(np.float32)
    stack = lambda held: {n: jnp.stack([v, v]) for n, v in held.items()}
    ys = jax.jit(jax.vmap(call))(x, stack(arrays), stack(others))
    assert error(ys[0], x @ dense) < 2e-6
    assert error(ys[1], x @ dense[:, :40]) < 2e-6
    loss = lambda x: sum(jnp.sum(y) * (1 + i) for i, y in enumerate(call(x, arrays, others)))
    wanted = dense.sum(1) + 2 * dense[:, :40].sum(1)
    assert error(jax.jit(jax.grad(loss))(x[0]), np.broadcast_to(wanted, x[0].shape)) < 2e-6


def test_a_wrong_bias_or_activation_is_refused():
    weight, arrays, _ = make("int4_g128")
    x = jnp.ones((1, 512))
    with pytest.raises(ValueError, match=r"bias must be floats \[96\].*is float32\[5\]"):
        quantized_matmul(x, arrays, weight, "nibbles", bias=jnp.ones(5))
    with pytest.raises(ValueError, match="activation 'tanh' is none of relu, silu, gelu_tanh"):
        quantized_matmul(x, arrays, weight, "nibbles", activation="tanh")


# --- meshes


def test_a_bias_is_added_once_where_k_is_cut():
    weight, arrays, dense = make("int4_g128")
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    x, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 512), (96,)]))
    held = {n: cut(v, P("d", "t"), mesh) for n, v in arrays.items()}
    run = lambda x, a, b: quantized_matmul(x, a, weight, "nibbles", bias=100 * b, activation="relu")
    compiled = jax.jit(run).lower(cut(x, P(None, "t"), mesh), held, bias).compile()
    assert collectives(compiled) == {"all-reduce": 1}
    wanted = np.maximum(np.asarray(x, np.float64) @ dense + 100 * np.asarray(bias, np.float64), 0)
    assert error(compiled(cut(x, P(None, "t"), mesh), held, bias), wanted) < 2e-6


def collectives(compiled):
    kinds = "all-gather all-to-all collective-permute all-reduce".split()
    text = compiled.as_text()
    return {k: n for k in kinds if (n := len(re.findall(rf" {k}(?:-start)?\(", text)))}


def cut(values, spec, mesh):
    return jax.device_put(values, NamedSharding(mesh, spec))


CUTS = {  # x, codes and scales; what must be exchanged
    "m and n": (P("d", None), P("t", None), {}),
    "m and k": (P("d", "t"), P(None, "t"), {"all-reduce": 1}),
    "k of x alone": (P("d", "t"), P(), {"all-reduce": 1}),
    "n and k": (P(None, "t"), P("d", "t"), {"all-reduce": 1}),
    "nothing of the weight": (P("d", None), P(), {}),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize(("name", "layout"), [("int4_g128", "nibbles"), ("nf4", "nibbles")])
def test_no_operand_is_gathered(case, name, layout):
    weight, arrays, dense = make(name, layout)
    x_spec, w_spec, wanted = CUTS[case]
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (4, weight.k))
    operands = cut(x, x_spec, mesh), {n: cut(v, w_spec, mesh) for n, v in arrays.items()}
    call = jax.jit(lambda x, a: quantized_matmul(x, a, weight, layout))
    compiled = call.lower(*operands).compile()
    assert collectives(compiled) == wanted
    assert error(compiled(*operands), np.asarray(x, np.float64) @ dense) < 2e-6


HOPPER = {  # tiles of 16 channels by 128 along k
    "int4": (Weight(512, 128, 128, "int4", "bfloat16"), "hopper4"),
    "zeros": (Weight(512, 128, 64, "uint4", "float16", zero="uint4"), "hopper4"),
    "nf4": (Weight(512, 128, 64, "uint4", values=problems.NF4), "hopper4"),
    "int8": (Weight(512, 128, 512, "int8"), "hopper8"),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("name", HOPPER)
def test_no_operand_in_the_order_of_a_hopper_kernel_is_gathered(case, name):
    (weight, layout), (x_spec, w_spec, wanted) = HOPPER[name], CUTS[case]
    codes, fields, dense = logical(weight)
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (4, weight.k))

    def placed(values):  # scales of channels have no tiles along k
        spec = (*w_spec, None, None, None)[: values.ndim]
        spec = [None if n == 1 else axis for n, axis in zip(values.shape, spec, strict=True)]
        return cut(values, P(*spec), mesh)

    operands = cut(x, x_spec, mesh), jax.tree.map(placed, pack(weight, layout, codes, fields))
    call = lambda x, a: quantized_matmul(x, a, weight, layout)
    compiled = jax.jit(call).lower(*operands).compile()
    assert collectives(compiled) == wanted
    truth = np.asarray(x, np.float64) @ dense
    assert error(compiled(*operands), truth) < 2e-6
    grad = jax.jit(jax.grad(lambda x, a: (call(x, a) * truth.astype(np.float32)).sum()))
    back = grad.lower(*operands).compile()
    assert "all-gather" not in collectives(back)
    assert error(back(*operands), truth @ dense.T) < 4e-6


def test_channels_are_cut_along_k_without_groups():
    weight, arrays, dense = make("int8_channel", "bytes")
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (4, weight.k))
    operands = (
        cut(x, P(None, "t"), mesh),
        {
            "codes": cut(arrays["codes"], P(None, "t"), mesh),
            "scale": cut(arrays["scale"], P(), mesh),
        },
    )
    compiled = jax.jit(lambda x, a: quantized_matmul(x, a, weight, "bytes")).lower(*operands)
    compiled = compiled.compile()
    assert collectives(compiled) == {"all-reduce": 1}
    assert error(compiled(*operands), np.asarray(x, np.float64) @ dense) < 2e-6


def test_experts_are_cut_and_stay_where_they_are():
    weight, arrays, dense = make("int4_g128")
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    stack = {n: cut(jnp.stack([v] * 8), P("t"), mesh) for n, v in arrays.items()}
    x = cut(jax.random.normal(jax.random.key(0), (8, 4, weight.k)), P("t", "d"), mesh)
    call = jax.jit(jax.vmap(lambda x, a: quantized_matmul(x, a, weight, "nibbles")))
    compiled = call.lower(x, stack).compile()
    assert collectives(compiled) == {}
    assert error(compiled(x, stack), np.asarray(x, np.float64) @ dense) < 2e-6


def test_a_cut_inside_a_group_is_refused():
    weight, arrays, _ = make("int4_g128")
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    arrays = {"codes": cut(arrays["codes"], P(None, "t"), mesh), "scale": arrays["scale"]}
    with pytest.raises(Exception, match=r"8 shards cannot cut k = 512.*multiple of 128"):
        jax.jit(lambda x, a: quantized_matmul(x, a, weight, "nibbles"))(jnp.ones((1, 512)), arrays)


# --- choosing and refusing


def test_a_config_is_of_a_named_implementation():
    weight, arrays, _ = make("int4_g128")
    call = functools.partial(quantized_matmul, jnp.ones((1, 512)), arrays, weight, "nibbles")
    with pytest.raises(ValueError, match=r"\(4, 2\) needs the name of its implementation"):
        call(config=(4, 2))
    for name in ("xla_cpu", "reference"):
        with pytest.raises(ValueError, match="it takes no config"):
            call(config=(4, 2), implementation=name)


def test_the_best_is_chosen_and_a_name_is_never_replaced():
    weight = problems.WEIGHTS["int4_g128"]
    problem = Problem(1, weight, "nibbles", "float32", "float32")
    assert choose("quantized_matmul", problem, CPU) == "xla_cpu"
    tpu = Device("tpu", "TPU v5 lite")
    assert choose("quantized_matmul", problem, tpu) == "reference"
    assert choose("quantized_matmul", problem, CPU, "reference") == "reference"
    with pytest.raises(ValueError, match=r"xla_cpu cannot run .* written for XLA:CPU"):
        choose("quantized_matmul", problem, tpu, "xla_cpu")
    with pytest.raises(ValueError, match=r"no implementation 'xla', only .*reference"):
        choose("quantized_matmul", problem, CPU, "xla")
    wide = problem._replace(x="float64")
    assert choose("quantized_matmul", wide, CPU) == "reference"
    with pytest.raises(ValueError, match="not float64"):
        choose("quantized_matmul", wide, CPU, "xla_cpu")


def test_the_reference_is_last_and_takes_everything():
    for rows in IMPLEMENTATIONS.values():
        assert list(rows)[-1] == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a, w: (x[:, :-1], a, w, "nibbles"), r"x must be \[m, 512\]"),
        (lambda x, a, w: (x[0], a, w, "nibbles"), r"x must be \[m, 512\]"),
        (lambda x, a, w: (x, a, w, "planar"), "layout 'planar' is none of nibbles, bytes"),
        (lambda x, a, w: (x, a, w, "bytes"), "int4 codes are no whole bytes"),
        (
            lambda x, a, w: (x, {"codes": a["codes"]}, w, "nibbles"),
            r"'scale' of .* must be bfloat16\[96, 4\], is None",
        ),
        (
            lambda x, a, w: (x, a | {"codes": a["codes"].T}, w, "nibbles"),
            r"'codes' of .* must be uint8\[96, 256\], is uint8\[256, 96\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weight, arrays, _ = make("int4_g128")
    with pytest.raises(ValueError, match=message):
        quantized_matmul(*change(jnp.ones((2, 512)), arrays, weight))


@pytest.mark.parametrize(("weight", "layout"), LAID)
def test_no_rows_give_no_rows(weight, layout):
    weight, order = problems.WEIGHTS[weight], LAYOUTS[layout]
    arrays = {n: jnp.zeros(v.shape, v.dtype) for n, v in order.shapes(weight).items()}
    x = jnp.zeros((0, weight.k))
    assert quantized_matmul(x, arrays, weight, layout).shape == (0, weight.n)
