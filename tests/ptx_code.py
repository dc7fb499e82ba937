"""Carries out inline PTX of the Hopper kernels for decoding, in numpy, for all lanes at once."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
WARP = 32
NOTHING = ("bar.warp", "bra")  # where all lanes run in step


@functools.cache
def parse(code: str) -> list[tuple[str, str, str, list[str]]]:
    """Its statements: ("@p", "@!p" or "", name, operands)."""
    out = []
    for statement in re.sub(r"^\{|\}$", "", code.strip()).split(";"):
        statement = re.sub(r"\w+_\$\{:uid\}:", "", statement).strip()
        if statement and not statement.startswith(".reg"):
            guard = re.match(r"(@!?\w+\s+)?", statement)
            assert guard is not None
            name, _, rest = statement[guard.end() :].partition(" ")
            operands = [p.strip() for p in re.findall(r"\{[^}]*\}|[^,\s{][^,]*", rest)]
            out.append((guard[0].strip(), name, operands))
    return out


def run(
    machine: Any, program: Any, constraints: str, given: Sequence[Any], live: np.ndarray
) -> list[Any]:
    """The results of a piece of PTX, whose operands are numbered results first."""
    count = sum(c.startswith("=") for c in constraints.split(","))
    names = {f"${count + i}": v for i, v in enumerate(given)}
    for guard, name, operands in program:
        taken = live
        if guard:
            flag = names[guard.lstrip("@!")]
            taken = live & (~flag if "!" in guard else flag)
        _statement(machine, name, operands, names, taken)
    return [names[f"${i}"] for i in range(count)]


def _statement(
    machine: Any, name: str, operands: list[str], names: dict[str, Any], live: np.ndarray
) -> None:
    get = lambda i: _get(operands[i], names)
    if name.startswith(NOTHING):
        return
    if name.startswith("setp.ne"):
        names[operands[0]] = get(1) != get(2)
    elif name.startswith("mbarrier.init"):
        machine.barriers.open(get(0), int(operands[1]), live)
    elif name.startswith("fence.mbarrier_init"):
        machine.barriers.fence(live)
    elif name.startswith("mbarrier.arrive.expect_tx"):
        machine.barriers.expect(get(1), int(operands[2]), live)
    elif name.startswith("mbarrier.try_wait.parity"):
        machine.barriers.wait(get(1), get(2), live)
        names[operands[0]] = np.ones_like(live)
    elif name == "bar.sync":
        assert (operands[0] == "0") == (len(operands) == 1), "barrier 0 is that of the whole block"
        if len(operands) > 1:
            assert (np.bincount(machine.block[live]) == int(operands[1])).all()
        machine.meet(live)
    elif name.startswith("barrier.cluster"):
        machine.meet_cluster(live, "arrive" in name)
    elif name.startswith("cp.async.bulk"):
        _copy(machine, operands, names, live)
    elif name.startswith("st.async"):
        _send(machine, operands, names, live)
    elif name.startswith(("ld.", "st.")):
        _memory(machine, name, operands, names, live)
    elif name == "mov.b32" and operands[0][0] == "{":  # its halves
        for i, half in enumerate(_list(operands[0])):
            names[half] = (get(1) >> np.uint32(16 * i)).astype(np.uint16)
    elif name.startswith("mma"):
        machine.whole(live, WARP)
        a, b, c = ([_all(_get(v, names), live) for v in _list(o)] for o in operands[1:])
        names.update(zip(_list(operands[0]), _mma(a, b, c), strict=True))
    elif name == "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        machine.whole(live, WARP)
        lines = machine.load(get(1), 4, live, "shared").T.reshape(-1, 4, 8, 4)  # matrix, r, c
        names.update(zip(_list(operands[0]), lines.swapaxes(0, 1).reshape(4, -1), strict=True))
    elif name == "shfl.sync.bfly.b32":
        machine.whole(live, WARP)
        assert operands[3:] == ["31", "0xFFFFFFFF"]
        other = np.arange(WARP) ^ int(operands[2])
        names[operands[0]] = _all(get(1), live).reshape(-1, WARP)[:, other].ravel()
    elif name == "mov.u32" and operands[1] == "%cluster_ctarank":
        names[operands[0]] = machine.rank.astype(np.uint32)
    elif name.startswith("mapa"):
        names[operands[0]] = machine.far(*(_all(get(i), live) for i in (1, 2)), live)
    else:
        names[operands[0]] = _value(name, [_get(a, names) for a in operands[1:]])


def _list(text: str) -> list[str]:
    return [p.strip() for p in text.strip("{}").split(",")]


def _all(value: Any, live: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, live.shape)


def _get(text: str, names: dict[str, Any]) -> Any:
    """A register, a number, or an address."""
    if text in names:
        return names[text]
    if text[0] == "[":
        base, _, offset = text.strip("[]").partition("+")
        return names[base] + np.asarray(int(offset or 0), names[base].dtype)
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    return np.uint32(int(text, 0))


def _memory(machine: Any, name: str, operands: list[str], names: dict, live: np.ndarray) -> None:
    place, values = operands if name[0] == "s" else operands[::-1]
    address, parts = _get(place, names), _list(values)
    space = "shared" if ".shared" in name else "global"
    if name[0] == "s":
        machine.store(address, [np.asarray(names[p]) for p in parts], live, space)
        return
    for part, got in zip(parts, machine.load(address, len(parts), live, space), strict=True):
        names[part] = np.where(live, got, names.get(part, np.uint32(0)))


def _copy(machine: Any, operands: list[str], names: dict, live: np.ndarray) -> None:
    """Global to shared memory."""
    if not live.any():
        return
    size = int(operands[2])
    assert size % 16 == 0
    to, source = (
        machine.places(_get(at, names), 16, live, space)
        for at, space in zip(operands[:2], ("shared", "global"), strict=True)
    )
    for at in (to, source):
        assert (machine.owner[at] == machine.owner[at + size - 1]).all()
    words = source[:, None] // 4 + np.arange(size // 4)
    barrier = _all(_get(operands[3], names), live)[live]
    machine.store_async(to, machine.views[4][words], barrier, live)


def _send(machine: Any, operands: list[str], names: dict, live: np.ndarray) -> None:
    """Registers to the shared memory of a block of the cluster."""
    if not live.any():
        return
    data = np.stack([_all(_get(v, names), live)[live] for v in _list(operands[1])], 1)
    to = machine.places(_get(operands[0], names), 4 * data.shape[1], live, "cluster")
    barrier = _all(_get(operands[2], names), live)[live]
    machine.store_async(to, data.view(np.uint32), barrier, live)


def halves(word: np.ndarray) -> np.ndarray:
    """Two bfloat16 of a word as float32, ``[..., 2]``."""
    return np.ascontiguousarray(word)[..., None].view(BF16).astype(np.float32)


def _pair(values: np.ndarray) -> np.ndarray:
    """The inverse of `halves`, rounded."""
    return np.ascontiguousarray(values.astype(BF16)).view(np.uint32)[..., 0]


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Float64 as float32, odd where it is not exact: what that is rounded to, `values` are."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    below = np.abs(near.astype(np.float64)) > np.abs(values)
    return np.where(inexact, bits - below | np.uint32(1), bits).view(np.float32)


def _mma(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """`mma.m16n8k16`: where the fragments lie is PTX ISA 9.7.14, "Matrix Fragments".

    Lane 4 r + q of a has rows r + 8 i at columns 2 q + e + 8 j in register i + 2 j; of b rows
    2 q + e + 8 j of column r in register j.
    """
    warps = len(c[0]) // WARP
    left = np.stack([halves(v).reshape(warps, 8, 4, 2) for v in a], 1)  # [warp, (j, i), r, q, e]
    left = left.reshape(warps, 2, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, 16)
    right = np.stack([halves(v).reshape(warps, 8, 4, 2) for v in b], 1)  # [warp, j, r, q, e]
    right = right.transpose(0, 1, 3, 4, 2).reshape(warps, 16, 8)
    total = np.stack([v.reshape(warps, 8, 4) for v in c], 1).reshape(warps, 2, 2, 8, 4)
    total = total.transpose(0, 1, 3, 4, 2).reshape(warps, 16, 8)
    total = total + left.astype(np.float64) @ right.astype(np.float64)
    out = total.astype(np.float32).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(out.reshape(4, warps * WARP))


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    out = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            terms = [v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
            out = out | terms[0] & terms[1] & terms[2]
    return out


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    out = np.uint32(0)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (nibble.astype(np.uint64) & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _dp4a(a: Any, b: Any, c: Any) -> Any:
    byte = lambda v, i: v >> np.uint32(8 * i) & np.uint32(255)
    return sum((byte(a, i) * byte(b, i) for i in range(4)), c)


def _value(name: str, args: list[Any]) -> Any:
    match name:
        case "mov.b32":
            return args[0]
        case "shr.u32":
            return args[0] >> args[1]
        case "lop3.b32":
            return _lop3(*args)
        case "prmt.b32":
            return _prmt(*args)
        case "dp4a.u32.u32":
            return _dp4a(*args)
        case "add.rn.bf16x2":
            return _pair(halves(args[0]) + halves(args[1]))
        case "fma.rn.bf16x2":
            a, b, c = (halves(v).astype(np.float64) for v in np.broadcast_arrays(*args))
            return _pair(_to_odd(a * b + c))
        case "mul.rn.bf16x2":
            return _pair(halves(args[0]) * halves(args[1]))
        case "fma.rn.f32":
            a, b, c = (v.astype(np.float64) for v in args)
            return (a * b + c).astype(np.float32)
        case "cvt.rn.bf16x2.f32":
            return _pair(np.stack(np.broadcast_arrays(args[1], args[0]), -1))
        case "cvt.rn.bf16.f32":
            return args[0].astype(BF16)
        case "cvt.f32.f16":
            return args[0].view(np.float16).astype(np.float32)
        case "ex2.approx.ftz.f32":
            return np.exp2(args[0])
        case "div.approx.ftz.f32":
            return args[0] / args[1]
        case "rsqrt.approx.ftz.f32":
            return (1 / np.sqrt(args[0])).astype(np.float32)
        case "max.NaN.f32":
            return np.maximum(*args)
    raise NotImplementedError(name)
