"""Language models as quantized Hugging Face folders."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qjax.io import awq, bitsandbytes, block_floats, compressed_tensors, gptq, safetensors
from qjax.io.replacing import new_folder
from qjax.models import configs, loading, names
from qjax.qtensor import QTensor, Quantized
from qjax.spec import Spec

# What a folder holds beside config.json and weights.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
_BESIDE += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
_BESIDE += ("generation_config.json",)

EXPERTS = r"re:.*\.experts\..*"  # a target of compressed-tensors

Matrices = Mapping[str, QTensor]
Written = tuple[dict[str, np.ndarray], dict[str, Any]]


def save_hf(
    path: str | os.PathLike[str], params: Any, like: str | os.PathLike[str], codec: str
) -> None:
    """Writes parameters as a quantized Hugging Face folder; settings are those of another one.

    Codes, scales and zero points are written as they are held, and `load` reads the same again. An
    array keeps the type that `like` has for it if that holds every value exactly, else it is
    written in its own. transformers multiplies experts in the dtype of their scales.

    Args:
      path: the folder; it appears whole or not at all.
      params: ``{"params": ...}`` of an unrolled decoder, as `load` gives it: matrices as QTensors
        that the codec holds, and arrays of float32, float16 or bfloat16. All are on the host in the
        end.
      like: a Hugging Face folder of the same model, quantized or not; ``config.json`` and the
        tokenizer are copied.
      codec: "gptq" (2, 3, 4 and 8 bits, all matrices of the layers in one form, act-order too),
        "awq" (4 bits), "bitsandbytes" (nf4, fp4_bnb or int8, no experts) or "compressed-tensors"
        (2 to 8 bits, FP8, NVFP4 and MXFP4, a form for each matrix, one for all experts). Groups
        divide the inputs; routers and embeddings are arrays. GPTQ's and AWQ's readers expect scales
        in float16: `Spec.scale_dtype`.

    Raises:
      ValueError: `path` exists; parameters and `like` are not of one model; or a parameter is
        nothing that the codec holds. The message names the parameter and the remedy.
      OSError: the folder cannot be written.

    Example::

      model, params, tokenizer = qjax.models.load("Qwen2.5-0.5B")
      sites = qjax.find_sites(model.apply, params, tokens)
      spec = qjax.Spec.parse("int4_g128")._replace(scale_dtype="float16")
      qparams = qjax.quantize_params(params, spec, sites)
      qjax.models.save_hf("Qwen2.5-0.5B-int4", qparams, "Qwen2.5-0.5B", "compressed-tensors")
    """
    if not isinstance(codec, str) or codec not in WRITERS:
        raise ValueError(f"codec: must be one of {', '.join(WRITERS)}, is {codec!r}")
    with new_folder(pathlib.Path(path)) as folder:
        root = pathlib.Path(like)
        values = loading.read_json(root / "config.json")
        known, _ = safetensors.read_folder(root)
        matrices, tensors = _by_module(params, values, str(root))
        tensors = {name: _as_known(array, known.get(name)) for name, array in tensors.items()}
        if not matrices:
            raise ValueError("params has no quantized matrix; quantize it first")
        linear = {n.removesuffix(".weight") for n, v in tensors.items() if _is_linear(n, v)}
        linear |= {
            "lm_head"
        } - matrices.keys()  # a tied one too: readers have a module of that name
        written, about = WRITERS[codec](matrices, linear)
        config = {**values, "quantization_config": {"quant_method": codec, **about}}
        safetensors.write(folder / "model.safetensors", tensors | written, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _BESIDE:
            if (root / name).is_file():
                shutil.copyfile(root / name, folder / name)


def _by_module(
    params: Any, values: Mapping[str, Any], where: str
) -> tuple[dict[str, QTensor], dict[str, np.ndarray]]:
    """The QTensors by the module of a file, and all other tensors by name."""
    config = configs.from_hf(values, where)
    held = loading.leaves_of(params, "save_hf")
    needed = loading.leaves_of({"params": loading.parameters_of(config)}, "save_hf")
    odd = sorted(held.keys() ^ needed.keys())
    if odd:
        what = "is none of the model" if odd[0] in held else "is missing"
        raise ValueError(f"params/{odd[0]}: {what} in {where}: they are not of one model")
    matrices: dict[str, QTensor] = {}
    tensors: dict[str, np.ndarray] = {}
    for place, leaf in held.items():
        if tuple(leaf.shape) != tuple(needed[place].shape):
            raise ValueError(
                f"params/{place}: has shape {tuple(leaf.shape)}, {where} needs "
                f"{tuple(needed[place].shape)}: they are not of one model"
            )
        for name, part in _parts(place, leaf, names.hf_name(place, values["model_type"])):
            if isinstance(part, QTensor) and re.search(r"(?<!/router)/kernel$", place):
                matrices[name.removesuffix(".weight")] = part
            elif isinstance(part, Quantized):
                raise ValueError(
                    f"params/{place}: is {part!r}: these folders hold matrices of linear layers, "
                    "routers aside, as qjax.quantize makes them; unprepare or dequantize it"
                )
            else:
                tensors[name] = _dense(place, part, config.post_norms)
    return matrices, tensors


def _parts(place: str, leaf: Any, name: str) -> list[tuple[str, Any]]:
    """A parameter by the names of a file; experts have one each."""
    if "{}" not in name:
        return [(name, leaf)]
    one = lambda i: jax.tree.map(lambda v: v[i], leaf)
    return [(name.format(i), one(i)) for i in range(leaf.shape[0])]


def _dense(place: str, leaf: Any, plus_one: bool) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.name not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f"params/{place}: has dtype {array.dtype}, must be float32, float16 or bfloat16"
        )
    if plus_one and place.endswith("norm/scale"):  # gemma keeps the difference from one
        return array.astype(np.float32) - np.float32(1)
    return np.swapaxes(array, -1, -2) if place.endswith("/kernel") else array


def _as_known(array: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """In the dtype of another file, if that holds every value exactly."""
    if known is None or known.dtype.name not in ("float32", "float16", "bfloat16"):
        return array
    cast = array.astype(known.dtype)
    return cast if np.array_equal(cast.astype(np.float32), array.astype(np.float32)) else array


def _is_linear(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and "embed_tokens" not in name


def _each(matrices: Matrices, write: Callable[[QTensor], Any]) -> dict[str, Any]:
    """`write` of every matrix; what it cannot hold is said with its name."""
    out = {}
    for module, q in matrices.items():
        try:
            out[module] = write(q)
        except ValueError as why:
            raise ValueError(f"{module} {why}") from None
    return out


def _named(parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{module}.{part}": v for module, own in parts.items() for part, v in own.items()}


def _one_group(matrices: Matrices, codec: str) -> int:
    """The inputs that share a scale in all matrices; -1 for all of each."""
    short = {q.block[0] for q in matrices.values() if q.block[0] < q.shape[0]}
    group = next(iter(short), -1)
    whole = [q for q in matrices.values() if q.block[0] >= q.shape[0]]
    if len(short) > 1 or (short and any(q.shape[0] > group for q in whole)):
        sizes = sorted({q.block[0] for q in matrices.values()})
        raise ValueError(f"{codec} has one group for all matrices, here they are {sizes}")
    return group


def _write_gptq(matrices: Matrices, linear: set[str]) -> Written:
    dense = sorted(n for n in linear if n != "lm_head" and not n.endswith(".gate"))
    forms = sorted({q.format.removeprefix("u") for q in matrices.values()})
    if dense or len(forms) > 1:
        found = f"{dense[0]} is not" if dense else f"there are {', '.join(forms)}"
        raise ValueError(
            f"gptq has all matrices of the layers in one form: {found}; compressed-tensors has a "
            "form for each"
        )
    unsigned = [q.zero_point for q in matrices.values() if q.zero_point is not None]
    less_one = all(int(np.asarray(z).astype(np.int32).min(initial=1)) > 0 for z in unsigned)
    written = _each(matrices, lambda q: gptq.write(q, less_one))
    about = {
        "bits": int(forms[0].removeprefix("int")),
        "group_size": _one_group(matrices, "gptq"),
        "desc_act": any(q.activation is not None for q in matrices.values()),
        "sym": not unsigned,
        "lm_head": "lm_head" in matrices,
        "checkpoint_format": "gptq" if less_one else "gptq_v2",
    }
    return _named(written), about


def _write_awq(matrices: Matrices, linear: set[str]) -> Written:
    written = _each(matrices, awq.write)
    about = {"bits": 4, "group_size": _one_group(matrices, "awq"), "zero_point": True}
    about |= {"version": "gemm", "modules_to_not_convert": sorted(linear) or None}
    return _named(written), about


def _write_compressed_tensors(matrices: Matrices, linear: set[str]) -> Written:
    written = _each(matrices, compressed_tensors.write)
    schemes: dict[str, list[str]] = {}
    for module, (_, weights) in written.items():
        schemes.setdefault(json.dumps(weights), []).append(module)
    schemes = _experts_first(schemes, linear)
    groups, formats = {}, set()
    for i, (text, modules) in enumerate(schemes.items()):
        weights = json.loads(text)
        name = compressed_tensors.format_of(weights)
        formats.add(name)
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": name,
        }
    about = {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": sorted(linear),
    }
    return _named({module: parts for module, (parts, _) in written.items()}), about


def _write_bitsandbytes(matrices: Matrices, linear: set[str]) -> Written:
    experts = sorted(filter(_is_expert, matrices))
    forms = sorted({q.format for q in matrices.values()})
    if experts or len(forms) > 1:
        found = f"{experts[0]} is an expert's" if experts else f"there are {', '.join(forms)}"
        raise ValueError(f"bitsandbytes has linear layers in one form: {found}")
    written = _each(matrices, bitsandbytes.write)
    about: dict[str, Any] = {"load_in_4bit": forms != ["int8"], "load_in_8bit": forms == ["int8"]}
    if about["load_in_4bit"]:
        about |= {
            "bnb_4bit_quant_type": forms[0].removesuffix("_bnb"),
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": next(iter(matrices.values())).dtype.name,
            "bnb_4bit_quant_storage": "uint8",
        }
    return _named(written), about | {"llm_int8_skip_modules": sorted(linear)}


def _experts_first(schemes: dict[str, list[str]], linear: set[str]) -> dict[str, list[str]]:
    """With a pattern for experts in front: transformers takes the scheme of all of them from the
    first that looks like theirs.
    """
    held = [text for text, modules in schemes.items() if any(map(_is_expert, modules))]
    if not held:
        return schemes
    weights = json.loads(held[0])
    if (weights["type"], weights["num_bits"]) == ("float", 4):
        raise ValueError("experts: transformers makes nothing of 4-bit floats there")
    dense = sorted(filter(_is_expert, linear))
    if len(held) > 1 or dense or '"block"' in held[0]:
        found = f"{dense[0]} is an array" if dense else " and ".join(held)
        raise ValueError(
            f"experts: transformers wants all in one form, in no blocks of both axes: {found}"
        )
    others = [name for name in schemes.pop(held[0]) if not _is_expert(name)]
    return {held[0]: [EXPERTS, *others], **schemes}


def _is_expert(module: str) -> bool:
    return ".experts." in module


WRITERS: dict[str, Callable[[Matrices, set[str]], Written]] = {
    "gptq": _write_gptq,
    "awq": _write_awq,
    "bitsandbytes": _write_bitsandbytes,
    "compressed-tensors": _write_compressed_tensors,
}


def unfit(spec: Spec, codec: str) -> str | None:
    """None, or why no matrix of a spec is written by a codec."""
    match = re.fullmatch(r"u?int([2-8])", spec.format)
    bits = {"gptq": gptq.BITS, "awq": (4,), "bitsandbytes": ()}.get(codec, tuple(range(2, 9)))
    known = match is not None and int(match[1]) in bits
    others = {
        "compressed-tensors": ("fp8_e4m3", *block_floats.GROUPS),
        "bitsandbytes": ("nf4", "fp4_bnb", "int8"),
    }.get(codec, ())
    if not known and spec.format not in others:
        integers = ["int and uint of " + ", ".join(map(str, bits)) + " bits"] if bits else []
        kinds = ", ".join([*integers, *others])
        return f"{codec} has no form for {spec}; it has {kinds}"
    scaled = spec.scale_spec is not None and spec.format not in block_floats.GROUPS
    if spec.activation is not None or scaled:
        return f"{codec} has no place for codes of activations or of scales: {spec}"
    if match is not None and not isinstance(spec.block, int | None):
        return f"{codec} has groups along the inputs, not {spec}"
    return None
