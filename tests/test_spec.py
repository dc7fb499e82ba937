"""Spec: one parser, one string form, errors that say what would have been right."""

import itertools

import jax.numpy as jnp
import pytest

import qjax
from qjax.formats import FORMATS
from qjax.spec import WHOLE_SPECS, Spec

INTEGERS = [f for f in FORMATS if f.startswith(("int", "uint"))]
PLAIN = [f for f in FORMATS if f not in WHOLE_SPECS]
STRINGS = [
    *(
        f + block
        for f, block in itertools.product(PLAIN, ("", "_g32", "_g7", "_32x128", "_tensor"))
    ),
    *(
        f + block + "_asym"
        for f, block in itertools.product(("int8", "int4", "int2"), ("", "_g32", "_tensor"))
    ),
    *("nf4_g64_dq", "nf4_g128_dq", *WHOLE_SPECS),
    *("int8/int8_token", "int4_g128/int8_token", "fp8_e4m3/fp8_e4m3_token", "q4_k/int8_token"),
    "fp8_e5m2_128x128/fp8_e5m2_token",
]


@pytest.mark.parametrize("text", STRINGS)
def test_every_string_parses_back(text):
    spec = Spec.parse(text)
    assert str(spec) == text
    assert Spec.parse(spec) is spec
    assert Spec.parse(str(spec)) == spec
    assert {spec: 1}[Spec.parse(text)] == 1


def test_what_the_strings_mean():
    assert Spec.parse("int8") == Spec("int8")
    assert Spec.parse("int4_g128") == Spec("int4", 128, scale_dtype="bfloat16")
    assert Spec.parse("fp8_e4m3_128x64") == Spec("fp8_e4m3", (128, 64))
    assert Spec.parse("fp8_e5m2_tensor") == Spec("fp8_e5m2", ())
    uint4 = Spec("uint4", 32, symmetric=False, scale_dtype="float16", scale_method="minmax")
    assert Spec.parse("uint4_g32") == uint4
    assert Spec.parse("int8/int8_token") == Spec("int8", activation=Spec("int8"))
    mxfp4 = Spec("mxfp4", 32, scale_dtype="float8_e8m0fnu", scale_method="mx_even")
    assert Spec.parse("mxfp4") == mxfp4
    nvfp4 = Spec("nvfp4", 16, scale_spec=Spec("fp8_e4m3", ()), scale_method="nvfp4")
    assert Spec.parse("nvfp4") == nvfp4
    nested = Spec.parse("nf4_g64_dq").scale_spec
    assert nested is not None
    assert (nested.format, nested.block, nested.scale_method) == ("dynamic8", 256, "mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "'int9' starts with no known format; the formats are int8, int7"),
        ("", "'' starts with no known format"),
        ("INT8", "'INT8' starts with no known format"),
        ("int8_g", "'_g' after 'int8' is not understood; the grammar is format"),
        ("int8_g-4", "'_g-4' after 'int8' is not understood"),
        ("int8_128x", "'_128x' after 'int8' is not understood"),
        ("int8_g64_tensor", "'_g64_tensor' after 'int8' is not understood"),
        ("int8_dq_g64", "'_dq_g64' after 'int8' is not understood"),
        ("int8 ", "'int8 ' starts with no known format"),
        ("int4_g0", "a block of 0 elements"),
        ("fp8_e4m3_0x128", "a block of 0 elements"),
        ("fp8_e4m3_128x0", "a block of 0 elements"),
        ("nf4_g64_asym", "_asym is for integer formats"),
        ("int4_g64_dq", "_dq quantizes the scales of nf4 groups"),
        ("nf4_dq", "as in nf4_g64_dq"),
        ("int8_token", "_token is for activations, after a slash"),
        ("q4_0_g32", "'q4_0' is a whole block type and takes no suffix; write 'q4_0'"),
        ("mxfp4_g32", "'mxfp4' is a whole block type and takes no suffix; write 'mxfp4'"),
        ("nvfp4_dq", "'nvfp4' is a whole block type"),
        ("fp4_g32", "'fp4_g32' starts with no known format"),
        ("int8/int8", "an activation may be int8_token or fp8_e4m3_token"),
        ("int8/nf4_token", "an activation may be int8_token"),
        ("int8/int8_token_asym", "an activation may be int8_token"),
        ("int8/q8_0", "an activation may be int8_token"),
        ("int8/", "'' starts with no known format"),
        ("int8/int8_token/int8_token", "'_token/int8_token' after 'int8' is not understood"),
    ],
)
def test_errors_name_the_string_and_the_remedy(text, message):
    with pytest.raises(ValueError, match=r"^spec ") as error:
        Spec.parse(text)
    assert repr(text) in str(error.value)
    assert message in str(error.value)


def test_strings_are_taken_wherever_specs_are():
    w = jnp.eye(8)
    assert qjax.quantize(w, "int8", 0).format == qjax.quantize(w, Spec("int8"), 0).format
