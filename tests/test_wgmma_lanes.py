"""The inline code of the Hopper kernel for m > 16, carried out lane by lane: what becomes of codes,
and how the sums of teams and blocks meet.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs_mosaic
from hopper_operands import ACTIVATIONS
from lane_memory import GROUP
from lanes import Ref, on_a_cpu
from ptx_code import halves
from test_hopper import WEIGHTS, _operands, _pack

from pallas_kernels.quantized_matmul import hopper_layout, mosaic_wgmma
from pallas_kernels.quantized_matmul.mosaic_gpu import PAIR_TABLE
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight
from pallas_kernels.quantized_matmul.problems import NF4

pytestmark = needs_mosaic
BF16 = jnp.dtype(jnp.bfloat16)
ROWS = 128  # channels of two warpgroups


def _numbers(weight, logical):
    """What operands stand for, `[n, k]` in float64; scales per channel are left to the sums."""
    along_k = lambda v: np.repeat(v.astype(np.float64), weight.group, 0)[: weight.k]
    w = logical["codes"].astype(np.float64)
    if weight.values is not None:
        w = np.asarray(weight.values, np.float32).astype(BF16).astype(np.float64)[w.astype(int)]
    if hopper_layout.per_channel(weight):
        return w.T
    w = w - along_k(logical["zero"]) if "zero" in logical else w
    w = w * along_k(logical["scale"])
    return (w + along_k(logical["offset"]) if "offset" in logical else w).T


def _operand(machine, weight, packed, deep, at):
    """The operands that two warpgroups make of a stage, `[n, 64 deep]` in float64."""
    from pallas_kernels.quantized_matmul import hopper_fragments, hopper_pairs

    names, (tile, half) = mosaic_wgmma.part_names(weight), divmod(at * deep, 2)
    stages = []
    for name in ("codes", *names):
        words = packed[name][:, tile]
        size = hopper_layout.code_words(weight) // 2 * deep
        size = size if name == "codes" else mosaic_wgmma.part_words(weight, name, deep)
        words = words if words.shape[1] == size else words[:, half * size :][:, :size]
        stages.append(np.pad(words, ((0, ROWS // 16 - len(words)), (0, 0))))
    table = [] if weight.values is None else [PAIR_TABLE]
    places = machine.windows([4 * np.prod(s) for s in (*(v.shape for v in stages), *table)], 1)
    machine.begin(0, 1, 1, 2)
    group, refs = machine.thread // GROUP, []
    for words, place in zip(stages, places, strict=False):
        begin = machine.shared + place
        machine.bytes[begin : begin + words.nbytes] = words.view(np.uint8).ravel()
        own = begin + group * 16 * words.shape[1]  # four tiles of 16 channels
        refs.append(Ref(machine, own, (4, words.shape[1]), np.int32))
    if table:
        refs.append(Ref(machine, machine.shared + places[-1] + 0 * group, PAIR_TABLE, np.int32))
        hopper_pairs.write_pairs(weight.values, 2)(refs[-1])
        machine.meet(machine.live)
    pairs = halves(hopper_fragments.fragments(weight, deep)(refs)) * hopper_fragments.unit(weight)
    warp, r, c = machine.thread // 32, machine.thread % 32 // 4, machine.thread % 4
    out = np.full((ROWS, 64 * deep), np.nan)
    for i, pair in enumerate(pairs):
        step, j = divmod(i, 4)
        for e in range(2):
            out[16 * warp + r + 8 * (j % 2), 16 * step + 8 * (j // 2) + 2 * c + e] = pair[:, e]
    return out


CASES = [*WEIGHTS, *(f"nf4 {s} {g}" for s in ("bfloat16", "float32") for g in (32, 128))]
CASES += ["nf4 channel"]


def _case(name):
    """A weight, and its numbers in logical order."""
    if name in WEIGHTS:
        return WEIGHTS[name], _operands(name)
    _, scale, group = (
        (*name.split(), "float32", "264")[:3]
        if "channel" not in name
        else (*("nf4", "float32", "264"),)
    )
    weight, rng = Weight(264, 40, int(group), "uint4", scale, values=NF4), np.random.default_rng(0)
    size = (weight.groups, weight.n)
    codes = rng.integers(0, 16, (weight.k, weight.n)).astype("uint4")
    return weight, {"codes": codes, "scale": rng.uniform(0.01, 2, size).astype(jnp.dtype(scale))}


@pytest.mark.parametrize("name", CASES)
def test_operands_are_what_the_reference_multiplies(name, monkeypatch):
    machine = on_a_cpu(monkeypatch, 2**21)
    weight, logical = _case(name)
    packed = {part: np.asarray(v) for part, v in _pack(logical, weight).items()}
    numbers, split = _numbers(weight, logical), weight.values and weight.scale != "bfloat16"
    for deep in (1, 2):
        if deep * hopper_layout.code_words(weight) > 512:
            continue
        for at in range(-(-weight.k // (64 * deep))):
            wanted = numbers[:, 64 * deep * at :][:, : 64 * deep].astype(np.float32)
            wanted = wanted.astype(BF16).astype(np.float64)
            got = _operand(machine, weight, packed, deep, at)[: weight.n, : wanted.shape[1]]
            if split and not hopper_layout.per_channel(weight):
                np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=0)
                assert (got != wanted).mean() <= 0.01
            else:
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["symmetric", "signed zeros", "int8 groups"])
def test_scales_of_integers_may_be_large_small_or_none(name, monkeypatch):
    """As far as their products are normal: what the reference multiplies, to the bit."""
    machine, (weight, logical) = on_a_cpu(monkeypatch, 2**21), _case(name)
    wide = (2.0**-80, 2.0**33) if weight.scale == "bfloat16" else (2.0**-24, 65504)
    scale = np.geomspace(*wide, weight.n).astype(logical["scale"].dtype)
    logical["scale"] = np.stack([scale] * len(logical["scale"]))
    logical["scale"][:, 5], logical["scale"][:, 7] = 0, -1.75
    packed = {part: np.asarray(v) for part, v in _pack(logical, weight).items()}
    got = _operand(machine, weight, packed, 1, 0)[: weight.n]
    wanted = _numbers(weight, logical)[:, :64].astype(np.float32).astype(BF16).astype(np.float64)
    np.testing.assert_array_equal(got, wanted)


def test_scales_of_a_codebook_may_be_large_small_or_none(monkeypatch):
    machine, weight = on_a_cpu(monkeypatch, 2**21), Weight(64, 16, 64, "uint4", values=NF4)
    codes = np.arange(16).repeat(4)[:, None].repeat(16, 1).astype("uint4")
    scale = np.geomspace(2**-100, 3.4e38, 16).astype(np.float32)[None]
    scale[0, 3], scale[0, 5] = 0, -1.7
    packed = {k: np.asarray(v) for k, v in _pack({"codes": codes, "scale": scale}, weight).items()}
    got = _operand(machine, weight, packed, 1, 0)[:16]
    wanted = _numbers(weight, {"codes": codes, "scale": scale}).astype(np.float32)
    wanted = wanted.astype(BF16).astype(np.float64)  # the largest is infinite
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("ends", [(False, "relu"), (True, None), (True, "silu"), (False, None)])
@pytest.mark.parametrize("name", ["symmetric", "int8", "fp8", "zeros", "nf4"])
def test_sums_become_results(name, ends, monkeypatch):
    """By the unit of the operands, scales of channels, bias and activation."""
    from pallas_kernels.quantized_matmul import hopper_finish, hopper_fragments

    machine, (bias, activation) = on_a_cpu(monkeypatch, 2**21), ends
    weight, rng, rows = WEIGHTS[name], np.random.default_rng(0), 16
    if name in ("int8", "fp8"):
        weight = weight._replace(group=weight.k, scale="float32")
    layout = "hopper8" if "8" in weight.code else "hopper4"
    problem = Problem(rows, weight, layout, "bfloat16", "float32", bias, activation)
    held = [
        rng.uniform(0.5, 2, 256).astype(np.float32)
        for there in (hopper_layout.per_channel(weight), bias)
        if there
    ]
    places, refs = machine.windows([1024] * max(1, len(held)), 1), []
    machine.begin(0, 1, 1, 1)
    for values, place in zip(held, places, strict=False):
        begin = machine.shared + place
        machine.bytes[begin : begin + 1024] = values.view(np.uint8)
        refs.append(Ref(machine, begin + 0 * machine.thread, (256,), np.float32))
    sums = rng.normal(size=(rows // 4, 2, len(machine.thread))).astype(np.float32)
    first, small = np.full(len(machine.thread), 64, np.int32), hopper_fragments.unit(weight)
    got = hopper_finish.finish(problem, rows)(sums / np.float32(small), refs, first)
    channel = 64 + 16 * (machine.thread // 32 % 4) + machine.thread % 32 // 4
    wanted = sums.astype(np.float64)
    for i in range(rows // 4):
        of = [values[channel + 8 * (i % 2)] for values in held]
        wanted[i] = wanted[i] * of[0] if hopper_layout.per_channel(weight) else wanted[i]
        wanted[i] += of[-1] if bias else 0
    wanted = ACTIVATIONS[activation](wanted)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-6, atol=1e-6)


CUTS = [
    Config(rows, 1, 4, split, 1, 8, channels, teams)
    for rows, (channels, teams), split in itertools.product(
        (32, 64, 128, 256), ((128, 1), (64, 2), (128, 2), (256, 1)), (1, 2, 4)
    )
    if split * teams > 1 and (channels * teams == 128 or rows <= 64)
]


@pytest.mark.parametrize("config", CUTS, ids=str)
def test_sums_meet(config, monkeypatch):
    """Those of teams and blocks, each lane's by the lane that owns the rows; no byte is sent that
    nobody waits for.
    """
    from pallas_kernels.quantized_matmul.hopper_finish import Blocks, Teams
    from pallas_kernels.quantized_matmul.hopper_sums import Exchange

    machine, c = on_a_cpu(monkeypatch, 2**23), config
    members, words = c.channels // 64, mosaic_wgmma.block_words(c)
    places = machine.windows([4 * mosaic_wgmma.team_words(c), 4 * words, 8], c.split)
    machine.begin(0, 1, c.split, members * c.teams)
    own = machine.shared + machine.block * machine.window
    left = Ref(machine, own + places[0], (mosaic_wgmma.team_words(c),), np.float32)
    slots = Ref(machine, own + places[1], (words,), np.float32)
    arrived = Ref(machine, own + places[2], (1, 2), np.int32)
    teams, blocks = Teams(c.rows, c.teams, members), Blocks(c.rows, c.split, members)
    exchange = Exchange(4 * words)
    member, team = machine.thread // GROUP % members, machine.thread // GROUP // members
    registers, live = c.rows // 4, machine.live
    sums = np.random.default_rng(0).integers(-999, 999, (registers, 2, len(live)))
    sums = sums.astype(np.float32)
    if c.split > 1:
        exchange.open(arrived)
    got = sums
    if c.teams > 1:
        teams.meet()
        machine.live = live & (team > 0)
        teams.leave(sums, left)
        machine.live = live
        teams.meet()
        machine.live = live & (team == 0)
        got = teams.add(sums, left)
        machine.live = live
    if c.split > 1:
        exchange.meet()
        machine.live = live & (team == 0)
        blocks.send(got, slots, arrived)
        exchange.wait(arrived.at[0])
        got = blocks.add(got, slots)
    machine.live = live
    machine.finish()
    whole = sums.reshape(registers, 2, c.split, c.teams, members, GROUP).sum((2, 3))
    at = machine.rank * (registers // c.split) + np.arange(registers // c.split)[:, None]
    wanted = whole[at, :, member, machine.thread % GROUP].swapaxes(1, 2)
    np.testing.assert_array_equal(got[..., team == 0], wanted[..., team == 0])
