"""Spec: what to make of a weight, as hashable data with one string form."""

import re
from typing import NamedTuple

from qjax.formats import FORMATS
from qjax.formats.microscaling import MX


class Spec(NamedTuple):
    """What a weight (or an activation) becomes.

    Attributes:
      format: a row of `FORMATS`.
      block: elements that share a scale. `None`: all contracted ones (one scale per output channel,
        or per token for an activation); an int: groups along the innermost contracted axis;
        `(rows, columns)`: tiles of the contracted and the last output axis; `()`: the whole tensor.
      symmetric: `False` also stores where a block starts (see `zero_dtype`).
      scale_dtype: what the scale is rounded to, before the first code is chosen.
      scale_spec: how the scales are quantized in turn; `None` keeps them in `scale_dtype`.
      scale_method: how the scale is chosen, a key of `rounding.SCALE_METHODS`: "absmax", "minmax",
        "mse" (the clip of least squared error), "ggml" (llama.cpp's own rule for the format),
        "mx_floor", "mx_even" and "mx_ceil" (powers of two), "nvfp4".
      zero_dtype: an integer dtype gives asymmetric blocks a `zero_point` rounded to a code, as GPTQ
        and AWQ files hold it; `None` gives them an `offset`, the block's smallest value in
        `scale_dtype`, as Q4_1 does.
      activation: how the other operand of a matmul is quantized while it runs; `None` leaves it
        alone.

    Example:
      >>> Spec.parse("int4_g128")
      Spec(format='int4', block=128, symmetric=True, scale_dtype='bfloat16', scale_spec=None,
           scale_method='absmax', zero_dtype=None, activation=None)
      >>> str(Spec.parse("int8/int8_token"))
      'int8/int8_token'
    """

    format: str
    block: tuple[int, ...] | int | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"
    scale_spec: "Spec | None" = None
    scale_method: str = "absmax"
    zero_dtype: str | None = None
    activation: "Spec | None" = None

    @staticmethod
    def parse(text: "str | Spec") -> "Spec":
        """The Spec that `text` names; a Spec passes through.

        The grammar is `format[_gN | _RxC | _tensor | _token][_asym][_dq][/activation]`.

        Raises:
          ValueError: naming the part that is not understood and the valid choices.
        """
        if isinstance(text, Spec):
            return text
        weight, slash, activation = text.partition("/")
        spec = _parse_one(weight, text, activation=False)
        return (
            spec._replace(activation=_parse_one(activation, text, activation=True))
            if slash
            else spec
        )

    def __str__(self) -> str:
        if self._replace(activation=None) == WHOLE_SPECS.get(self.format):
            text = self.format
        else:
            text = self.format + _block_suffix(self.block)
            text += "_asym" * (not self.symmetric and not self.format.startswith("uint"))
            text += "_dq" * (self.scale_spec is not None)
        if self.activation is None:
            return text
        suffix = "_token" if self.activation.block is None else ""
        return f"{text}/{self.activation}{suffix}"


def _sub_scale(format: str, count: int) -> Spec:
    return Spec(format, count, scale_dtype="float16", scale_method="ggml")


# llama.cpp's block types: their structure is part of the name, so they take no suffix.
GGML_SPECS = {
    "q8_0": Spec("q8_0", 32, True, "float16", None, "ggml"),
    "q4_0": Spec("q4_0", 32, True, "float16", None, "ggml"),
    "q4_1": Spec("q4_1", 32, False, "float16", None, "ggml"),
    "q5_0": Spec("q5_0", 32, True, "float16", None, "ggml"),
    "q5_1": Spec("q5_1", 32, False, "float16", None, "ggml"),
    "q2_k": Spec("q2_k", 16, False, "float16", _sub_scale("uint4", 16), "ggml"),
    "q3_k": Spec("q3_k", 16, True, "float16", _sub_scale("int6", 16), "ggml"),
    "q4_k": Spec("q4_k", 32, False, "float16", _sub_scale("uint6", 8), "ggml"),
    "q5_k": Spec("q5_k", 32, False, "float16", _sub_scale("uint6", 8), "ggml"),
    "q6_k": Spec("q6_k", 16, True, "float16", _sub_scale("int8", 16), "ggml"),
    "iq4_nl": Spec("iq4_nl", 32, True, "float16", None, "ggml"),
    "iq4_xs": Spec("iq4_xs", 32, True, "float16", _sub_scale("int6", 8), "ggml"),
    "tq1_0": Spec("tq1_0", 256, True, "float16", None, "ggml"),
    "tq2_0": Spec("tq2_0", 256, True, "float16", None, "ggml"),
}

# OCP's MX formats share a power of two between 32 elements. NVFP4's E4M3 scales of 16 elements
# stand under one float32 per weight.
MICROSCALING_SPECS = {
    **{name: Spec(name, 32, True, "float8_e8m0fnu", None, "mx_even") for name in MX},
    "nvfp4": Spec("nvfp4", 16, True, "float32", Spec("fp8_e4m3", ()), "nvfp4"),
}

WHOLE_SPECS = {**GGML_SPECS, **MICROSCALING_SPECS}

# Double quantization (QLoRA, arXiv:2305.14314, section 3): 256 scales, less their mean, share one
# float32.
DOUBLE_QUANTIZED = Spec("dynamic8", 256, symmetric=False, scale_method="mean")

ACTIVATION_FORMATS = ("int8", "fp8_e4m3", "fp8_e5m2")

_GRAMMAR = "format[_gN | _RxC | _tensor | _token][_asym][_dq][/activation]"
_BLOCK = r"_(?:g(?P<group>\d+)|(?P<rows>\d+)x(?P<columns>\d+)|(?P<whole>tensor|token))"
_SUFFIX = re.compile(rf"(?:{_BLOCK})?(?P<asym>_asym)?(?P<dq>_dq)?")


def _parse_one(text: str, whole_text: str, activation: bool) -> Spec:
    def error(message: str) -> ValueError:
        return ValueError(f"spec {whole_text!r}: {message}")

    name = max((f for f in FORMATS if f"{text}_".startswith(f"{f}_")), key=len, default=None)
    if name is None:
        known = ", ".join(FORMATS)
        raise error(f"{text!r} starts with no known format; the formats are {known}")
    suffix = text[len(name) :]
    match = _SUFFIX.fullmatch(suffix)
    if match is None:
        raise error(f"{suffix!r} after {name!r} is not understood; the grammar is {_GRAMMAR}")
    if activation:
        if name not in ACTIVATION_FORMATS or suffix != "_token":
            choices = " or ".join(f"{f}_token" for f in ACTIVATION_FORMATS)
            raise error(f"an activation may be {choices} (one scale per token), got {text!r}")
        return Spec(name)
    if name in WHOLE_SPECS:
        if suffix:
            raise error(f"{name!r} is a whole block type and takes no suffix; write {name!r}")
        return WHOLE_SPECS[name]
    if match["whole"] == "token":
        raise error(
            "_token is for activations, after a slash; a weight without a suffix has one scale per "
            "output channel"
        )
    if 0 in (int(match[k] or 1) for k in ("group", "rows", "columns")):
        raise error("a block of 0 elements cannot hold a weight; give a size of at least 1")
    integer = name.startswith(("int", "uint"))
    if match["asym"] and not integer:
        raise error(f"_asym is for integer formats; {name!r} is symmetric by construction")
    if match["dq"] and not (name == "nf4" and match["group"]):
        raise error(
            "_dq quantizes the scales of nf4 groups (QLoRA), as in nf4_g64_dq; give other formats "
            "a Spec with scale_spec"
        )
    symmetric = not (name.startswith("uint") or match["asym"])
    grouped_integer = integer and bool(match["group"])
    narrow = "bfloat16" if symmetric else "float16"
    return Spec(
        format=name,
        block=_block(match),
        symmetric=symmetric,
        scale_dtype=narrow if grouped_integer else "float32",
        scale_spec=DOUBLE_QUANTIZED if match["dq"] else None,
        scale_method="absmax" if symmetric else "minmax",
    )


def _block(match: re.Match) -> tuple[int, ...] | int | None:
    if match["group"]:
        return int(match["group"])
    if match["rows"]:
        return int(match["rows"]), int(match["columns"])
    return () if match["whole"] else None


def _block_suffix(block: tuple[int, ...] | int | None) -> str:
    if block is None:
        return ""
    if isinstance(block, int):
        return f"_g{block}"
    return "_" + "x".join(map(str, block)) if block else "_tensor"
