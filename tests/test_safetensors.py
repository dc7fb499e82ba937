"""The safetensors reader and writer against the reference package, and against files that lie."""

import json
import os
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.io import safetensors


def pack(header, body=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def every_dtype():
    rng = np.random.default_rng(0)
    tensors = {}
    for name, dtype in safetensors.DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, (3, 2 * dtype.itemsize), np.uint8)
        tensors[name.lower()] = raw.view(dtype)
    return tensors


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def test_every_dtype_round_trips(tmp_path):
    path = tmp_path / "all.safetensors"
    tensors = every_dtype()
    safetensors.write(path, tensors, {"note": "höher"})
    found, metadata = safetensors.read(path)
    assert metadata == {"note": "höher"}
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        same_bits(found[name], value)


def test_the_reference_package_reads_what_we_write(tmp_path):
    path = tmp_path / "ours.safetensors"
    plain = {k: v for k, v in every_dtype().items() if k != "bf16" and not k.startswith("f8")}
    plain["scalar"] = np.float32(3.5).reshape(())
    plain["empty"] = np.zeros((0, 4), np.float16)
    plain["transposed"] = np.arange(6, dtype=np.int32).reshape(2, 3).T
    plain["big_endian"] = np.arange(4, dtype=">i4")
    safetensors.write(path, plain, {"a": "b"})
    found = load_file(path)
    assert set(found) == set(plain)
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value)


def test_we_read_what_the_reference_package_writes(tmp_path):
    path = tmp_path / "theirs.safetensors"
    tensors = {k: v for k, v in every_dtype().items() if k != "c64"}
    save_file(tensors, path, metadata={"format": "np"})
    found, metadata = safetensors.read(path)
    assert metadata == {"format": "np"}
    for name, value in tensors.items():
        same_bits(found[name], value)


def test_reading_copies_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, {"w": np.zeros((1 << 20,), np.float32)})
    tracemalloc.start()
    found, _ = safetensors.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18
    assert not found["w"].flags.writeable


def test_the_writer_refuses_what_has_no_name(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"tensor 'w': dtype int4.*uint8"):
        safetensors.write(path, {"w": np.zeros(4, ml_dtypes.int4)})
    with pytest.raises(ValueError, match="tensor '__metadata__'"):
        safetensors.write(path, {"__metadata__": np.zeros(4)})
    with pytest.raises(ValueError, match="__metadata__: must map strings"):
        safetensors.write(path, {}, {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, {"w": np.float32([1])})

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        safetensors.write(path, {"w": np.float32([2])})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert safetensors.read(path)[0]["w"] == 1


DEEP = b"[" * 200_000
TWO = {"a": entry(), "b": entry(begin=8, end=16)}
LIES = {
    "empty file": (b"", "header length: the file has 0 bytes"),
    "seven bytes": (b"\0" * 7, "header length: the file has 7 bytes"),
    "header length": (pack({"a": entry()}, bytes(8), 1 << 62), "header length: is"),
    "header length by one": (pack(b"{}", length=3), "header length: is 3"),
    "header length zero": (pack(b""), "header: is not JSON"),
    "not JSON": (pack(b"{'a': 1}"), "header: is not JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "header: is not UTF-8"),
    "a list": (pack([1, 2]), "header: is a JSON list"),
    "nested deeply": (pack(DEEP), "header: is nested too deeply"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "header length: is"),
    "a long integer": (
        pack(b'{"a": ' + b"9" * 5000 + b"}"),
        "header: holds an integer of 5000 digits",
    ),
    "key twice": (
        pack(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "header: the key 'a' appears twice",
    ),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__: must map"),
    "metadata a list": (pack({"__metadata__": []}), "__metadata__: must map"),
    "tensor a number": (pack({"a": 1}), "tensor 'a': must have exactly"),
    "key missing": (pack({"a": {"dtype": "F32", "shape": [2]}}), "tensor 'a': must have exactly"),
    "key unknown": (pack({"a": entry() | {"x": 1}}, bytes(8)), "tensor 'a': must have exactly"),
    "dtype": (pack({"a": entry("I4")}, bytes(8)), "tensor 'a' dtype: is 'I4', known are"),
    "dtype a list": (pack({"a": entry(["F32"])}, bytes(8)), "tensor 'a' dtype: is"),
    "shape a string": (pack({"a": entry() | {"shape": "22"}}, bytes(8)), "'a' shape: is '22'"),
    "shape negative": (pack({"a": entry(shape=[-2, -1])}, bytes(8)), "tensor 'a' shape"),
    "shape of bools": (pack({"a": entry(shape=[True, 2])}, bytes(8)), "tensor 'a' shape"),
    "shape of floats": (pack({"a": entry(shape=[2.0])}, bytes(8)), "tensor 'a' shape"),
    "shape overflows": (pack({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)), "'a' data_offsets"),
    "shape wraps": (pack({"a": entry(shape=[1 << 32, 1 << 32])}, bytes(8)), "'a' data_offsets"),
    "shape of 64 axes": (pack({"a": entry(shape=[1] * 64)}, bytes(8)), "tensor 'a' shape"),
    "size too large": (pack({"a": entry(shape=[3])}, bytes(8)), "8 bytes, but F32 .* takes 12"),
    "size too small": (pack({"a": entry(shape=[1])}, bytes(8)), "8 bytes, but F32 .* takes 4"),
    "offsets one": (pack({"a": entry() | {"data_offsets": [0]}}, bytes(8)), "data_offsets: is"),
    "offsets negative": (pack({"a": entry(begin=-8, end=0)}, bytes(8)), "data_offsets: is"),
    "offsets swapped": (pack({"a": entry(begin=8, end=0)}, bytes(8)), "data_offsets: are"),
    "offsets past the end": (pack({"a": entry(begin=8, end=16)}, bytes(8)), "data has 8 bytes"),
    "offsets huge": (pack({"a": entry(end=1 << 62)}, bytes(8)), "the data has 8 bytes"),
    "overlap": (pack(TWO | {"b": entry(begin=4, end=12)}, bytes(12)), "'b'.*overlap"),
    "the same bytes twice": (pack(TWO | {"b": entry()}, bytes(8)), "'b'.*overlap"),
    "gap": (pack(TWO | {"b": entry(begin=12, end=20)}, bytes(20)), "'b'.*leave a gap"),
    "gap at the start": (pack({"a": entry(begin=8, end=16)}, bytes(16)), "'a'.*leave a gap"),
    "bytes after the tensors": (pack(TWO, bytes(17)), "data: has 17 bytes, the tensors take 16"),
    "bytes missing": (pack(TWO, bytes(15)), "'b' data_offsets: are"),
}


def refused(reader, path, match, named=None):
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            reader(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 1
    assert peak < 4 << 20
    assert str(named or path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(name, tmp_path):
    raw, match = LIES[name]
    path = tmp_path / "case.safetensors"
    path.write_bytes(raw)
    refused(safetensors.read, path, match)


def test_every_truncation_is_refused(tmp_path):
    whole = pack(TWO, bytes(16))
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            safetensors.read(path)
    path.write_bytes(whole)
    assert set(safetensors.read(path)[0]) == {"a", "b"}


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    whole = bytearray(pack(TWO, bytes(16)))
    path = tmp_path / "flip.safetensors"
    outcomes = {"refused": 0, "read": 0}
    for position in range(len(whole) - 16):
        for bit in range(8):
            whole[position] ^= 1 << bit
            path.write_bytes(whole)
            whole[position] ^= 1 << bit
            try:
                found, _ = safetensors.read(path)
            except ValueError:
                outcomes["refused"] += 1
                continue
            assert sum(value.nbytes for value in found.values()) == 16
            outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0


def sharded(folder, weight_map, shards):
    for name, tensors in shards.items():
        safetensors.write(folder / name, tensors)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / safetensors.INDEX).write_text(json.dumps(index))


ONE, OTHER = np.float32([1]), np.float32([2, 3])


def test_shards_are_joined(tmp_path):
    sharded(
        tmp_path,
        {"b": "2.safetensors", "a": "1.safetensors"},
        {"1.safetensors": {"a": ONE}, "2.safetensors": {"b": OTHER}},
    )
    found, _ = safetensors.read_folder(tmp_path)
    assert list(found) == ["b", "a"]
    np.testing.assert_array_equal(found["b"], OTHER)


def test_a_folder_may_hold_one_file(tmp_path):
    safetensors.write(tmp_path / "model.safetensors", {"a": ONE})
    assert safetensors.read_folder(tmp_path)[0]["a"] == 1


A = "1.safetensors"
FOLDERS = {
    "shard missing": (
        {"a": A, "b": "2.safetensors"},
        {A: {"a": ONE}},
        "'2.safetensors' is missing",
    ),
    "tensor missing": ({"a": A, "b": A}, {A: {"a": ONE}}, r"weight_map\['b'\].*not in its shard"),
    "tensor not in the index": (
        {"a": A},
        {A: {"a": ONE, "b": ONE}},
        r"weight_map\['b'\]: names 'no shard', the tensor is also in '1.safetensors'",
    ),
    "tensor in two shards": (
        {"a": A, "b": "2.safetensors"},
        {A: {"a": ONE}, "2.safetensors": {"a": ONE, "b": ONE}},
        r"weight_map\['a'\]: names '1.safetensors', the tensor is also in '2.safetensors'",
    ),
    "parent": ({"a": "../1.safetensors"}, {A: {"a": ONE}}, "not the plain name of a file"),
    "dot dot": ({"a": ".."}, {A: {"a": ONE}}, "not the plain name of a file"),
    "absolute": ({"a": "/etc/passwd"}, {A: {"a": ONE}}, "not the plain name of a file"),
    "sub-folder": ({"a": "x/1.safetensors"}, {A: {"a": ONE}}, "not the plain name of a file"),
    "backslash": ({"a": "..\\1.safetensors"}, {A: {"a": ONE}}, "not the plain name of a file"),
    "empty name": ({"a": ""}, {A: {"a": ONE}}, "not the plain name of a file"),
    "shard a number": ({"a": 1}, {A: {"a": ONE}}, r"weight_map\['a'\]: is 1"),
    "map empty": ({}, {A: {"a": ONE}}, "weight_map: must map"),
    "map a list": (["a"], {A: {"a": ONE}}, "weight_map: must map"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_lies_is_refused(name, tmp_path):
    weight_map, shards, match = FOLDERS[name]
    sharded(tmp_path, weight_map, shards)
    refused(safetensors.read_folder, tmp_path, match)


@pytest.mark.parametrize("link", [safetensors.SINGLE, A])
def test_links_out_of_the_folder_are_refused(link, tmp_path):
    outside, folder = tmp_path / "secret.safetensors", tmp_path / "model"
    safetensors.write(outside, {"a": ONE})
    folder.mkdir()
    if link == A:
        sharded(folder, {"a": A}, {})
    (folder / link).symlink_to(outside)
    refused(safetensors.read_folder, folder, "link out of the folder.*copy the files")


def test_links_within_the_folder_are_read(tmp_path):
    safetensors.write(tmp_path / "weights.safetensors", {"a": ONE})
    (tmp_path / "model.safetensors").symlink_to("weights.safetensors")
    assert safetensors.read_folder(tmp_path)[0]["a"] == 1


def test_an_index_beside_a_single_file_is_ambiguous(tmp_path):
    sharded(tmp_path, {"a": A}, {A: {"a": ONE}})
    safetensors.write(tmp_path / "model.safetensors", {"a": ONE})
    refused(safetensors.read_folder, tmp_path, "both model.safetensors and")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"weight_map": {"a": 1}', DEEP])
def test_a_broken_index_is_refused(raw, tmp_path):
    (tmp_path / safetensors.INDEX).write_bytes(raw)
    refused(safetensors.read_folder, tmp_path, "index", named=tmp_path / safetensors.INDEX)


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(safetensors.read_folder, tmp_path, "'model.safetensors' is missing")
