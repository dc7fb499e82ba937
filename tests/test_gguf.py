"""The GGUF reader against files written by gguf-py and llama.cpp, and against files that lie."""

import dataclasses
import os
import pathlib
import struct
import time
import tracemalloc

import numpy as np
import pytest

from qjax.io import gguf

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
KV_TYPES = os.path.join(GOLDEN, "gguf_kv_types.gguf")
TINY_LLAMA = os.path.join(GOLDEN, "tiny_llama_q4_k_m.gguf")


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def info(name, dims, kind, offset):
    head = string(name) + struct.pack("<I", len(dims))
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


@dataclasses.dataclass
class Parts:
    """The parts of a small valid file; a test replaces one of them by a lie."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    n_tensors: int = 2
    n_keys: int = 2
    keys: bytes = key("general.architecture", 8, string("llama")) + key(
        "tokens", 9, struct.pack("<IQ", 8, 2) + string("a") + string("bc")
    )
    infos: bytes = info("first", [32, 2], 8, 0) + info("second", [3], 0, 96)
    data: bytes = bytes(range(68)) + bytes(28) + struct.pack("<3f", 1, 2, 3) + bytes(20)

    def write(self, folder):
        head = self.magic + self.version + struct.pack("<QQ", self.n_tensors, self.n_keys)
        head += self.keys + self.infos
        path = os.path.join(folder, "case.gguf")
        with open(path, "wb") as file:
            file.write(head + bytes(-len(head) % 32) + self.data)
        return path


def test_every_key_value_type():
    file = gguf.read(KV_TYPES)
    assert file.version == 3
    assert file.alignment == 64
    expected = {
        "general.architecture": ("string", "llama"),
        "general.alignment": ("u32", 64),
        "test.u8": ("u8", 200),
        "test.i8": ("i8", -5),
        "test.u16": ("u16", 60000),
        "test.i16": ("i16", -300),
        "test.u32": ("u32", 4000000000),
        "test.i32": ("i32", -70000),
        "test.f32": ("f32", float(np.float32(0.1))),
        "test.bool_t": ("bool", True),
        "test.bool_f": ("bool", False),
        "test.str": ("string", "héllo ✓"),
        "test.u64": ("u64", 1 << 40),
        "test.i64": ("i64", -(1 << 40)),
        "test.f64": ("f64", 0.1),
        "test.arr_i32": ("array[i32]", [1, -2, 3]),
        "test.arr_str": ("array[string]", ["a", "", "bc"]),
        "test.arr_f32": ("array[f32]", [0.5, 1.5]),
        "test.arr_bool": ("array[bool]", [True, False]),
    }
    assert file.kinds == {name: kind for name, (kind, _) in expected.items()}
    for name, (_, value) in expected.items():
        found = file.metadata[name]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, name


@pytest.mark.parametrize("path", [KV_TYPES, TINY_LLAMA])
def test_tensors_agree_with_gguf_py(path):
    from gguf import GGUFReader

    peer = GGUFReader(path)
    file = gguf.read(path)
    assert list(file.tensors) == [t.name for t in peer.tensors]
    for t in peer.tensors:
        info = file.tensors[t.name]
        assert info.type.name == t.tensor_type.name
        assert info.shape == tuple(reversed(t.shape.tolist()))
        raw = np.ascontiguousarray(t.data)
        np.testing.assert_array_equal(file.raw(t.name).reshape(-1), raw.view(np.uint8).reshape(-1))
        if info.type.name in ("F32", "F16", "I8"):
            np.testing.assert_array_equal(file.array(t.name), t.data)


def test_raw_is_rows_of_bytes_without_a_copy(tmp_path):
    file = gguf.read(Parts().write(tmp_path))
    raw = file.raw("first")
    assert raw.shape == (2, 34)
    assert not raw.flags.writeable
    assert np.shares_memory(raw, file.data)
    assert raw.tobytes() == bytes(range(68))
    np.testing.assert_array_equal(file.array("second"), np.float32([1, 2, 3]))


def test_version_2_has_the_same_layout(tmp_path):
    file = gguf.read(Parts(version=struct.pack("<I", 2)).write(tmp_path))
    assert file.version == 2
    assert file.metadata["tokens"] == ["a", "bc"]


def test_array_refuses_block_types_and_unknown_names(tmp_path):
    file = gguf.read(Parts().write(tmp_path))
    with pytest.raises(ValueError, match=r"'first' has the block type Q8_0.*raw\('first'\)"):
        file.array("first")
    with pytest.raises(KeyError, match="no tensor 'third'"):
        file.raw("third")


ARRAY = struct.pack("<I", 9)
LIES = {
    "magic": ({"magic": b"GGML"}, "magic: is b'GGML'"),
    "version 1": ({"version": struct.pack("<I", 1)}, "version: is 1"),
    "version 4": ({"version": struct.pack("<I", 4)}, "version: is 4"),
    "big-endian": ({"version": struct.pack(">I", 3)}, "version: is byte-swapped"),
    "tensor count": ({"n_tensors": 1 << 60}, "tensor count: is"),
    "tensor count past the infos": ({"n_tensors": 9}, "length of the name of tensor 2: is 0"),
    "tensor count negative": ({"n_tensors": (1 << 64) - 1}, "tensor count: is"),
    "key count": ({"n_keys": 1 << 60}, "key count: is"),
    "key count into the infos": ({"n_keys": 3}, "length of the name of tensor 0: is"),
    "key name length": ({"keys": struct.pack("<Q", 1 << 62)}, "name of key 0: claims"),
    "key name empty": ({"n_keys": 1, "keys": key("", 0, b"\0")}, "name of key 0: is empty"),
    "key name not UTF-8": (
        {"n_keys": 1, "keys": key(b"\xff\xfe", 0, b"\0")},
        "key 0: is not UTF-8",
    ),
    "key twice": ({"keys": key("a", 0, b"\0") * 2}, "key 'a': appears twice"),
    "key type": ({"n_keys": 1, "keys": key("a", 13, b"\0")}, "type of key 'a': is 13"),
    "string length": (
        {"n_keys": 1, "keys": key("a", 8, struct.pack("<Q", 1 << 61))},
        "key 'a': claims 2305843009213693952 bytes",
    ),
    "string not UTF-8": (
        {"n_keys": 1, "keys": key("a", 8, string(b"\xc3("))},
        "key 'a': is not UTF-8",
    ),
    "bool of 2": ({"n_keys": 1, "keys": key("a", 7, b"\2")}, "key 'a': is a bool of value 2"),
    "array of bools of 3": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 7, 2) + b"\0\3")},
        "key 'a': holds a bool of value 3",
    ),
    "array type": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 99, 2))},
        "type of key 'a': is 99",
    ),
    "array of arrays": (
        {"n_keys": 1, "keys": key("a", 9, (ARRAY + struct.pack("<Q", 1 << 40)) * 8)},
        "key 'a': is an array of arrays",
    ),
    "array length of bytes": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 0, 1 << 60))},
        "length of key 'a': is 1152921504606846976",
    ),
    "array length of doubles overflows": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 12, (1 << 61) + 1))},
        "length of key 'a': is",
    ),
    "array length of strings": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 8, 1 << 50))},
        "length of key 'a': is",
    ),
    "array element length": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 8, 2) + string("x") + b"\xff" * 8)},
        "element 1 of key 'a': claims",
    ),
    "array element not UTF-8": (
        {"n_keys": 1, "keys": key("a", 9, struct.pack("<IQ", 8, 1) + string(b"\x80"))},
        "element 0 of key 'a': is not UTF-8",
    ),
    "alignment 0": (
        {"n_keys": 1, "keys": key("general.alignment", 4, struct.pack("<I", 0))},
        "general.alignment': is 0",
    ),
    "alignment 48": (
        {"n_keys": 1, "keys": key("general.alignment", 4, struct.pack("<I", 48))},
        "general.alignment': is 48",
    ),
    "alignment of another type": (
        {"n_keys": 1, "keys": key("general.alignment", 8, string("32"))},
        "general.alignment': is '32'",
    ),
    "alignment past the end": (
        {"n_keys": 1, "keys": key("general.alignment", 4, struct.pack("<I", 1 << 31))},
        "tensor 'first' offset|tensor 'second' offset",
    ),
    "tensor name length": ({"infos": struct.pack("<Q", 1 << 40) + bytes(64)}, "name of tensor 0"),
    "tensor name of 64 bytes": (
        {"n_tensors": 1, "infos": info("n" * 64, [32, 2], 8, 0)},
        "length of the name of tensor 0: is 64",
    ),
    "tensor name empty": (
        {"n_tensors": 1, "infos": info("", [32, 2], 8, 0)},
        "name of tensor 0: is 0",
    ),
    "tensor twice": (
        {"infos": info("first", [32, 2], 8, 0) + info("first", [3], 0, 96)},
        "tensor 'first': appears twice",
    ),
    "no dims": ({"n_tensors": 1, "infos": info("first", [], 0, 0)}, "'first' n_dims: is 0"),
    "many dims": ({"n_tensors": 1, "infos": info("first", [1] * 5, 0, 0)}, "'first' n_dims: is 5"),
    "n_dims huge": (
        {"n_tensors": 1, "infos": string("first") + struct.pack("<I", 0xFFFFFFFF) + bytes(40)},
        "'first' n_dims: is 4294967295",
    ),
    "dims overflow": (
        {"n_tensors": 1, "infos": info("first", [1 << 33, 1 << 33], 0, 0)},
        r"'first' dims: are \[8589934592, 8589934592\]",
    ),
    "dims wrap to a small product": (
        {"n_tensors": 1, "infos": info("first", [1 << 32, 1 << 32, 1, 1], 0, 0)},
        "'first' dims",
    ),
    "dims of zero": ({"n_tensors": 1, "infos": info("first", [0, 4], 0, 0)}, "'first' dims"),
    "dims past the end": (
        {"n_tensors": 1, "infos": info("first", [32, 1 << 40], 8, 0)},
        "'first' offset: its 37383395344384 bytes",
    ),
    "row not of whole blocks": (
        {"n_tensors": 1, "infos": info("first", [33, 2], 8, 0)},
        r"'first' dims\[0\]: is 33, Q8_0 needs a multiple of 32",
    ),
    "tensor type": (
        {"n_tensors": 1, "infos": info("first", [32], 4, 0)},
        "'first' type: is 4, known",
    ),
    "offset not aligned": (
        {"infos": info("first", [32, 2], 8, 0) + info("second", [3], 0, 68)},
        "'second' offset: is 68, must be 96",
    ),
    "overlap": (
        {"infos": info("first", [32, 2], 8, 0) + info("second", [3], 0, 64)},
        "'second' offset: is 64, must be 96",
    ),
    "gap": (
        {"infos": info("first", [32, 2], 8, 0) + info("second", [3], 0, 128)},
        "'second' offset: is 128, must be 96",
    ),
    "first offset not zero": (
        {"n_tensors": 1, "infos": info("first", [32, 2], 8, 32)},
        "'first' offset: is 32, must be 0",
    ),
    "offset huge": (
        {"infos": info("first", [32, 2], 8, 0) + info("second", [3], 0, (1 << 64) - 32)},
        "'second' offset: is 18446744073709551584",
    ),
}


def refused(path, match):
    """Reads `path`, which must be refused in time, without memory, naming the file."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            gguf.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 1
    assert peak < 1 << 20
    assert str(caught.value).startswith(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(name, tmp_path):
    changes, match = LIES[name]
    refused(Parts(**changes).write(tmp_path), match)


def test_a_file_may_hold_only_metadata(tmp_path):
    file = gguf.read(Parts(n_tensors=0, infos=b"", data=b"").write(tmp_path))
    assert file.tensors == {}
    assert file.metadata["general.architecture"] == "llama"


def test_every_truncation_is_refused(tmp_path):
    """Cut after every byte up to the last one that a tensor needs."""
    whole = pathlib.Path(Parts().write(tmp_path)).read_bytes()
    needed = len(whole) - 20  # the padding after the last tensor may be missing
    path = os.path.join(tmp_path, "cut.gguf")
    for size in range(needed):
        with open(path, "wb") as file:
            file.write(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            gguf.read(path)
    with open(path, "wb") as file:
        file.write(whole[:needed])
    assert list(gguf.read(path).tensors) == ["first", "second"]


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """Every single bit of the header flipped: a ValueError, or a file whose views are in bounds."""
    whole = bytearray(pathlib.Path(Parts().write(tmp_path)).read_bytes())
    header = len(whole) - len(Parts().data)
    path = os.path.join(tmp_path, "flip.gguf")
    outcomes = {"refused": 0, "read": 0}
    for position in range(header):
        for bit in range(8):
            whole[position] ^= 1 << bit
            with open(path, "wb") as file:
                file.write(whole)
            whole[position] ^= 1 << bit
            try:
                found = gguf.read(path)
            except ValueError:
                outcomes["refused"] += 1
                continue
            for tensor in found.tensors.values():
                assert found.raw(tensor.name).size == tensor.nbytes
            outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0


def test_a_sparse_file_of_a_terabyte_is_refused_in_time(tmp_path):
    """Counts that fit the size of the file, but that no model has."""
    claim = key("a", 9, struct.pack("<IQ", 8, 1 << 35))
    path = Parts(n_keys=1, keys=claim).write(tmp_path)
    os.truncate(path, 1 << 40)
    refused(path, "length of key 'a'")
    path = Parts(n_keys=1, keys=key("a", 8, struct.pack("<Q", 1 << 38))).write(tmp_path)
    os.truncate(path, 1 << 40)
    refused(path, "key 'a': claims")
