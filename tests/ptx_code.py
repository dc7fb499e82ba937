"""Carries out inline PTX of the Hopper kernel for m <= 16, in numpy, for all lanes at once."""

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def run(
    machine: Any, code: str, constraints: str, given: Sequence[Any], live: np.ndarray
) -> list[np.ndarray]:
    """The results of a piece of PTX, whose operands are numbered results first."""
    count = sum(c.startswith("=") for c in constraints.split(","))
    names = {f"${count + i}": v for i, v in enumerate(given)}
    for statement in re.sub(r"^\{|\}$", "", code.strip()).split(";"):
        statement = re.sub(r"\w+_\$\{:uid\}:", "", statement).strip()
        if statement and not statement.startswith(".reg"):
            _statement(machine, statement, names, live)
    return [names[f"${i}"] for i in range(count)]


def _statement(machine: Any, text: str, names: dict[str, Any], live: np.ndarray) -> None:
    guard = re.match(r"@(!?)(\w+)\s+", text)
    if guard:
        text = text[guard.end() :]
        live = live & (~names[guard[2]] if guard[1] else names[guard[2]])
    name, _, rest = text.partition(" ")
    operands = [p.strip() for p in re.findall(r"\{[^}]*\}|[^,\s{][^,]*", rest)]
    if name.startswith(("mbarrier.try_wait", "setp")):
        to, *args = operands
        names[to] = np.ones_like(live) if name[0] == "m" else _get(args[0], names) != 0
        return
    if name.startswith(("mbarrier", "fence", "bar.warp", "bra")):
        return
    if name == "bar.sync":
        machine.meet.wait()
        return
    if name.startswith("cp.async.bulk"):
        _copy(machine, operands, names, live)
        return
    if name.startswith(("ld.", "st.")):
        _memory(machine, name, operands, names, live)
        return
    if name == "mov.b32" and operands[0][0] == "{":  # its halves
        word = _get(operands[1], names)
        for i, half in enumerate(_list(operands[0])):
            names[half] = (word >> np.uint32(16 * i)).astype(np.uint16)
        return
    if name.startswith("mma"):
        a, b, c = ([_get(v, names) for v in _list(o)] for o in operands[1:])
        names.update(zip(_list(operands[0]), _mma(a, b, c), strict=True))
        return
    to, *args = operands
    with np.errstate(all="ignore"):
        value = _value(name, [_get(a, names) for a in args])
    names[to] = np.broadcast_to(value, live.shape)


def _list(text: str) -> list[str]:
    return [p.strip() for p in text.strip("{}").split(",")]


def _get(text: str, names: dict[str, Any]) -> Any:
    if text in names:
        return names[text]
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    return np.uint32(int(text, 0))


def _memory(machine: Any, name: str, operands: list[str], names: dict, live: np.ndarray) -> None:
    place, values = operands if name[0] == "s" else operands[::-1]
    address = _get(place.strip("[]"), names)
    for i, part in enumerate(_list(values)):
        at = address + np.asarray(4 * i, address.dtype)
        if name[0] == "s":
            machine.store(at, np.asarray(names[part]), live)
        else:
            got = machine.load(at, np.uint32, live)
            names[part] = np.where(live, got, names.get(part, np.uint32(0)))


def _copy(machine: Any, operands: list[str], names: dict, live: np.ndarray) -> None:
    to, source, size = operands[:3]
    for a, b in zip(*(_get(v.strip("[]"), names)[live] for v in (to, source)), strict=True):
        assert a % 16 == b % 16 == int(size) % 16 == 0
        here, there = (slice(int(v), int(v) + int(size)) for v in (a, b))
        assert machine.known[there].all()
        machine.bytes[here] = machine.bytes[there]


def halves(word: np.ndarray) -> np.ndarray:
    """Two bfloat16 of a word as float32, ``[..., 2]``."""
    return np.ascontiguousarray(word)[..., None].view(BF16).astype(np.float32)


def _pair(values: np.ndarray) -> np.ndarray:
    """The inverse of `halves`, rounded."""
    return np.ascontiguousarray(values.astype(BF16)).view(np.uint32)[..., 0]


def _mma(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """`mma.m16n8k16`: where the fragments lie is PTX ISA 9.7.14, "Matrix Fragments"."""
    lane = np.arange(32)
    r, pair = lane // 4, 2 * (lane % 4)
    warps = len(c[0]) // 32
    left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    total = np.zeros((warps, 16, 8))
    by_warp = lambda v: np.broadcast_to(v, warps * 32).reshape(warps, 32)
    for i, word in enumerate(a):
        both = halves(by_warp(word))
        for e in (0, 1):
            left[:, r + 8 * (i % 2), pair + e + 8 * (i // 2)] = both[..., e]
    for i, word in enumerate(b):
        both = halves(by_warp(word))
        for e in (0, 1):
            right[:, pair + e + 8 * i, r] = both[..., e]
    for i, value in enumerate(c):
        total[:, r + 8 * (i // 2), pair + i % 2] = by_warp(value)
    total += left @ right
    return [total[:, r + 8 * (i // 2), pair + i % 2].astype(np.float32).ravel() for i in range(4)]


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
        nibble = np.broadcast_to(selector >> np.uint32(4 * i) & np.uint32(15), a.shape)
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
        case "mul.rn.bf16x2":
            return _pair(halves(args[0]) * halves(args[1]))
        case "fma.rn.f32":
            a, b, c = (v.astype(np.float64) for v in args)
            return (a * b + c).astype(np.float32)
        case "cvt.rn.bf16x2.f32":
            return _pair(np.stack([args[1], args[0]], -1))
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
